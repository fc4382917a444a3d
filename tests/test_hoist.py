"""Hoist on hand-written nets: golden splits, rejects, equal numbers at every step, one split."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from effuse.backends.reference import session
from effuse.capture import capture
from effuse.dump import dump
from effuse.errors import PassError
from effuse.graph import calls
from effuse.pass_manager import run_passes
from effuse.passes import Canonicalize, Hoist
from effuse.passes.hoist import ENLARGING
from effuse.plan import STEP_INPUT, Depends, Rate, Role
from effuse.program import run_program
from effuse.rates import dependences
from effuse.verify import verify

logging.getLogger("torch.__trace").disabled = True  # pytest's log capture would pay for it

aten = torch.ops.aten

PASSES = (Canonicalize(), Hoist())
TIMES = (9.0, 7.0, 3.0, 1.0)


class Net(nn.Module):
    """One value of each rate, and one of timestep and prompt together."""

    def __init__(self):
        super().__init__()
        self.time, self.text, self.mix = nn.Linear(1, 4), nn.Linear(3, 4), nn.Linear(4, 4)
        self.step = nn.Linear(4, 4)

    def forward(self, sample, timestep, prompt):
        t = F.silu(self.time(timestep.float()[:, None]))
        c = self.text(prompt)
        both = self.mix(t + c)
        return self.step(sample) * t + c * both


def values(batch=1):
    torch.manual_seed(1)
    return {
        "sample": torch.randn(batch, 4),
        "timestep": torch.full((batch,), 7),
        "prompt": torch.randn(batch, 3),
    }


def hoisted(function, inputs=None, *, timesteps=TIMES, passes=PASSES, weights=(), **options):
    """The module (a Net, or one of the function), captured, hoisted and verified."""
    module = function
    if not isinstance(function, nn.Module):
        module = nn.Module()
        torch.manual_seed(0)
        module.weights = nn.ParameterList(torch.randn(shape) for shape in weights)
        module.forward = function
        if weights:
            module.forward = lambda sample, timestep: function(sample, timestep, *module.weights)
    program = capture(
        module.eval(), values() if inputs is None else inputs, timesteps=timesteps, **options
    )
    return program, run_passes(program, passes)


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return Net().eval()


def text(program):
    return "\n".join(f"# {part.name}\n{dump(part.graph)}" for part in program.parts)


TABLES = """\
# prompt
%0: float32[1x3] = input prompt
%1: float32[4x3] = weight text.weight
%2: float32[4] = weight text.bias
%3: float32[1x4] = aten.linear.default(%0, %1, %2)  # text
return [%3]

# conditioning
%0: float32[1x4] = input prompt_linear_1
%1: int64[1] = input step_index
%2: float32[4x1x4] = weight table.schedule_silu
%3: float32[1x1x4] = aten.index_select.default(%2, 0, %1)
%4: float32[1x4] = aten.squeeze.dim(%3, 0)
%5: float32[4x4] = weight mix.weight
%6: float32[4] = weight mix.bias
%7: float32[1x4] = aten.add.Tensor(%4, %0)
%8: float32[1x4] = aten.linear.default(%7, %5, %6)  # mix
%9: float32[1x4] = aten.mul.Tensor(%0, %8)
return [%9]

# full
%0: float32[1x4] = input sample
%1: float32[1x4] = input conditioning_mul_1
%2: int64[1] = input step_index
%3: float32[4x1x4] = weight table.schedule_silu
%4: float32[1x1x4] = aten.index_select.default(%3, 0, %2)
%5: float32[1x4] = aten.squeeze.dim(%4, 0)
%6: float32[4x4] = weight step.weight
%7: float32[4] = weight step.bias
%8: float32[1x4] = aten.linear.default(%0, %6, %7)  # step
%9: float32[1x4] = aten.mul.Tensor(%8, %5)
%10: float32[1x4] = aten.add.Tensor(%9, %1)
return [%10]
"""

SCHEDULE = """\
# schedule
%0: int64[1] = input timestep
%1: float32[4x1] = weight time.weight
%2: float32[4] = weight time.bias
%3: float32[1] = aten.to.dtype(%0, float32)
%4: float32[1x1] = aten.unsqueeze.default(%3, 1)
%5: float32[1x4] = aten.linear.default(%4, %1, %2)  # time
%6: float32[1x4] = aten.silu.default(%5)
return [%6]
"""


def test_golden_with_a_schedule(net):
    program, result = hoisted(net)
    assert [part.name for part in program.parts] == ["full"]
    assert text(result) == TABLES
    rates = {part.name: part.depends for part in result.parts}
    assert rates["prompt"] is Depends.PROMPT
    assert rates["conditioning"] == Depends.PROMPT | Depends.TIMESTEP
    assert "time.weight" not in result.weights
    table = result.weights["table.schedule_silu"]
    for row, time in zip(table, TIMES, strict=True):
        with torch.no_grad():
            assert torch.equal(row, F.silu(net.time(torch.tensor([[time]]))))


def test_golden_without_a_schedule(net):
    _, result = hoisted(net, timesteps=None)
    schedule, *_ = result.parts
    assert text(result).startswith(SCHEDULE)
    assert schedule.depends is Depends.TIMESTEP
    assert [part.name for part in result.parts] == ["schedule", "prompt", "conditioning", "full"]
    assert result.part("full").inputs == ("sample", "schedule_silu", "conditioning_mul_1")
    assert "no schedule was given" in " ".join(result.records[1].notes)
    assert STEP_INPUT not in {name for part in result.parts for name in part.inputs}


@pytest.mark.parametrize("timesteps", [TIMES, None], ids=["schedule", "none"])
def test_every_step_equals_eager(net, timesteps):
    _, result = hoisted(net, timesteps=timesteps)
    assert result.records[1].error == 0.0
    run = session(result)
    torch.manual_seed(2)
    for prompt in torch.randn(2, 1, 3):
        for time in TIMES:
            given = values() | {"timestep": torch.tensor([int(time)]), "prompt": prompt}
            given["sample"] = torch.randn(1, 4)
            with torch.no_grad():
                assert torch.equal(run(**given), net(**given))
    assert run.runs["prompt"] == 2
    assert run.runs["conditioning"] == 2 * len(TIMES)
    assert run.runs.get("schedule", 4) >= 4


def test_the_step_program_computes_nothing_slow(net):
    _, result = hoisted(net)
    assert Hoist().ensures(result) is None
    full = result.part("full")
    found = dependences(full.graph, result.sources)
    for node in calls(full.graph, aten.linear.default, aten.mul.Tensor):
        assert found[node].rate is Rate.STEP
    unsplit, _ = hoisted(net, passes=())
    assert "changes at schedule rate in full" in Hoist().ensures(unsplit)


def test_a_second_split_is_refused(net):
    _, result = hoisted(net)
    with pytest.raises(PassError, match="hoist: the program is in parts already"):
        run_passes(result, (Hoist(),))


def test_a_net_of_the_latent_alone_stays_as_it_is():
    module, weight = nn.Module(), torch.randn(4, 4)
    module.register_buffer("weight", weight)
    module.forward = lambda sample: F.linear(sample.sin(), module.weight)
    program, result = hoisted(module, {"sample": torch.randn(2, 4)}, timesteps=None)
    assert text(result) == text(program)
    again = run_passes(result, (Hoist(),))  # nothing was split, so it may run again
    assert text(again) == text(result)
    assert again.records[-1].rewrites == {}


def test_fuel_leaves_the_program_whole_or_untabulated(net):
    for fuel, names in (
        (0, ["full"]),
        (1, ["schedule", "prompt", "conditioning", "full"]),
        (2, ["prompt", "conditioning", "full"]),
    ):
        program = capture(net, values(), timesteps=TIMES)
        result = run_passes(program, (Hoist(),), fuel=fuel)
        assert [part.name for part in result.parts] == names
        assert result.records[0].error == 0.0


@pytest.mark.parametrize("enlarge", ["expand", "repeat"])
def test_what_only_enlarges_stays_beyond_the_boundary(enlarge):
    def forward(sample, timestep):
        t = timestep.float().cos()[:, None]
        grown = t.expand(1, 64) if enlarge == "expand" else t.repeat(1, 64)
        return sample * grown

    inputs = {"sample": torch.randn(1, 64), "timestep": torch.tensor([7])}
    for timesteps in (TIMES, None):
        _, result = hoisted(forward, inputs, timesteps=timesteps)
        assert len(calls(result.part("full").graph, *ENLARGING)) == 1
        if timesteps:
            assert {name: t.numel() for name, t in result.weights.items()} == {
                "table.schedule_unsqueeze": len(TIMES)
            }
        else:
            assert result.part("full").inputs == ("sample", "schedule_unsqueeze")


def test_equal_rows_of_a_batch_are_stored_once():
    inputs = {"sample": torch.randn(3, 4), "timestep": torch.tensor([7, 7, 7])}
    _, result = hoisted(
        lambda sample, timestep: sample * timestep.float().cos()[:, None], inputs
    )  # fmt: skip
    assert [tuple(t.shape) for t in result.weights.values()] == [(4, 1, 1)]
    assert result.records[1].error == 0.0


OPEN = {"batch": (1, 8)}


def test_an_open_batch_is_read_from_the_latent_and_tables_hold_one_row():
    inputs = {"sample": torch.randn(2, 4), "timestep": torch.tensor([7, 7])}

    def forward(sample, timestep, weight):
        return sample * F.linear(timestep.float()[:, None], weight)

    program, result = hoisted(forward, inputs, weights=[(4, 1)], dynamic=OPEN)
    assert [tuple(t.shape) for t in result.weights.values()] == [(4, 1, 4)]
    for batch in (1, 2, 5):
        given = {"sample": torch.randn(batch, 4), "timestep": torch.full((batch,), 3)}
        assert torch.equal(run_program(result, given)[0], run_program(program, given)[0])


def test_a_conditioning_part_with_an_open_batch():
    """The part reads no latent, so that the open size has to come from what it is handed."""
    torch.manual_seed(0)
    module = Net().eval()
    program, result = hoisted(module, values(2), dynamic=OPEN)
    verify(result)
    assert [part.name for part in result.parts][-2:] == ["conditioning", "full"]
    for batch in (1, 2, 3):
        given = values(batch)
        found = run_program(result, given)
        assert torch.allclose(found[0], run_program(program, given)[0], rtol=1e-6, atol=1e-6)


def test_two_tables_in_one_part_read_the_open_size_from_neither():
    def forward(sample, timestep, prompt):
        t = timestep.float()[:, None]
        one, other, text = t.cos(), t.sin(), prompt.tanh()
        return sample * (one * text + (other * text).tanh())

    program, result = hoisted(forward, values(2) | {"prompt": torch.randn(2, 4)}, dynamic=OPEN)
    verify(result)
    conditioning = result.part("conditioning")
    assert set(conditioning.inputs) == {STEP_INPUT, "prompt_tanh"}
    for batch in (1, 3):
        given = values(batch) | {"prompt": torch.randn(batch, 4)}
        assert torch.equal(run_program(result, given)[0], run_program(program, given)[0])


def test_a_table_that_would_depend_on_an_open_size_is_rejected():
    def forward(sample, timestep):
        places = torch.arange(sample.shape[0])
        return sample * (timestep.float() + places).cos()[:, None]

    inputs = {"sample": torch.randn(2, 4), "timestep": torch.tensor([7, 7])}
    program, result = hoisted(forward, inputs, dynamic=OPEN)
    (reason,) = result.records[1].reasons["table"]
    assert reason.endswith("depends on a size that is left open")
    assert "the schedule program stays" in " ".join(result.records[1].notes)
    assert result.parts[0].name == "schedule"
    for batch in (2, 5):
        given = {"sample": torch.randn(batch, 4), "timestep": torch.full((batch,), 3)}
        assert torch.equal(run_program(result, given)[0], run_program(program, given)[0])


def test_a_table_whose_values_change_with_an_open_size_is_rejected():
    def forward(sample, timestep):
        return sample * (timestep.float().cos() / sample.shape[0])[:, None]

    inputs = {"sample": torch.randn(2, 4), "timestep": torch.tensor([7, 7])}
    program, result = hoisted(forward, inputs, dynamic=OPEN)
    (reason,) = result.records[1].reasons["table"]
    assert reason.endswith("changes with a size that is left open")
    given = {"sample": torch.randn(5, 4), "timestep": torch.full((5,), 3)}
    assert torch.equal(run_program(result, given)[0], run_program(program, given)[0])


def test_static_inputs_hoist_with_what_they_meet():
    def forward(sample, timestep, weight):
        return sample * (timestep.float() * weight)[:, None]

    inputs = {"sample": torch.randn(1, 4), "timestep": torch.tensor([7])}
    _, result = hoisted(forward, inputs, weights=[(1,)])
    assert [part.name for part in result.parts] == ["full"]
    module = nn.Module()
    module.forward = lambda sample, scale: sample * scale.exp()
    inputs = {"sample": torch.randn(1, 4), "scale": torch.randn(1, 4)}
    _, result = hoisted(module, inputs, timesteps=None, roles={"scale": Role.PROMPT})
    assert result.part("prompt").outputs == ("prompt_exp",)


def test_outputs_that_do_not_depend_on_the_latent():
    def forward(sample, timestep, prompt):
        t = timestep.float().cos()
        return sample + t[:, None], t, prompt.exp(), prompt

    inputs = {"sample": torch.randn(1, 4), "timestep": torch.tensor([7]), "prompt": torch.ones(2)}
    for timesteps in (TIMES, None):
        program, result = hoisted(forward, inputs, timesteps=timesteps)
        given = inputs | {"timestep": torch.tensor([3]), "prompt": torch.randn(2)}
        found, expected = run_program(result, given), run_program(program, given)
        assert all(map(torch.equal, found, expected))


def test_the_given_program_is_left_alone(net):
    program = capture(net, values(), timesteps=TIMES)
    before, names = text(program), set(program.weights)
    run_passes(program, PASSES)
    assert text(program) == before
    assert set(program.weights) == names


def test_many_crossing_values_come_in_the_graphs_order():
    def forward(sample, timestep, prompt):
        for power in range(1, 9):
            t = (timestep.float() * power).cos()[:, None]
            sample = sample * t + (prompt * power).sin() * t
        return sample

    inputs = {"sample": torch.randn(1, 4), "timestep": torch.tensor([7]), "prompt": torch.ones(1)}
    texts = {text(hoisted(forward, inputs, timesteps=None)[1]) for _ in range(3)}
    assert len(texts) == 1
    _, result = hoisted(forward, inputs, timesteps=None)
    assert len(result.part("schedule").outputs) == len(result.part("prompt").outputs) == 8
    for part in result.parts[:-1]:
        order = [node.name for node in part.graph.nodes]
        returned = [node.name for node in part.graph.output_node().args[0]]
        assert returned == sorted(returned, key=order.index)
