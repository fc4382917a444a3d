"""Cache: what each mode leaves out, plans, forecasts, schedules, refusals, round trips."""

from __future__ import annotations

import dataclasses
import functools
import gc
import logging
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import effuse
from effuse.backends.reference import session
from effuse.calibrate import drive, trajectory
from effuse.capture import capture
from effuse.dump import dump
from effuse.errors import CalibrationError, ConfigError, EffuseError, PassError
from effuse.examples import derive_inputs
from effuse.graph import calls, module_path
from effuse.pass_manager import run_passes
from effuse.passes import Cache, Canonicalize, Hoist
from effuse.plan import FORECAST_INPUT, spec_from_json, to_json
from effuse.program import run_program, same_step
from effuse.schedule import nonuniform, propagation_keys
from effuse.structure import LAYERS, Structure
from effuse.verify import relative_error

logging.getLogger("torch.__trace").disabled = True  # pytest's log capture would pay for it

PASSES = (Canonicalize(), Hoist())
TIMES = (999.0, 800.0, 600.0, 400.0, 200.0, 1.0)
EVERY_OTHER = {"interval": 2, "warmup": 1, "order": 0}


def conv(width=8, out=None):
    return nn.Conv2d(width, out or width, 3, padding=1)


class UNet(nn.Module):
    """Two levels, three long skips, three residual layers; shifts by the timestep and a prompt."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.enter, self.leave = conv(4, 8), conv(8, 4)
        self.down = nn.ModuleList([conv(), conv()])
        self.shrink, self.grow = nn.Conv2d(8, 8, 3, stride=2, padding=1), conv()
        self.middle = conv()
        self.up = nn.ModuleList([conv(16, 8) for _ in range(3)])
        self.time, self.text = nn.Linear(8, 8), nn.Linear(6, 8)

    def forward(self, sample, timestep, prompt):
        t = (timestep.float().reshape(-1, 1) / 100 * torch.arange(8)).cos().to(sample.dtype)
        shift = (self.time(t) + self.text(prompt))[:, :, None, None]
        skips = [h := self.enter(sample)]
        skips.append(h := h + F.silu(self.down[0](h) + shift))
        skips.append(h := self.shrink(h))
        h = h + F.silu(self.down[1](h) + shift)
        h = h + self.middle(F.silu(h))
        h = self.up[0](torch.cat([h, skips.pop()], dim=1))
        h = self.grow(F.interpolate(h, scale_factor=2.0))
        for layer in self.up[1:]:
            h = F.silu(layer(torch.cat([h, skips.pop()], dim=1)) + shift)
        return self.leave(h)


def unet_inputs(batch=2, time=999.0, seed=0):
    noise = torch.Generator().manual_seed(seed)
    return {
        "sample": torch.randn(batch, 4, 8, 8, generator=noise),
        "timestep": torch.tensor(time),
        "prompt": torch.randn(batch, 6, generator=noise),
    }


LEVELS: dict[str, Any] = {"block_out_channels": (8, 16), "norm_num_groups": 4, "sample_size": 8}
HEADS = {"num_attention_heads": 2, "attention_head_dim": 8}


def unet2d():
    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D")}
    blocks |= {"up_block_types": ("AttnUpBlock2D", "UpBlock2D"), "layers_per_block": 1}
    return diffusers.UNet2DModel(attention_head_dim=4, **LEVELS, **blocks)


def conditional():
    blocks = {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D")}
    blocks |= {"up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "layers_per_block": 1}
    widths = {"attention_head_dim": 2, "cross_attention_dim": 12}
    return diffusers.UNet2DConditionModel(**LEVELS, **blocks, **widths)


def dit():
    sizes = {"in_channels": 4, "out_channels": 8, "num_layers": 3, "sample_size": 8}
    return diffusers.DiTTransformer2DModel(num_embeds_ada_norm=10, **HEADS, **sizes)


def pixart():
    heads = {"num_attention_heads": 2, "attention_head_dim": 6, "cross_attention_dim": 12}
    return diffusers.PixArtTransformer2DModel(
        num_layers=2, sample_size=8, caption_channels=10, **heads
    )


def sd3():
    widths = {"joint_attention_dim": 12, "caption_projection_dim": 16, "pooled_projection_dim": 10}
    sizes = {"sample_size": 8, "in_channels": 4, "out_channels": 4, "pos_embed_max_size": 8}
    return diffusers.SD3Transformer2DModel(num_layers=2, **HEADS, **widths, **sizes)


def flux():
    widths = {"joint_attention_dim": 12, "pooled_projection_dim": 10, "in_channels": 4}
    layers = {"num_layers": 2, "num_single_layers": 1, "attention_head_dim": 16}
    return diffusers.FluxTransformer2DModel(
        num_attention_heads=2, axes_dims_rope=(4, 4, 8), **layers, **widths
    )


NETWORKS = {
    "hand": UNet, "unet2d": unet2d, "sd15": conditional, "dit": dit, "pixart": pixart, "sd3": sd3,
    "flux": flux,
}  # fmt: skip
UNETS = ("hand", "unet2d", "sd15")
MODES = [
    (name, mode)
    for name in NETWORKS
    for mode in ("deep", "encoder", "unit", "layer", "block", "residual")
    if name in UNETS or mode not in ("deep", "encoder")
]
ROUNDED = ("block", "residual")  # (x + f(x)) - x is f(x) to rounding


@functools.cache
def network(name):
    torch.manual_seed(0)
    net = NETWORKS[name]().eval()
    for parameter in net.parameters():  # adaLN-zero and the like would hide the blocks
        if parameter.count_nonzero() == 0:
            nn.init.normal_(parameter, std=0.1)
    return net


def times_of(name):
    return (1.0, 0.75, 0.5, 0.375, 0.25, 0.125) if name == "flux" else TIMES


def inputs_of(name):
    if name == "hand":
        return unet_inputs()
    return derive_inputs(network(name), timestep=torch.tensor(times_of(name)[0]), size=8)


@functools.cache
def plain(name):
    """The network, canonical and hoisted."""
    found = capture(network(name), inputs_of(name), timesteps=times_of(name))
    program = run_passes(found, PASSES)
    gc.freeze()  # it stays for all tests, and walks over its nodes would take most of their time
    return program


def cached(name="hand", **options):
    return run_passes(plain(name), (Cache(**EVERY_OTHER | options),))


def layers_left(part):
    return {module_path(node) for node in calls(part.graph, *LAYERS)}


def text(program):
    return "\n".join(f"# {part.name}\n{dump(part.graph)}" for part in program.parts)


# ---- variants ------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=MODES, ids="-".join)
def each(request):
    """A network's name, a mode, and the network cached in it."""
    name, mode = request.param
    return name, mode, cached(name, mode=mode)


def test_a_variant_fed_with_the_same_steps_slots_gives_the_full_ones_outputs(each):
    name, mode, program = each
    before = plain(name)
    values = before.examples
    with torch.no_grad():
        expected = run_program(before, values)
        full = run_program(program, values)
        reused = run_program(program, same_step(program, values), variant="reuse")
    assert all(map(torch.equal, full, expected))
    if mode in ROUNDED:
        assert relative_error(reused, expected) < 1e-6
    else:
        assert all(map(torch.equal, reused, expected))


def test_nothing_is_left_that_only_cached_values_need(each):
    name, mode, program = each
    full, reading = program.part("full"), program.part("reuse")
    dead = [node for node in reading.graph.nodes if not node.users and node.op != "output"]
    assert dead == []
    assert {name for slot in program.plan.slots for name in slot.past} <= set(reading.inputs)
    assert set(full.outputs) == {*program.outputs, *(slot.name for slot in program.plan.slots)}
    assert layers_left(reading) < layers_left(full)
    structure = Structure(plain(name).part("full"), plain(name))
    if mode == "unit":
        inside = {module_path(span.inner) for span in structure.units}
        assert not inside & layers_left(reading)
    if mode == "deep":
        (deep, skip) = (structure.skips[0].deep, structure.skips[0].skip)
        behind = structure.between(skip, deep)
        assert not {module_path(node) for node in behind} & layers_left(reading) - {""}


def test_deep_leaves_out_all_below_the_chosen_skip():
    layers = [
        {"enter", "up.2", "leave"},
        {"enter", "down.0", "up.1", "up.2", "leave"},
        {"enter", "down.0", "shrink", "up.0", "grow", "up.1", "up.2", "leave"},
    ]
    for branch, expected in enumerate(layers):
        assert layers_left(cached(branch=branch).part("reuse")) == expected


def test_encoder_leaves_the_decoder():
    program = cached(mode="encoder")
    assert layers_left(program.part("reuse")) == {"up.0", "grow", "up.1", "up.2", "leave"}
    assert len(program.plan.slots) == 4
    assert "sample" not in program.part("reuse").inputs


def test_gates_stay_fresh_in_mode_unit():
    program = cached("dit", mode="unit")
    reading = program.part("reuse")
    assert all("transformer_blocks" not in path for path in layers_left(reading))
    muls = calls(reading.graph, torch.ops.aten.mul.Tensor)
    assert sum("transformer_blocks" in module_path(node) for node in muls) == 6
    assert len(program.plan.slots) == 6


def test_text_that_no_image_reads_keeps_no_slots():
    assert len(cached("sd3", mode="block").plan.slots) == 2  # of three: the text's is not read
    assert len(cached("flux", mode="residual").plan.slots) == 1


OPEN = {"batch": (1, 4), "height": (8, 32), "width": (8, 32)}


@pytest.mark.parametrize("mode", ["deep", "encoder", "layer", "residual"])
def test_open_sizes_keep_no_cached_layer_alive(mode):
    program = run_passes(open_net(), (Cache(**EVERY_OTHER, mode=mode),))
    left = layers_left(program.part("reuse"))
    assert left == layers_left(cached(mode=mode).part("reuse"))
    for batch, side in ((1, 8), (3, 16)):
        noise = torch.Generator().manual_seed(1)
        given = {
            "sample": torch.randn(batch, 4, side, side, generator=noise),
            "timestep": torch.tensor(400.0),
            "prompt": torch.randn(batch, 6, generator=noise),
        }
        expected = run_program(open_net(), given)
        assert torch.equal(run_program(program, given)[0], expected[0])
        reused = run_program(program, same_step(program, given), variant="reuse")
        assert relative_error(reused, expected) < 1e-6


@functools.cache
def open_net():
    found = capture(network("hand"), inputs_of("hand"), timesteps=TIMES, dynamic=OPEN)
    return run_passes(found, PASSES)


def test_open_batch_of_a_field_network():
    found = capture(
        network("unet2d"), inputs_of("unet2d"), timesteps=TIMES, dynamic={"batch": (1, 4)}
    )
    program = run_passes(found, (*PASSES, Cache()))
    assert layers_left(program.part("reuse")) == layers_left(cached("unet2d").part("reuse"))


# ---- plans ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["uniform", tuple(range(6))])
def test_a_full_step_each_time_changes_nothing(schedule):
    options = {"schedule": schedule} if schedule != "uniform" else {"interval": 1}
    program = cached(**options)
    assert text(program) == text(plain("hand"))
    assert program.plan == plain("hand").plan
    assert program.records[-1].notes == ("every step is full: nothing is reused",)
    assert program.records[-1].rewrites == {}


PLAN = """\
step   0 t=999: full  fills cached_silu_3
step   1 t=800: full  fills cached_silu_3
step   2 t=600: reuse  reads cached_silu_3 of steps 1, 0
step   3 t=400: reuse  reads cached_silu_3 of steps 1, 0
step   4 t=200: full  fills cached_silu_3
step   5 t=1: reuse  reads cached_silu_3 of steps 4, 1"""


def test_the_plan_as_text():
    program = cached(interval=3, warmup=2, order=1)
    lines = program.plan.lines(program.timesteps)
    assert "\n".join(lines) == PLAN
    (note,) = program.records[-1].notes
    assert note.startswith("3 of 6 steps in full; the others leave out ")
    assert "long skip 0" in note


def keys_of(program):
    return tuple(n for n, step in enumerate(program.plan.steps) if step.variant == "full")


@pytest.mark.parametrize(
    ("options", "keys"),
    [
        ({"interval": 4, "warmup": 2}, (0, 1, 5)),
        ({"interval": 3, "warmup": 1}, (0, 3)),
        ({"interval": 9, "warmup": 9}, (0, 1, 2, 3, 4, 5)),
        ({"schedule": "propagation"}, propagation_keys(6)),
        ({"schedule": "nonuniform", "interval": 2, "center": 2}, nonuniform(6, 3, 2)),
        ({"schedule": (0, 4)}, (0, 4)),
        ({"schedule": [3]}, (0, 3)),
    ],
)
def test_schedules_by_rule(options, keys):
    program = cached(**options)
    if len(keys) == 6:
        assert not program.plan.steps
    else:
        assert keys_of(program) == keys


@pytest.mark.parametrize("order", [0, 1, 2])
def test_only_what_is_read_later_is_filled(order):
    program = cached(schedule=(0, 1, 2, 5), order=order)
    filling = [n for n, step in enumerate(program.plan.steps) if step.fills]
    assert filling == [2 - age for age in range(order, -1, -1)]
    assert program.plan.slots[0].depth == order + 1
    assert (FORECAST_INPUT in program.part("reuse").inputs) == (order > 0)


def test_a_short_history_forecasts_by_what_there_is():
    program = cached(schedule=(0, 2, 4), order=2)
    assert [step.sources for step in program.plan.steps] == [(), (0,), (), (2, 0), (), (4, 2, 0)]
    assert [step.weights for step in program.plan.steps if step.sources] == [
        (1.0, 0.0, 0.0), (1.5, -0.5, 0.0), (1.875, -1.25, 0.375)
    ]  # fmt: skip


def test_the_plan_survives_json():
    program = cached(mode="unit", order=1)
    assert spec_from_json(to_json(program.spec())) == program.spec()


# ---- forecasts -----------------------------------------------------------------------------------


class Polynomial(nn.Module):
    """cat(deep, skip), where deep is a polynomial of the latent, and the latent is the step."""

    def __init__(self, degree):
        super().__init__()
        torch.manual_seed(0)
        self.deep, self.degree = nn.Linear(4, 4), degree

    def forward(self, sample, timestep):
        skip = sample + 0.25
        found = skip
        for _ in range(1, self.degree):
            found = found * skip
        return torch.cat([self.deep(found), skip], dim=-1) * timestep.cos()


def polynomial(degree, dtype=torch.float64, times=range(8), **options):
    net = Polynomial(degree).to(dtype).eval()
    given = {"sample": torch.zeros(1, 4, dtype=dtype), "timestep": torch.tensor(0.0, dtype=dtype)}
    times = tuple(float(time) for time in times)
    program = run_passes(capture(net, given, timesteps=times), (*PASSES, Cache(**options)))
    return net, program


def along(net, program):
    """Relative errors of the session, step by step, the latent linear in the timestep."""
    run, errors = session(program), []
    direction = torch.tensor([[1.0, -2.0, 0.5, 3.0]], dtype=torch.float64)
    for step in program.timesteps:
        given = {"sample": (1 + step) * direction, "timestep": torch.tensor(step)}
        given = {key: value.to(torch.float64) for key, value in given.items()}
        with torch.no_grad():
            errors.append(relative_error((run(**given),), (net(**given),)))
    assert run.steps["reuse"] == sum(step.variant == "reuse" for step in program.plan.steps)
    return errors


@pytest.mark.parametrize(("degree", "order"), [(1, 1), (1, 2), (2, 2)])
def test_a_forecast_is_exact_for_polynomials_of_its_degree(degree, order):
    net, program = polynomial(degree, order=order, interval=2, warmup=3)
    assert keys_of(program) == (0, 1, 2, 4, 6)
    assert max(along(net, program)) < 1e-6  # the weights are float32


UNEVEN = (0, 1, 3, 4, 6, 7, 10, 11)


def test_a_forecast_in_the_samplers_time_is_exact_where_steps_are_uneven():
    options = {"order": 1, "interval": 2, "warmup": 2, "times": UNEVEN}
    assert max(along(*polynomial(1, clock="timestep", **options))) < 1e-6
    assert max(along(*polynomial(1, clock="step", **options))) > 1e-3


@pytest.mark.parametrize(("degree", "order"), [(1, 0), (2, 1)])
def test_a_forecast_is_off_for_higher_degrees(degree, order):
    net, program = polynomial(degree, order=order, interval=2, warmup=3)
    errors = along(net, program)
    assert all(errors[step] == 0 for step in keys_of(program))
    assert min(errors[step] for step in (3, 5, 7)) > 1e-3


def test_bfloat16_values_are_forecast_in_float32():
    _, program = polynomial(1, torch.bfloat16, order=1)
    (slot,) = program.plan.slots
    assert slot.dtype == "bfloat16"
    graph = program.part("reuse").graph
    kinds = [node.meta["val"].dtype for node in calls(graph, torch.ops.aten.mul.Tensor)]
    assert kinds == [torch.float32, torch.float32, torch.bfloat16]


@pytest.mark.parametrize("mode", ["deep", "residual", "unit"])
def test_float16(mode):
    given = unet_inputs()
    given |= {name: given[name].half() for name in ("sample", "prompt")}
    found = capture(UNet().eval().half(), given, timesteps=TIMES)
    program = run_passes(found, (*PASSES, Cache(order=1, warmup=2, mode=mode)))
    assert {slot.dtype for slot in program.plan.slots} == {"float16"}
    for value in steps_of(program):
        assert value.dtype == torch.float16 and value.isfinite().all()


def steps_of(program):
    """The outputs along a trajectory from noise."""
    run = session(program)
    return [run(**given) for given in trajectory(program, seed=3)]


def _drive(program, watch, feed):
    drive(program, feed, watch)


def fitted(name="hand", run=None, **options):
    each = Cache(**EVERY_OTHER | options)
    return run_passes(plain(name), (each,), drive=functools.partial(_drive, feed=run))


def features_error(program):
    """Mean squared distance to the uncached outputs, along calibration's own trajectory."""
    run, full = session(program), session(plain("hand"))
    pairs = [(run(**given), full(**given)) for given in trajectory(program, seed=0)]
    return float(sum((one - other).square().sum() for one, other in pairs))


def test_a_fitted_schedule_has_as_many_full_steps_as_uniforms_and_is_no_worse():
    program, rule = fitted(schedule="fitted", warmup=1), cached(warmup=1)
    assert len(keys_of(program)) == len(keys_of(rule)) == 3
    assert len(keys_of(fitted(schedule="fitted", full_steps=2))) == 2
    assert fitted(schedule="fitted", error=0.0).plan.steps == ()
    assert keys_of(fitted(schedule="fitted", error=1e6)) == (0,)


def test_fitted_forecasts_beat_the_last_value_on_the_calibrations_features():
    held, fit = cached(interval=3), fitted(interval=3, forecast="fitted")
    assert held.plan.steps[1].weights == ()
    weights = [step.weights for step in fit.plan.steps if step.sources]
    assert all(len(each) in (0, 1) for each in weights)
    fit = fitted(interval=3, forecast="fitted", order=1, warmup=2)
    polynomial = cached(interval=3, order=1, warmup=2)
    assert features_error(fit) < features_error(polynomial)


def test_fitted_needs_calibration_over_the_whole_schedule():
    with pytest.raises(
        PassError, match="a fitted schedule, forecast or correction needs calibration"
    ):
        cached(schedule="fitted")
    first = next(iter(trajectory(plain("hand"), seed=0)))
    with pytest.raises(CalibrationError, match="calibration never ran step 1 of 6"):
        fitted(schedule="fitted", run=[first])


def test_features_of_zeros_fit():
    """adaLN-zero: a network before training adds nothing."""

    class Zero(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)
            nn.init.zeros_(self.layer.weight), nn.init.zeros_(self.layer.bias)

        def forward(self, sample, timestep):
            return sample + self.layer(sample)

    given = {"sample": torch.randn(2, 4), "timestep": torch.tensor(999.0)}
    found = run_passes(capture(Zero().eval(), given, timesteps=TIMES), PASSES)
    each = Cache(mode="layer", forecast="fitted", order=1, warmup=2, interval=3)
    program = run_passes(found, (each,), drive=functools.partial(_drive, feed=None))
    assert np.isfinite([weight for step in program.plan.steps for weight in step.weights]).all()


# ---- what a person names -------------------------------------------------------------------------


def test_modules_by_path_and_pattern():
    program = cached(at=("middle",))
    assert [slot.name for slot in program.plan.slots] == ["cached_conv2d_4"]
    assert layers_left(program.part("full")) - layers_left(program.part("reuse")) == {"middle"}
    program = cached("dit", at=("transformer_blocks.*.ff",))
    assert len(program.plan.slots) == 3
    program = cached("unet2d", at=("mid_block*",))  # all of it, of which only the last is read
    assert len(program.plan.slots) == 1


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("midle", "at='midle' names no module.*did you mean 'middle'"),
        ("up.9", "at='up.9' names no module"),
        ("nothing.*", "names no module"),
    ],
)
def test_unknown_modules(path, message):
    with pytest.raises(PassError, match=message):
        cached(at=(path,))


def test_a_module_below_the_latents_rate_is_refused():
    found = run_passes(capture(network("hand"), inputs_of("hand"), timesteps=TIMES), PASSES[:1])
    with pytest.raises(PassError, match="at='time' gives nothing that changes with the latent"):
        run_passes(found, (Cache(at=("time",)),))


def test_include_and_exclude_choose_places():
    for options, left in (
        ({"include": ("*.attn1.*",)}, 3),
        ({"exclude": ("*.attn1.*",)}, 3),
        ({"include": ("transformer_blocks.[01].*",), "exclude": ("*.ff.*",)}, 2),
    ):
        assert len(cached("dit", mode="unit", **options).plan.slots) == left
    with pytest.raises(PassError, match="include and exclude leave none of transformer"):
        cached("dit", mode="unit", include=("nothing",))


# ---- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"interval": 0}, "interval=0: expected a whole number, at least 1"),
        ({"interval": 2.5}, "interval=2.5: expected a whole number"),
        ({"interval": True}, "interval=True: expected a whole number"),
        ({"order": 3}, "order=3: expected a whole number, at least 0 and at most 2"),
        ({"order": -1}, "order=-1: expected"),
        ({"warmup": 0}, "warmup=0: expected"),
        ({"branch": -1}, "branch=-1: expected"),
        ({"mode": "deeper"}, "mode='deeper' is unknown.*did you mean 'deep'"),
        ({"schedule": "unifrom"}, "schedule='unifrom' is unknown.*did you mean 'uniform'"),
        ({"schedule": 3}, "schedule=3: expected a sequence of full steps"),
        ({"forecast": "fited"}, "forecast='fited' is unknown.*'fitted'"),
        ({"at": "middle"}, "at='middle': expected a sequence of module paths"),
        ({"full_steps": 0, "schedule": "fitted"}, "full_steps=0: expected"),
        ({"full_steps": 3}, 'full_steps and error belong to schedule="fitted"'),
        ({"error": 0.1}, 'full_steps and error belong to schedule="fitted"'),
        ({"include": ("a",)}, "include and exclude choose among the places of mode unit"),
        ({"mode": "unit", "at": ("a",), "exclude": ("a",)}, "include and exclude choose"),
        ({"schedule": (0, 6)}, "keys=6: expected a whole number from 0 to 5"),
        ({"schedule": (0, -1)}, "keys=-1: expected"),
        ({"schedule": (1, 1)}, "expected each step once"),
        ({"schedule": "nonuniform", "center": 99}, "center=99: expected"),
        ({"branch": 3}, "branch=3: this network has 3 long skips, 0 .* to 2"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(EffuseError, match=message):
        cached(**options)


def test_options_are_checked_before_anything_runs():
    with pytest.raises(ConfigError):
        Cache(interval=0)
    with pytest.raises(ConfigError, match="error=-1"):
        Cache(schedule="fitted", error=-1.0)


def test_a_network_without_a_schedule_is_refused():
    found = run_passes(capture(network("hand"), inputs_of("hand")), PASSES)
    with pytest.raises(PassError, match="cache: the steps have to be known: compile with schedule"):
        run_passes(found, (Cache(),))


@pytest.mark.parametrize("name", ["hand", "dit", "flux"])
def test_auto_is_deep_where_there_are_long_skips_and_block_elsewhere(name):
    mode = "deep" if name in UNETS else "block"
    assert text(cached(name)) == text(cached(name, mode=mode))


def test_a_mode_without_places_names_the_others():
    with pytest.raises(PassError) as caught:
        cached("dit", mode="deep")
    assert "mode='deep' finds nothing to cache" in str(caught.value)
    for word in ("'unit' (6)", "'layer' (6)", "'block' (3)", "'residual' (1)", "at=(…)"):
        assert word in str(caught.value)
    module = nn.Module()
    module.forward = lambda sample, timestep: sample * timestep
    given = {"sample": torch.randn(1, 4), "timestep": torch.tensor(999.0)}
    found = run_passes(capture(module.eval(), given, timesteps=TIMES), PASSES)
    with pytest.raises(PassError, match="no mode finds a place in it"):
        run_passes(found, (Cache(),))


def test_a_second_cache_is_refused():
    with pytest.raises(PassError, match="cache: the plan has a cache already"):
        run_passes(cached(), (Cache(),))


def test_without_fuel_nothing_changes():
    program = run_passes(plain("hand"), (Cache(),), fuel=0)
    assert text(program) == text(plain("hand"))


def test_the_given_program_is_left_alone():
    before = text(plain("hand"))
    cached(mode="block")
    assert text(plain("hand")) == before


# ---- sessions and artifacts ----------------------------------------------------------------------


def latents(steps=6, batch=2):
    """A trajectory's inputs: noise that shrinks towards a picture."""
    noise, picture = unet_inputs(batch)["sample"], unet_inputs(batch, seed=1)["sample"]
    for step, time in enumerate(TIMES[:steps]):
        share = step / len(TIMES)
        sample = (1 - share) * noise + share * picture
        yield unet_inputs(batch) | {"sample": sample, "timestep": torch.tensor(time)}


def compiled(backend, **options):
    config = effuse.Config(passes=(Hoist(), Cache(**options)), backend=backend)
    return effuse.compile(
        network("hand"), config, inputs=unet_inputs(), schedule=list(TIMES), progress=False
    )


ARTIFACTS = [
    {"interval": 2, "order": 0, "mode": "encoder"},
    {"interval": 3, "order": 2, "mode": "residual", "warmup": 3},
]


@pytest.mark.parametrize("options", ARTIFACTS, ids=["encoder", "residual"])
def test_artifacts_of_both_back_ends_give_the_same_pictures(options, tmp_path):
    oracle = None
    for backend in ("reference", "onnx"):
        made = compiled(backend, **options)
        loaded = effuse.load(made.save(tmp_path / backend))
        assert loaded.plan == made.plan and "reuse" in made.plan
        made.session.steps.clear()  # of the build's own checks
        outputs = [made(**given) for given in latents()]
        again = [loaded(**given) for given in latents()]
        assert all(map(torch.equal, outputs, again))
        assert loaded.session.steps == made.session.steps
        assert loaded.session.steps["reuse"] == made.plan.count(": reuse")
        for one, other in zip(outputs, oracle or outputs, strict=True):
            assert relative_error((one,), (other,)) < 1e-4
        oracle = outputs
    assert "order" in made.manifest["config"]["passes"][1]


def test_a_session_computes_in_full_when_the_batch_changes():
    program = cached()
    run, full = session(program), session(plain("hand"))
    first, second = list(latents(2)), list(latents(2, batch=1))
    open_run, open_full = session(open_cached()), session(open_net())
    for given in (first[0], second[1], first[1]):
        open_run(**given)
    assert open_run.steps == {"full": 2, "reuse": 1}
    open_run.reset()
    open_run(**first[0])
    assert torch.equal(open_run(**second[1]), open_full(**second[1]))
    run(**first[0])
    assert not torch.equal(run(**first[1]), full(**first[1]))
    assert run.steps == {"full": 1, "reuse": 1}


@functools.cache
def open_cached():
    return run_passes(open_net(), (Cache(**EVERY_OTHER),))


def test_a_restart_computes_in_full():
    run, full = session(cached()), session(plain("hand"))
    given = list(latents())
    for start in (3, 1):  # steps that would read what was never filled
        assert torch.equal(run(**given[start]), full(**given[start]))
    assert run.steps == {"full": 2}


def test_the_record_holds_the_options():
    record = cached(mode="unit", exclude=("up*",)).records[-1]
    assert record.name == "cache" and not record.exact
    assert record.options | {"mode": "unit", "exclude": ["up*"]} == record.options
    assert set(record.options) == {field.name for field in dataclasses.fields(Cache)}
