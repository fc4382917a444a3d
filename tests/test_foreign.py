"""Networks that come wrapped, compiled, hooked, parametrized, or with LoRA layers attached."""

from __future__ import annotations

import logging
from collections.abc import Callable

import diffusers
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

from effuse.backends.reference import session
from effuse.build import capture_program, timesteps_of
from effuse.capture import capture
from effuse.capture_unwrap import parameter_names, unwrapped
from effuse.config import Config
from effuse.errors import CaptureError
from effuse.graph import calls
from effuse.pass_manager import run_passes
from effuse.passes import Cache, Canonicalize, Hoist
from effuse.program import Program, run_program

logging.getLogger("torch.__trace").disabled = True

aten = torch.ops.aten
NAMES = {f"{layer}.{kind}" for layer in ("first", "time", "mid", "last")
         for kind in ("weight", "bias")}  # fmt: skip


class Net(nn.Module):
    """A convolution, a time shift, a linear layer and a convolution."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.time = nn.Conv2d(4, 8, 3, padding=1), nn.Linear(1, 8)
        self.mid, self.last = nn.Linear(8, 8), nn.Conv2d(8, 4, 3, padding=1)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        h = self.first(x) + self.time(t[:, None])[:, :, None, None]
        h = self.mid(F.silu(h).permute(0, 2, 3, 1))
        return self.last(h.permute(0, 3, 1, 2))


class Passing(nn.Module):
    """As DistributedDataParallel and its like do."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: torch.Tensor, **kwargs: torch.Tensor) -> torch.Tensor:
        return self.module(*args, **kwargs)


class Doubling(Passing):
    """Looks like a wrapper, and computes."""

    def forward(self, *args: torch.Tensor, **kwargs: torch.Tensor) -> torch.Tensor:
        return self.module(*args, **kwargs) * 2


class Holding(Passing):
    """A wrapper of a wrapper that calls past the inner one."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(Passing(module))

    def forward(self, *args: torch.Tensor, **kwargs: torch.Tensor) -> torch.Tensor:
        return self.module.module(*args, **kwargs)


class Named(nn.Module):
    """Hands its own arguments on, in another order, by name."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return self.net(t=t, x=x)


class Other(Named):
    """Under other names than the network's."""

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return self.net(sample, timestep)


class Swapped(Named):
    """The same names, in another order."""

    def forward(self, t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return self.net(x, t)


class Defaulting(Named):
    """Fills in what is not given."""

    def forward(self, x: torch.Tensor, t: torch.Tensor | None = None) -> torch.Tensor:
        return self.net(x, x.new_full((len(x),), 5.0) if t is None else t)


class Casting(Passing):
    """Computes with other numbers inside than outside."""

    def forward(self, *args: torch.Tensor, **kwargs: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self.module(*args, **kwargs)


class Positional(Net):
    """Takes its arguments by position only."""

    def forward(  # type: ignore[override]
        self, x: torch.Tensor, t: torch.Tensor, scale: float = 2.0, /, more: float = 0.0
    ) -> torch.Tensor:
        return super().forward(x, t) * scale + more


class Branch(nn.Module):
    """A linear layer with a LoRA beside it, as it is attached, switched off, or merged."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.active = base, True
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.up(self.down(x)) * 0.5 if self.active else self.base(x)

    def merge(self) -> None:
        self.base.weight.data += self.up.weight.data @ self.down.weight.data * 0.5
        self.active = False


def inputs() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {"x": torch.randn(2, 4, 8, 8, generator=generator), "t": torch.full((2,), 5.0)}


def net() -> Net:
    # without gradients: eager's linear without a bias rounds otherwise where its weight has one
    return Net().eval().requires_grad_(False)


def same(program: Program, model: nn.Module) -> None:
    """The rewritten program gives eager's numbers to the bit."""
    result = run_passes(program, (Canonicalize(), Hoist()))
    with torch.no_grad():
        assert torch.equal(run_program(result, program.examples)[0], model(**inputs()))


@pytest.mark.parametrize(
    "wrap", [nn.DataParallel, Passing, Holding, torch.compile, lambda m: Passing(torch.compile(m)),
             Named, lambda m: Named(torch.compile(Named(m)))]
)  # fmt: skip
def test_a_wrapper_is_seen_through(wrap: Callable[[nn.Module], nn.Module]) -> None:
    model = net()
    program = capture(wrap(model).eval(), inputs())
    assert set(program.weights) == NAMES and program.parameters == ("x", "t")
    assert program.model["class"] == "Net"
    same(program, model)


@pytest.mark.parametrize("wrap", [Other, Swapped, Defaulting])
def test_a_wrapper_that_changes_a_call_is_a_part_of_the_network(wrap: type[nn.Module]) -> None:
    model = wrap(net()).eval()
    assert unwrapped(model) is model
    names = {"x": "sample", "t": "timestep"} if wrap is Other else {}
    given = {names.get(name, name): value for name, value in inputs().items()}
    if wrap is Defaulting:
        del given["t"]
    program = capture(model, given)
    assert set(program.weights) >= {f"net.{name}" for name in NAMES}
    with torch.no_grad():
        assert torch.equal(run_program(program, program.examples)[0], model(**given))


def test_a_wrapper_that_switches_autocast_on_is_refused() -> None:
    with pytest.raises(CaptureError, match=r"autocast to torch\.bfloat16"):
        capture(Casting(net()).eval(), inputs())


@pytest.mark.parametrize("more", [{}, {"scale": 3.0}, {"more": 1.0}])
def test_arguments_by_position_only(more: dict[str, float]) -> None:
    model = Positional().eval().requires_grad_(False)
    program = capture(model, {**inputs(), **more})
    assert program.parameters == ("x", "t", "scale", "more") and "forward" not in vars(model)
    found = session(run_passes(program, (Canonicalize(), Hoist())))(*inputs().values(), **more)
    given = (*inputs().values(), more.get("scale", 2.0))
    assert torch.equal(found, model(*given, more=more.get("more", 0.0)))


def test_example_inputs_of_arguments_by_position_only() -> None:
    class Short(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv2d(4, 4, 1)

        def forward(self, sample: torch.Tensor, timestep: torch.Tensor, /) -> torch.Tensor:
            return self.layer(sample) + timestep.reshape(-1, 1, 1, 1)

    program = capture_program(Short().eval(), None, None, Config(passes=()))
    assert program.parameters == ("sample", "timestep")


def test_what_computes_or_has_hooks_is_no_mere_wrapper() -> None:
    doubling, hooked = Doubling(net()).eval(), Passing(net()).eval()
    hooked.register_forward_hook(lambda module, args, result: result + 1)
    for model in (doubling, hooked):
        assert unwrapped(model) is model
        same(capture(model, inputs()), model)
    assert isinstance(doubling.module, Net)  # it was tried with another child


def test_compiled_layers_keep_their_own_names_and_stay_compiled() -> None:
    model = net()
    plain = model.mid
    model.mid = torch.compile(model.mid)  # type: ignore[assignment]
    model.last.compile()
    program = capture(model, inputs())
    assert set(program.weights) == NAMES == parameter_names(model)
    assert model.mid is not plain
    same(program, net())


def test_hooks_are_a_part_of_the_network() -> None:
    model = net()
    model.mid.register_forward_hook(lambda module, args, result: result * 2)
    model.register_forward_pre_hook(
        lambda module, args, kwargs: (args, {**kwargs, "x": kwargs["x"] + 1}), with_kwargs=True
    )
    same(capture(model, inputs()), model)


@pytest.mark.parametrize("norm", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_a_parametrized_weight_is_a_constant_of_the_rewritten_program(
    norm: Callable[[nn.Module], nn.Module],
) -> None:
    model = net()
    norm(model.mid), norm(model.first)
    model.eval()
    program = capture(model, inputs())
    same(program, model)
    for part in run_passes(program, (Canonicalize(), Hoist())).parts:
        layers = calls(part.graph, aten.linear.default, aten.conv2d.default)
        assert all(layer.args[1].op == "get_attr" for layer in layers)


@pytest.mark.parametrize(("how", "linears"), [("active", 4), ("off", 2), ("merged", 2)])
def test_lora_layers_are_the_arithmetic_that_they_are(how: str, linears: int) -> None:
    model = net()
    model.mid = Branch(model.mid).eval().requires_grad_(False)  # type: ignore[assignment]
    model.mid.active = how == "active"
    if how == "merged":
        model.mid.merge()
    program = capture(model, inputs())
    assert len(calls(program.parts[0].graph, aten.linear.default)) == linears
    same(program, model)


@pytest.mark.parametrize("wrapped", [False, True])
def test_peft_layers(wrapped: bool) -> None:
    peft = pytest.importorskip("peft", reason="LoRA layers of the package peft: not installed")
    config = peft.LoraConfig(r=2, target_modules=["mid", "first"], init_lora_weights=False)
    attach = peft.get_peft_model if wrapped else lambda m, c: peft.inject_adapter_in_model(c, m)
    model = attach(net(), config).eval().requires_grad_(False)
    program = capture(model, inputs())
    assert program.parameters == ("x", "t") and program.model["class"] == "Net"
    same(program, model)


def test_an_exported_network_needs_no_eval() -> None:
    model = torch.export.export(net(), (), inputs()).module()
    same(capture(model, inputs()), net())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (torch.jit.script, "scripted or traced from"),
        (lambda model: lambda x: model(x), "expected a torch.nn.Module, got function"),
        (lambda model: torch.ao.quantization.quantize_dynamic(model, {nn.Linear}),
         "'time' is quantized already"),
    ],
)  # fmt: skip
def test_what_cannot_be_captured_says_the_way_out(change: Callable, reason: str) -> None:
    with pytest.raises(CaptureError, match=reason):
        capture(change(net()), inputs())


def test_a_packed_weight_is_told_from_an_integer_one() -> None:
    model = net()
    model.mid.weight.quant_state = object()  # as 4-bit layers of libraries mark theirs
    with pytest.raises(CaptureError, match="'mid' is quantized already"):
        capture(model, inputs())


class Level(nn.Module):
    """A deep layer between two shallow ones, with a skip."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.time = nn.Conv2d(4, 8, 3, padding=1), nn.Linear(1, 8)
        self.deep, self.last = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(16, 4, 3, padding=1)

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        h = self.first(sample) + self.time(timestep.reshape(1, 1) / 1000)[:, :, None, None]
        return self.last(torch.cat([self.deep(F.silu(h)), h], dim=1))


def test_second_order_steps_call_one_step_twice() -> None:
    """Heun's sampler evaluates all timesteps but the first twice: the plan goes by the timestep."""
    scheduler = diffusers.HeunDiscreteScheduler()
    scheduler.set_timesteps(6)
    times = timesteps_of(scheduler)
    assert len(scheduler.timesteps) == 11 and len(times) == 6
    model = Level().eval().requires_grad_(False)
    example = {"sample": torch.randn(1, 4, 8, 8), "timestep": times[3]}
    program = capture(model, example, timesteps=tuple(times.tolist()))
    exact = session(run_passes(program, (Canonicalize(), Hoist())))
    cached = session(
        run_passes(program, (Canonicalize(), Hoist(), Cache(at=("deep",), interval=2, warmup=1)))
    )
    latent = torch.randn(1, 4, 8, 8) * scheduler.init_noise_sigma
    for time in scheduler.timesteps:
        given = scheduler.scale_model_input(latent, time)
        assert torch.equal(exact(given, time), model(given, time))
        found = cached(given, time)
        if cached.steps["reuse"] == 0:
            assert torch.equal(found, model(given, time))
        latent = scheduler.step(found, time, latent).prev_sample
    planned = [step.variant for step in cached.spec.plan.steps]
    assert planned == ["full", "reuse"] * 3
    assert cached.steps == {"full": 1 + 2 * 2, "reuse": 2 * 3}
