"""A compiled network is called as the network it replaces, and refuses what it cannot do."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import effuse
from effuse.errors import InputError

TIMES = [900, 500, 100]


class Net(nn.Module):
    """A denoiser with a timestep, a prompt and a nested condition, and diffusers' manners."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Conv2d(3, 4, 3, padding=1)
        self.time = nn.Linear(2, 4)
        self.prompt = nn.Linear(5, 4)
        self.leave = nn.Conv2d(4, 3, 3, padding=1)

    def forward(
        self, sample, timestep, encoder_hidden_states, extra=None, gain=1.0, return_dict=True
    ):
        phase = timestep.float().reshape(-1, 1) * torch.tensor([0.01, 0.001])
        h = self.enter(sample) + self.time(torch.sin(phase))[:, :, None, None]
        h = h * self.prompt(encoder_hidden_states).mean(1)[:, :, None, None]
        if extra is not None:
            h = h + extra["shift"][:, None, None, None]
        y = self.leave(torch.nn.functional.silu(h)) * gain
        return {"sample": y} if return_dict else (y,)


def example(batch=2, timestep=None, seed=0, **more):
    generator = torch.Generator().manual_seed(seed)
    return {
        "sample": torch.randn(batch, 3, 8, 8, generator=generator),
        "timestep": torch.tensor(500) if timestep is None else timestep,
        "encoder_hidden_states": torch.randn(batch, 3, 5, generator=generator),
        **more,
    }


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return Net().eval()


def build(net, inputs, schedule=None, backend="onnx", **options):
    config = {"passes": "exact", "backend": backend, **options}
    inputs = {**inputs, "return_dict": False}
    return effuse.compile(net, config, inputs=inputs, schedule=schedule, progress=False)


@pytest.fixture(scope="module", params=["onnx", "reference"])
def scheduled(request, net):
    return build(net, example(), TIMES, request.param)


@pytest.fixture(scope="module", params=["onnx", "reference"])
def free(request, net):
    return build(net, example(timestep=torch.tensor([500.0, 500.0])), None, request.param)


@pytest.fixture(scope="module")
def nested(net):
    extra = {"shift": torch.randn(2)}
    return build(net, example(extra=extra, gain=2.0), TIMES)


@pytest.fixture(scope="module")
def dynamic(net):
    return build(net, example(timestep=torch.tensor([500, 500])), TIMES, dynamic={"batch": (1, 4)})


def eager(net, inputs):
    with torch.no_grad():
        return net(**inputs, return_dict=False)[0]


def close(found, expected):
    torch.testing.assert_close(torch.as_tensor(found), expected, rtol=1e-5, atol=1e-5)


def fresh_session(compiled):
    """A Session on the same graphs that remembers nothing."""
    return type(compiled.session)(
        compiled.session.spec, compiled.session._runs, compiled.session.arrays
    )


def test_positional_and_keyword_calls_agree_with_the_network(net, scheduled):
    given = example(seed=1)
    expected = eager(net, given)
    close(scheduled(*given.values(), return_dict=False)[0], expected)
    close(scheduled(**given, return_dict=False)[0], expected)
    prompt = given.pop("encoder_hidden_states")
    close(scheduled(*given.values(), encoder_hidden_states=prompt).sample, expected)


def test_return_dict_true_false_and_by_position(scheduled):
    given = example(seed=1)
    named = scheduled(**given)
    assert list(named) == ["sample"]
    assert named.sample is named["sample"] is named[0]
    assert not hasattr(named, "nothing")
    assert isinstance(scheduled(**given, return_dict=False), tuple)
    assert isinstance(scheduled(*given.values(), None, 1.0, False), tuple)
    assert list(scheduled(*given.values(), None, 1.0, True)) == ["sample"]


def test_outputs_are_named_as_the_network_names_them():
    class Named(nn.Module):
        def forward(self, sample, return_dict=True):
            return {"noise": sample * 2, "sigma": sample + 1} if return_dict else (sample * 2,)

    compiled = effuse.compile(
        Named().eval(), "none", inputs={"sample": torch.ones(1, 2)}, progress=False
    )
    found = compiled(torch.ones(1, 2))
    assert list(found) == ["noise", "sigma"]
    assert float(found.sigma[0, 0]) == 2.0


def test_a_network_without_return_dict_returns_what_it_returns():
    class Plain(nn.Module):
        def forward(self, x, t):
            return x * 2 + t, {"deep": (x - 1,)}

    given = {"x": torch.ones(1, 2), "t": torch.tensor(3.0)}
    compiled = effuse.compile(Plain().eval(), "none", inputs=given, progress=False)
    first, rest = compiled(**given)
    assert torch.equal(first, torch.full((1, 2), 5.0))
    assert torch.equal(rest["deep"][0], torch.zeros(1, 2))


def test_numpy_in_numpy_out_and_torch_in_torch_out(scheduled):
    given = example(seed=1)
    of_torch = scheduled(**given).sample
    arrays = {name: value.numpy() for name, value in given.items()}
    of_numpy = scheduled(**arrays).sample
    assert type(of_torch) is torch.Tensor and type(of_numpy) is np.ndarray
    assert of_torch.dtype == torch.float32 and of_numpy.dtype == np.float32
    assert np.array_equal(of_torch.numpy(), of_numpy)


def test_tensors_that_require_grad_and_views_are_taken(net, scheduled):
    given = example(seed=1)
    given["sample"] = given["sample"].transpose(2, 3).requires_grad_()
    found = scheduled(**given).sample
    assert not found.requires_grad
    close(found, eager(net, given))


def test_an_output_is_the_callers_own(scheduled):
    given = example(seed=1)
    first = scheduled(**given).sample
    copy = first.clone()
    first.zero_()
    assert torch.equal(scheduled(**given).sample, copy)


def test_unknown_names_get_the_nearest(scheduled):
    given = example()
    given["encoder_hidden_state"] = given.pop("encoder_hidden_states")
    with pytest.raises(InputError, match="did you mean 'encoder_hidden_states'"):
        scheduled(**given)


def test_missing_inputs_are_named_with_shape_and_dtype(scheduled):
    given = example()
    del given["encoder_hidden_states"]
    message = r"encoder_hidden_states: missing.*\(2, 3, 5\) and dtype float32"
    with pytest.raises(InputError, match=message):
        scheduled(**given)
    with pytest.raises(InputError, match=message):
        scheduled(**given, encoder_hidden_states=None)


def test_too_many_arguments_and_one_given_twice(scheduled):
    given = example()
    with pytest.raises(InputError, match="at most 6 arguments, got 7"):
        scheduled(*given.values(), None, 1.0, False, 1)
    with pytest.raises(InputError, match="sample: given twice"):
        scheduled(given["sample"], **given)


@pytest.mark.parametrize("shape", [(2, 3, 8, 9), (3, 3, 8, 8), (2, 3, 8), (2, 3, 8, 8, 1)])
def test_wrong_shapes_are_refused_with_both_shapes(scheduled, shape):
    given = {**example(), "sample": torch.zeros(shape)}
    with pytest.raises(InputError) as caught:
        scheduled(**given)
    assert "sample: expected shape (2, 3, 8, 8)" in str(caught.value)
    assert str(shape) in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.int32])
def test_wrong_dtypes_are_refused_with_both_dtypes(scheduled, dtype):
    given = example()
    given["sample"] = given["sample"].to(dtype)
    with pytest.raises(InputError, match=r"sample: expected float32, got .*" + str(dtype)[6:]):
        scheduled(**given)


@pytest.mark.parametrize("value", ["noise", [[1.0], [1.0, 2.0]], object()])
def test_what_is_no_array_is_refused(scheduled, value):
    with pytest.raises(InputError, match="sample: expected float32, got"):
        scheduled(**{**example(), "sample": value})


def test_arguments_that_were_not_captured_are_refused(scheduled):
    with pytest.raises(InputError, match="extra: not captured, got dict"):
        scheduled(**example(), extra={"shift": torch.zeros(2)})
    with pytest.raises(
        InputError, match=r"gain: captured as 1.0, got float; compile again with inp"
    ):
        scheduled(**example(), gain=3.0)
    scheduled(**example(), extra=None, gain=1.0)  # the defaults


def test_captured_constants_may_be_repeated_but_not_changed(nested):
    given = example(extra={"shift": torch.zeros(2)})
    nested(**given, gain=2.0)
    with pytest.raises(InputError, match=r"gain: captured as 2.0, got float"):
        nested(**given, gain=3.0)
    with pytest.raises(InputError, match=r"gain: captured as 2.0, got Tensor"):
        nested(**given, gain=torch.tensor([2.0, 2.0]))


def test_nested_inputs(net, nested):
    given = example(extra={"shift": torch.tensor([1.0, -1.0])})
    close(nested(**given).sample, eager(net, {**given, "gain": 2.0}))
    with pytest.raises(InputError, match=r"extra\.shift: missing"):
        nested(**{**given, "extra": {}})
    more = {"shift": torch.zeros(2), "shifts": torch.zeros(2)}
    with pytest.raises(InputError, match=r"'extra\.shifts'; did you mean 'extra\.shift'"):
        nested(**{**given, "extra": more})


def test_constants_are_the_same_after_saving(net, tmp_path):
    class Options(nn.Module):
        def forward(self, sample, size=(1, 2), table=None):
            return sample * size[0] + table["by"]

    given = {"sample": torch.ones(1, 2), "size": (3, 4), "table": {"by": 5}}
    compiled = effuse.compile(Options().eval(), "none", inputs=given, progress=False)
    loaded = effuse.load(compiled.save(tmp_path / "options.effuse"))
    for each in (compiled, loaded):
        assert float(each(**given)[0, 0]) == 8.0
        with pytest.raises(InputError, match="size: captured as"):
            each(**{**given, "size": (3, 5)})


@pytest.mark.parametrize("time", [500, 500.0, np.float64(500), torch.tensor(500.0),
                                  torch.tensor([500, 500]), np.array([500, 500])])  # fmt: skip
def test_a_scalar_timestep_may_come_as_any_number(net, scheduled, time):
    close(scheduled(**example(seed=2, timestep=time)).sample, eager(net, example(seed=2)))


def test_every_timestep_of_the_schedule(net, scheduled):
    for time in TIMES:
        given = example(seed=3, timestep=torch.tensor(time))
        close(scheduled(**given).sample, eager(net, given))


def test_a_timestep_that_the_schedule_does_not_have(scheduled):
    with pytest.raises(InputError, match=r"480 is not one of the 3 timesteps.*nearest: 500"):
        scheduled(**example(timestep=torch.tensor(480)))
    with pytest.raises(InputError, match="timestep: expected int64, got float"):
        scheduled(**example(timestep=torch.tensor(499.5)))


def test_timesteps_that_differ_within_the_batch(net, free, dynamic, scheduled):
    given = example(seed=4, timestep=torch.tensor([900.0, 17.5]))
    close(free(**given).sample, eager(net, given))
    with pytest.raises(InputError, match="schedule=None"):
        dynamic(**example(timestep=torch.tensor([900, 100])))
    with pytest.raises(InputError, match=r"2 that differ.*shape \(batch,\)"):
        scheduled(**example(timestep=torch.tensor([900, 100])))


@pytest.mark.parametrize("time", [torch.tensor(321.0), torch.tensor([321.0]), 321, 321.0])
def test_one_timestep_for_a_network_that_takes_a_vector(net, free, time):
    given = example(seed=5)
    expected = eager(net, {**given, "timestep": torch.tensor([321.0, 321.0])})
    close(free(**{**given, "timestep": time}).sample, expected)


def test_a_vector_of_timesteps_of_another_size_than_the_batch(free):
    with pytest.raises(InputError, match=r"timestep: expected shape \(2,\), got \(3,\)"):
        free(**example(timestep=torch.tensor([1.0, 1.0, 1.0])))


def test_fractional_schedules_whatever_the_type_of_the_timesteps(net):
    times = np.array([0.9, 0.7, 0.1])  # float64, as schedulers have them
    compiled = build(net, example(timestep=torch.tensor(0.7)), times, "reference")
    for time in (0.9, np.float64(0.9), torch.tensor(0.9), torch.tensor(0.9, dtype=torch.float64)):
        given = example(timestep=torch.tensor(0.9))
        close(compiled(**{**given, "timestep": time}).sample, eager(net, given))
    assert len(compiled.session.spec.timesteps) == 3


def test_a_fractional_schedule_over_an_integer_example(net):
    compiled = build(net, example(timestep=torch.tensor(1)), [999.0, 749.25, 0.5], "reference")
    given = example(timestep=torch.tensor(749.25))
    close(compiled(**given).sample, eager(net, given))


def test_the_prompt_program_runs_once_a_picture(scheduled):
    session = fresh_session(scheduled)
    given = example(seed=6)
    for time in TIMES:
        session(**{**given, "timestep": time, "sample": torch.randn(2, 3, 8, 8)})
    assert session.runs["prompt"] == 1
    again = {**given, "encoder_hidden_states": given["encoder_hidden_states"].clone()}
    session(**again)
    assert session.runs["prompt"] == 1  # equal values are the same prompt
    session(**example(seed=7))
    assert session.runs["prompt"] == 2


def test_a_prompt_changed_in_place_is_another_prompt(net, scheduled):
    session = fresh_session(scheduled)
    for convert in (lambda value: value, lambda value: value.numpy()):
        given = example(seed=8)
        prompt = convert(given["encoder_hidden_states"])
        before = session(**{**given, "encoder_hidden_states": prompt}).sample.clone()
        prompt *= 2  # in place, the same object
        after = session(**{**given, "encoder_hidden_states": prompt}).sample
        assert not torch.equal(before, after)
        close(after, eager(net, {**given, "encoder_hidden_states": torch.as_tensor(prompt)}))
    assert session.runs["prompt"] == 2  # the second round's prompts are remembered from the first


def test_guidance_as_two_alternating_calls_remembers_both_prompts(net, scheduled):
    session = fresh_session(scheduled)
    prompts = [example(seed=seed)["encoder_hidden_states"] for seed in (1, 2)]
    for time in TIMES:
        for prompt in prompts:
            given = {**example(seed=time), "timestep": torch.tensor(time)}
            given["encoder_hidden_states"] = prompt
            close(session(**given).sample, eager(net, given))
    assert session.runs["prompt"] == 2


def test_memory_does_not_grow_without_end(scheduled):
    session = fresh_session(scheduled)
    for seed in range(12):
        session(**example(seed=seed))
    assert session.runs["prompt"] == 12
    assert len(session._memory["prompt"].entries) <= 4


def test_without_a_schedule_its_program_runs_once_a_timestep(free):
    session = fresh_session(free)
    for time in (900.0, 900.0, 500.0, 500.0):  # guidance as two calls
        session(**example(seed=1, timestep=torch.tensor([time, time])))
    assert session.runs["schedule"] == 2
    assert session.runs["prompt"] == 1


@pytest.mark.parametrize("batch", [1, 2, 4])
def test_an_open_batch(net, dynamic, batch):
    for time in (torch.tensor(100), torch.tensor([100]), torch.tensor([100] * batch)):
        given = example(batch, time, seed=batch)
        close(dynamic(**given).sample, eager(net, given))


def test_an_open_batch_has_bounds_and_is_one_size(dynamic):
    with pytest.raises(InputError, match="batch must be 1 to 4, got 5"):
        dynamic(**example(5, torch.tensor(100)))
    given = example(2, torch.tensor(100))
    given["encoder_hidden_states"] = torch.zeros(3, 3, 5)
    with pytest.raises(InputError, match="batch is 3 here, but 2 in sample"):
        dynamic(**given)


def test_guidance_as_one_batch_equals_two_calls(dynamic):
    one, two = example(1, torch.tensor(500), seed=1), example(1, torch.tensor(500), seed=2)
    pair = {name: torch.cat([one[name], two[name]]) for name in ("sample", "encoder_hidden_states")}
    both = dynamic(**pair, timestep=500).sample
    close(both, torch.cat([dynamic(**one).sample, dynamic(**two).sample]))


def test_driven_step_by_step_on_arrays(net, scheduled):
    given = example(seed=9)
    session = scheduled.session
    values = {
        item.name: session.arrays.take(given[item.name], item) for item in session.spec.inputs
    }
    assert session.step_index(values) == 1
    close(session.step(values)["output_0"], eager(net, given))


def test_threads_give_the_same_numbers(net, scheduled, tmp_path):
    if scheduled.manifest["backend"] != "onnx":
        pytest.skip("threads are onnxruntime's")
    loaded = effuse.load(scheduled.save(tmp_path / "net.effuse"), threads=1)
    close(loaded(**example(seed=1)).sample, eager(net, example(seed=1)))


class Steers(nn.Module):
    """Gives what another network adds at several places, as ControlNets do."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, sample, timestep, return_dict=True):
        h = self.enter(sample) * timestep.reshape(-1, 1)
        down = [h, h.tanh()]
        if not return_dict:
            return down, self.leave(h)
        return {"down": tuple(down), "mid": self.leave(h)}


@pytest.mark.parametrize("captured_with_names", [True, False])
def test_results_within_results_stay_nested(captured_with_names):
    torch.manual_seed(0)
    net = Steers().eval()
    given = {"sample": torch.randn(2, 4), "timestep": torch.tensor([0.5, 0.5])}
    inputs = {**given, "return_dict": captured_with_names}
    compiled = effuse.compile(net, "none", inputs=inputs, progress=False)
    (one, other), middle = compiled(**given, return_dict=False)
    with torch.no_grad():
        (first, second), third = net(**given, return_dict=False)
    torch.testing.assert_close([one, other, middle], [first, second, third])
    named = compiled(**given)
    assert list(named) == (["down", "mid"] if captured_with_names else ["sample", "output_1"])
    torch.testing.assert_close(named[0][1], second)


class GivesNothingBeside(nn.Module):
    """Returns a tensor between what is none, as networks do whose other heads were left out."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(4, 4)

    def forward(self, sample, timestep, return_dict=True):
        y = self.mix(sample) * timestep.reshape(-1, 1)
        return (None, y, 3) if not return_dict else {"aux": None, "sample": y, "count": 3}


@pytest.mark.parametrize("with_names", [True, False])
def test_what_is_no_tensor_is_returned_as_it_is(tmp_path, with_names):
    torch.manual_seed(0)
    net = GivesNothingBeside().eval()
    given = {"sample": torch.randn(2, 4), "timestep": torch.tensor([0.5, 0.5])}
    inputs = {**given, "return_dict": with_names}
    compiled = effuse.compile(net, "none", inputs=inputs, progress=False)
    loaded = effuse.load(compiled.save(tmp_path / "a.effuse"))
    nothing, found, number = loaded(**given, return_dict=False)
    assert nothing is None and number == 3
    torch.testing.assert_close(found, net(**given, return_dict=False)[1])
