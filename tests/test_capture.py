"""Capture, roles, Canonicalize and Hoist on the field's networks, built tiny, against eager."""

from __future__ import annotations

import functools
import gc
import logging
import math
import runpy
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils import _pytree as pytree

from effuse.backends.reference import session
from effuse.capture import capture
from effuse.capture_checks import explain
from effuse.errors import CaptureError, ConfigError, InputError
from effuse.examples import derive_inputs
from effuse.pass_manager import run_passes
from effuse.passes import Canonicalize, Hoist
from effuse.program import Program, run_program
from effuse.verify import relative_error

# pytest's log capture makes torch.export write its trace of every symbol, at ten times the time.
logging.getLogger("torch.__trace").disabled = True

PASSES = (Canonicalize(), Hoist())
OPEN = {"batch": (1, 4), "height": (8, 64), "width": (8, 64)}
LEVELS: dict[str, Any] = {"block_out_channels": (8, 16), "norm_num_groups": 4}
LEVELS |= {"layers_per_block": 1, "sample_size": 8}
HEADS = {"num_attention_heads": 2, "attention_head_dim": 8}


def features(t: torch.Tensor, width: int) -> torch.Tensor:
    rates = torch.exp(torch.arange(width // 2) * (-math.log(1e4) / (width // 2)))
    angles = t.float()[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


class HandUNet(nn.Module):
    """One level down and up, with a skip concat and a time shift."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.time = nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 8))
        self.down = nn.Conv2d(8, 8, 3, stride=2, padding=1)
        self.norm = nn.GroupNorm(2, 8)
        self.last = nn.Conv2d(16, 3, 3, padding=1)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        skip = self.first(x)
        h = self.down(skip) + self.time(features(t, 8))[:, :, None, None]
        h = F.interpolate(F.silu(self.norm(h)), scale_factor=2.0)
        return self.last(torch.cat([h, skip], dim=1))


class HandDiT(nn.Module):
    """Patches, one adaLN block conditioned on timestep and class, and a modulated head."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(4, 16, 2, stride=2)
        self.time, self.label = nn.Linear(16, 16), nn.Embedding(10, 16)
        self.norm = nn.LayerNorm(16, elementwise_affine=False)
        self.modulate = nn.Linear(16, 96)
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.mlp = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
        self.head = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        batch, _, height, width = x.shape
        h = self.patch(x).flatten(2).transpose(1, 2)
        c = self.time(features(t, 16)) + self.label(y)
        parts = self.modulate(F.silu(c))[:, None].chunk(6, dim=-1)
        q, k, v = self.qkv(self.norm(h) * (1 + parts[0]) + parts[1]).chunk(3, dim=-1)
        split = (batch, -1, 2, 8)
        q, k, v = (each.view(split).transpose(1, 2) for each in (q, k, v))
        found = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(h.shape)
        h = h + parts[2] * self.out(found)
        h = h + parts[5] * self.mlp(self.norm(h) * (1 + parts[3]) + parts[4])
        h = self.head(h).view(batch, height // 2, width // 2, 4, 2, 2)
        return h.permute(0, 3, 1, 4, 2, 5).reshape(x.shape)


def unet2d(**settings: Any) -> nn.Module:
    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D")}
    blocks |= {"up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    return diffusers.UNet2DModel(attention_head_dim=4, **LEVELS, **blocks, **settings)


def conditional(**settings: Any) -> nn.Module:
    blocks = {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D")}
    blocks |= {"up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D")}
    settings = {"attention_head_dim": 2, "cross_attention_dim": 12} | settings
    return diffusers.UNet2DConditionModel(**LEVELS, **blocks, **settings)


def sdxl() -> nn.Module:
    return conditional(
        use_linear_projection=True,
        transformer_layers_per_block=(1, 2),
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=10 + 6 * 8,
    )


def dit() -> nn.Module:
    sizes = {"in_channels": 4, "out_channels": 8, "num_layers": 2, "sample_size": 8}
    return diffusers.DiTTransformer2DModel(num_embeds_ada_norm=10, **HEADS, **sizes)


def pixart(**settings: Any) -> nn.Module:
    heads = {"num_attention_heads": 2, "attention_head_dim": 6, "cross_attention_dim": 12}
    return diffusers.PixArtTransformer2DModel(
        num_layers=2, sample_size=8, caption_channels=10, **heads, **settings
    )


def sd3() -> nn.Module:
    widths = {"joint_attention_dim": 12, "caption_projection_dim": 16, "pooled_projection_dim": 10}
    sizes = {"sample_size": 8, "in_channels": 4, "out_channels": 4, "pos_embed_max_size": 8}
    return diffusers.SD3Transformer2DModel(num_layers=2, **HEADS, **widths, **sizes)


def flux(**settings: Any) -> nn.Module:
    widths = {"joint_attention_dim": 12, "pooled_projection_dim": 10, "in_channels": 4}
    layers = {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16}
    return diffusers.FluxTransformer2DModel(
        num_attention_heads=2, axes_dims_rope=(4, 4, 8), **layers, **widths, **settings
    )


def autoencoder() -> nn.Module:
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2}
    blocks |= {"up_block_types": ("UpDecoderBlock2D",) * 2}
    widths = {"block_out_channels": (8, 16), "norm_num_groups": 4}
    return diffusers.AutoencoderKL(**widths, **blocks).decoder


def tiny_autoencoder() -> nn.Module:
    widths = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    counts = {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)}
    return diffusers.AutoencoderTiny(**widths, **counts).decoder


T2 = {"hidden_states": "latent", "timestep": "timestep"}
TEXT = {"encoder_hidden_states": "prompt"}
MASK = {"encoder_attention_mask": "prompt"}
ADDED = "added_cond_kwargs"
NETWORKS: dict[str, tuple[Any, dict[str, str]]] = {
    "unet2d": (unet2d, {"sample": "latent", "timestep": "timestep"}),
    "unet2d-class": (
        lambda: unet2d(num_class_embeds=5),
        {"sample": "latent", "timestep": "timestep", "class_labels": "prompt"},
    ),
    "sd15": (conditional, {"sample": "latent", "timestep": "timestep", **TEXT}),
    "sdxl": (
        sdxl,
        {"sample": "latent", "timestep": "timestep", **TEXT}
        | {f"{ADDED}.text_embeds": "prompt", f"{ADDED}.time_ids": "prompt"},
    ),
    "dit": (dit, {**T2, "class_labels": "prompt"}),
    "pixart": (pixart, {**T2, **TEXT, **MASK}),
    "pixart-sizes": (
        lambda: pixart(use_additional_conditions=True),
        {**T2, **TEXT, **MASK}
        | {f"{ADDED}.resolution": "prompt", f"{ADDED}.aspect_ratio": "prompt"},
    ),
    "sd3": (sd3, {**T2, **TEXT, "pooled_projections": "prompt"}),
    "flux": (
        flux,
        {**T2, **TEXT, **dict.fromkeys(("pooled_projections", "img_ids", "txt_ids"), "prompt")},
    ),
    "flux-guidance": (
        lambda: flux(guidance_embeds=True),
        {**T2, **TEXT, "guidance": "prompt"}
        | dict.fromkeys(("pooled_projections", "img_ids", "txt_ids"), "prompt"),
    ),
    "vae": (autoencoder, {"sample": "latent"}),
    "taesd": (tiny_autoencoder, {"x": "latent"}),
    "hand-unet": (HandUNet, {"x": "latent", "t": "timestep"}),
    "hand-dit": (HandDiT, {"x": "latent", "t": "timestep", "y": "prompt"}),
}


def hand_inputs(name: str, t: torch.Tensor | None) -> dict[str, Any]:
    time = torch.tensor([500.0, 500.0]) if t is None else t.expand(2).contiguous()
    noise = torch.Generator().manual_seed(0)
    if name == "hand-unet":
        return {"x": torch.randn(2, 3, 8, 8, generator=noise), "t": time}
    return {"x": torch.randn(2, 4, 8, 8, generator=noise), "t": time, "y": torch.tensor([1, 7])}


@functools.cache
def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = NETWORKS[name][0]().eval()
    for parameter in model.parameters():  # adaLN-zero and the like would hide the blocks
        if parameter.count_nonzero() == 0:
            nn.init.normal_(parameter, std=0.1)
    return model


def inputs_of(name: str, t: torch.Tensor | None = None) -> dict[str, Any]:
    if name.startswith("hand"):
        return hand_inputs(name, t)
    return derive_inputs(build(name), timestep=t, size=8)


@functools.cache
def captured(name: str, timesteps: tuple[float, ...] | None = None) -> Program:
    first = None if timesteps is None else torch.tensor(timesteps[0])
    program = capture(build(name), inputs_of(name, first), timesteps=timesteps)
    gc.freeze()  # it stays for all tests, and a walk over its nodes would double their time
    return program


def refreshed(inputs: dict[str, Any], seed: int = 1) -> dict[str, Any]:
    """Fresh values of the same shapes; whole numbers and what is derived from them stay."""
    noise = torch.Generator().manual_seed(seed)

    def fresh(value: Any) -> Any:
        random = isinstance(value, torch.Tensor) and value.is_floating_point() and value.dim() > 1
        return torch.randn(value.shape, generator=noise) if random else value

    return pytree.tree_map(fresh, inputs)


def values_of(program: Program, inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
    found = {}
    for item in program.inputs:
        value: Any = inputs
        for key in item.path:
            value = value[key]
        found[item.name] = value
    return found


def eager(model: nn.Module, inputs: dict[str, Any]) -> list[torch.Tensor]:
    with torch.no_grad():
        return [each for each in pytree.tree_leaves(model(**inputs))]


def times_of(name: str) -> tuple[float, ...]:
    return (1.0, 0.75, 0.5) if name.startswith("flux") else (999.0, 500.0, 1.0)


@pytest.mark.parametrize("name", NETWORKS)
def test_capture_replays_eager_bit_exactly(name: str) -> None:
    program = captured(name)
    for seed in (1, 2):
        fresh = refreshed(inputs_of(name), seed)
        found = run_program(program, values_of(program, fresh))
        expected = eager(build(name), fresh)
        assert len(found) == len(expected)
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", NETWORKS)
def test_roles_and_labels(name: str) -> None:
    roles = {item.label: item.role.value for item in captured(name).inputs}
    assert roles == NETWORKS[name][1]


@pytest.mark.parametrize("scheduled", [False, True], ids=["any-timestep", "schedule"])
@pytest.mark.parametrize("name", NETWORKS)
def test_canonicalize_and_hoist_keep_the_numbers(name: str, scheduled: bool) -> None:
    timed = scheduled and "timestep" in NETWORKS[name][1].values()
    times = times_of(name) if timed else None
    program = run_passes(captured(name, times), PASSES)
    parts = {part.name for part in program.parts}
    assert ("schedule" in parts) == ("timestep" in NETWORKS[name][1].values() and not timed)
    run = session(program)
    for index, time in enumerate(times or (3.0,)):
        inputs = refreshed(inputs_of(name, torch.tensor(time)), seed=index)
        found = pytree.tree_leaves(run(**inputs))
        assert relative_error(found, eager(build(name), inputs)) < 1e-5


@pytest.mark.parametrize("name", [name for name, (_, roles) in NETWORKS.items() if len(roles) > 1])
def test_hoisting_moves_all_that_the_latent_does_not_reach(name: str) -> None:
    program = run_passes(captured(name), PASSES)
    step = program.variants[0]
    latents = {item.name for item in program.inputs if item.role.value == "latent"}
    inputs = {item.name for item in program.inputs}
    assert set(step.inputs) & inputs == latents


def open_inputs(name: str, batch: int, height: int, width: int, time: float) -> dict[str, Any]:
    noise = torch.Generator().manual_seed(batch)
    if name == "hand-unet":
        x = torch.randn(batch, 3, height, width, generator=noise)
        return {"x": x, "t": torch.full((batch,), time)}
    return {
        "sample": torch.randn(batch, 4, height, width, generator=noise),
        "timestep": torch.tensor(time),
        "encoder_hidden_states": torch.randn(batch, 5, 12, generator=noise),
        "return_dict": False,
    }


SIZES = ((2, 16, 16), (1, 8, 8), (3, 24, 16), (4, 8, 32))


@pytest.mark.parametrize("name", ["hand-unet", "sd15"])
def test_open_sizes_are_captured_once(name: str) -> None:
    program = capture(build(name), open_inputs(name, 2, 16, 16, 5.0), dynamic=OPEN)
    assert program.inputs[0].shape[0] == "batch"
    assert program.inputs[0].shape[2:] == ("height", "width")
    for batch, height, width in SIZES:
        inputs = open_inputs(name, batch, height, width, 5.0)
        found = run_program(program, values_of(program, inputs))
        assert torch.equal(found[0], eager(build(name), inputs)[0])


@pytest.mark.parametrize("name", ["hand-unet", "sd15"])
def test_tables_do_not_depend_on_the_open_sizes(name: str) -> None:
    times = (999.0, 500.0, 1.0)
    example = open_inputs(name, 2, 16, 16, times[0])
    program = run_passes(
        capture(build(name), example, dynamic=OPEN, timesteps=times), (*PASSES, Canonicalize())
    )
    assert "schedule" not in {part.name for part in program.parts}
    run = session(program)
    for time in times:
        for batch, height, width in SIZES:
            inputs = open_inputs(name, batch, height, width, time)
            found = pytree.tree_leaves(run(**inputs))
            assert relative_error(found, eager(build(name), inputs)) < 1e-5


def test_tables_where_the_batch_moves_the_rounding() -> None:
    class Timed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.time = nn.Sequential(nn.Linear(320, 1280), nn.SiLU(), nn.Linear(1280, 640))

        def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return x * self.time(features(t, 320))

    model, times = Timed().eval(), (999.0, 500.0)
    example = {"x": torch.randn(3, 640), "t": torch.full((3,), times[0])}
    dynamic = {"batch": (1, 8)}
    program = capture(model, example, dynamic=dynamic, timesteps=times)
    program = run_passes(program, PASSES)
    assert [part.name for part in program.parts] == ["full"]
    inputs = {"x": torch.randn(5, 640), "t": torch.full((5,), times[1])}
    assert relative_error([session(program)(**inputs)], eager(model, inputs)) < 1e-5


def test_the_prompt_program_of_open_sizes_runs_once_a_picture() -> None:
    times = (999.0, 500.0, 1.0)
    example = open_inputs("sd15", 2, 16, 16, times[0])
    program = capture(build("sd15"), example, dynamic=OPEN, timesteps=times)
    run = session(run_passes(program, PASSES))
    for time in times:
        inputs = refreshed(example, seed=int(time)) | {"timestep": torch.tensor(time)}
        run(**inputs | {"encoder_hidden_states": example["encoder_hidden_states"]})
    assert set(run.runs.values()) == {1}


class Sum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, prompt: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return self.layer(x) + 2 * prompt - t


def sum_inputs() -> dict[str, Any]:
    return {"x": torch.ones(2, 4), "prompt": torch.zeros(2, 4), "t": torch.tensor(3.0)}


def test_inputs_in_any_order() -> None:
    inputs = dict(reversed(sum_inputs().items()))
    model = Sum().eval()
    program = capture(model, inputs)
    assert {item.label: item.role.value for item in program.inputs} == {
        "x": "latent",
        "prompt": "prompt",
        "t": "timestep",
    }
    assert torch.equal(run_program(program, values_of(program, inputs))[0], eager(model, inputs)[0])


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({**sum_inputs(), "promt": torch.zeros(2, 4)}, ["no argument 'promt'", "'prompt'"]),
        ({"x": torch.ones(2, 4), "t": torch.tensor(3.0)}, ["forward needs prompt"]),
        ({"x": 1.0, "prompt": 2.0, "t": 3.0}, ["no tensor", "latent"]),
    ],
    ids=["unknown", "missing", "no-tensor"],
)
def test_inputs_that_do_not_fit(inputs: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        capture(Sum().eval(), inputs)
    assert all(word in str(caught.value) for word in words)


def test_train_mode_is_refused_and_named() -> None:
    model = Sum().eval()
    model.layer.train()
    with pytest.raises(CaptureError, match=r"layer is in train mode.*call \.eval\(\)"):
        capture(model, sum_inputs())


def test_nan_weight_is_refused_and_named() -> None:
    model = Sum().eval()
    with torch.no_grad():
        model.layer.weight[0, 0] = float("nan")
    with pytest.raises(CaptureError, match=r"'layer\.weight' holds NaN"):
        capture(model, sum_inputs())


def test_infinite_mask_in_a_buffer_is_no_damage() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mask", torch.full((4, 4), -math.inf).triu(1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.softmax(x + self.mask, dim=-1)

    x = torch.randn(4, 4)
    model = Masked().eval()
    assert torch.equal(run_program(capture(model, {"x": x}), {"x": x})[0], model(x))


class Branching(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.sum() > 0:  # the line that the message has to name
            return x
        return -x


def test_branch_on_data_names_the_line_and_the_way_out() -> None:
    with pytest.raises(CaptureError) as caught:
        capture(Branching().eval(), {"x": torch.ones(2, 2)})
    line = Branching.forward.__code__.co_firstlineno + 1
    assert f'File "{__file__}", line {line}, in forward' in str(caught.value)
    assert "torch.where" in str(caught.value)


def test_generated_code_is_not_named_as_the_users_line() -> None:
    def generated() -> None:
        exec("raise RuntimeError('inside')")

    try:
        generated()
    except RuntimeError as error:
        text = explain(error)
    assert f'File "{__file__}"' in text and "in generated" in text


@pytest.mark.parametrize("folder", ["effuse", "compiler", "torch"])
def test_a_users_folder_may_have_our_name(folder: str, tmp_path: Path) -> None:
    path = tmp_path / folder / "mine.py"
    path.parent.mkdir()
    path.write_text("def fail():\n    raise RuntimeError('inside')\n")
    try:
        runpy.run_path(str(path))["fail"]()
    except RuntimeError as error:
        text = explain(error)
    assert f'File "{path}", line 2, in fail' in text


class Placed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.places = nn.Parameter(torch.randn(8, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.places


class Widthwise(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return -x if x.shape[-1] > 16 else x


@pytest.mark.parametrize(
    ("model", "dynamic", "error", "words"),
    [
        (Placed(), {"height": (8, 64)}, CaptureError, "the network fixes 'height'"),
        (Widthwise(), {"width": (8, 64)}, CaptureError, "outside 'width' from 8 to 16"),
        (Widthwise(), {"batch": (3, 4)}, InputError, "'batch' is 3 to 4, but 2 in the example x"),
        (Widthwise(), {"hieght": (8, 64)}, InputError, "called 'hieght'; did you mean 'height'"),
    ],
    ids=["fixed", "branch", "bounds", "unknown"],
)
def test_open_size_that_cannot_be(
    model: nn.Module, dynamic: Any, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        capture(model.eval(), {"x": torch.ones(2, 3, 8, 8)}, dynamic=dynamic)


def test_open_size_of_which_the_example_has_one() -> None:
    with pytest.raises(InputError, match="example of at least 2"):
        capture(Widthwise().eval(), {"x": torch.ones(1, 3, 8, 8)}, dynamic={"batch": (1, 4)})


def test_role_of_an_unknown_input() -> None:
    with pytest.raises(ConfigError, match=r"no input is called 'promt'; did you mean 'prompt'"):
        capture(Sum().eval(), sum_inputs(), roles={"promt": "latent"})


def test_example_timestep_has_to_be_in_the_schedule() -> None:
    with pytest.raises(InputError, match=r"t: 3 is not one of the 2 timesteps.*5"):
        capture(Sum().eval(), sum_inputs(), timesteps=(10.0, 5.0))


def test_no_input_is_the_latent() -> None:
    with pytest.raises(ConfigError, match="none of 'x' is the latent"):
        capture(Widthwise().eval(), {"x": torch.ones(2, 4)}, roles={"x": "prompt"})


def test_two_inputs_of_one_name() -> None:
    class Twice(nn.Module):
        def forward(self, x: torch.Tensor, a: Any, a_b: torch.Tensor) -> torch.Tensor:
            return x + a["b"] + a_b

    one = torch.ones(2)
    with pytest.raises(InputError, match="'a_b' stands for two values"):
        capture(Twice().eval(), {"x": one, "a": {"b": one}, "a_b": one})


class Noisy(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.randn_like(x)


class Dropping(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(x, 0.5, training=True)


@pytest.mark.parametrize("model", [Noisy(), Dropping()], ids=["noise", "dropout"])
def test_random_numbers_are_refused_with_their_line(model: nn.Module) -> None:
    with pytest.raises(
        CaptureError, match=r"(?s)draws random numbers.*test_capture\.py.*input of forw"
    ):
        capture(model.eval(), {"x": torch.ones(2, 4)})


def test_state_between_calls_is_refused() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.count.add_(1)
            return x * self.count

    with pytest.raises(CaptureError, match="writes into the buffer 'count'"):
        capture(Counting().eval(), {"x": torch.ones(2, 4)})


def test_writing_into_an_input_changes_no_example() -> None:
    class Doubling(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.mul_(2) + 1

    x = torch.ones(2, 4)
    program = capture(Doubling().eval(), {"x": x})
    assert torch.equal(x, torch.ones(2, 4))
    assert torch.equal(run_program(program, {"x": x})[0], torch.full((2, 4), 3.0))
    assert torch.equal(run_program(program, program.examples)[0], program.expected[0])


def test_outputs_by_name() -> None:
    inputs = inputs_of("sd15")
    del inputs["return_dict"]
    program = capture(build("sd15"), inputs)
    assert program.result == {"dict": {"sample": 0}, "order": ["sample"]}


@pytest.mark.parametrize("name", [name for name in NETWORKS if not name.startswith("hand")])
def test_derived_inputs_on_meta(name: str) -> None:
    with torch.device("meta"):
        model = NETWORKS[name][0]().eval()
    found = derive_inputs(model.half(), batch=3, size=16)
    tensors = [each for each in pytree.tree_leaves(found) if isinstance(each, torch.Tensor)]
    assert all(each.is_meta for each in tensors)
    assert tensors[0].shape[0] == 3
    assert tensors[0].dtype is torch.float16
    if "timestep" in found:
        assert found["timestep"].dim() == inputs_of(name)["timestep"].dim()


def test_derived_timestep_is_the_one_given() -> None:
    found = derive_inputs(build("dit"), timestep=torch.tensor(7))
    assert found["timestep"].tolist() == [7, 7]
    assert found["timestep"].dtype is torch.int64
    assert derive_inputs(build("sd15"), timestep=torch.tensor(7.5))["timestep"].shape == ()


def test_derived_timestep_of_a_network_that_looks_it_up() -> None:
    class Looking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.time = nn.Conv2d(3, 4, 1), nn.Embedding(1000, 4)

        def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return self.layer(x) + self.time(t)[:, :, None, None]

    found = derive_inputs(Looking().eval(), batch=3, size=4)
    assert (found["x"].shape, found["t"].dtype) == ((3, 3, 4, 4), torch.int64)
    assert found["t"].shape == (3,)


def test_inputs_that_cannot_be_derived() -> None:
    with pytest.raises(InputError, match=r"does not take the examples.*inputs=\{"):
        derive_inputs(Sum().eval())


def test_an_argument_that_no_row_knows_is_found_by_trial() -> None:
    found = derive_inputs(HandDiT().eval())
    assert (found["y"].shape, found["y"].dtype) == ((2,), torch.int64)


def test_derived_inputs_that_the_network_does_not_take() -> None:
    model = conditional(addition_embed_type="image", encoder_hid_dim=4, cross_attention_dim=12)
    with pytest.raises(InputError, match=r"'added_cond_kwargs'.*inputs=\{"):
        derive_inputs(model.eval())


def test_deriving_leaves_the_network_as_it_was() -> None:
    model = HandUNet().train()
    before = {name: id(value) for name, value in model.named_parameters()}
    derive_inputs(model, size=8)
    assert model.training
    assert before == {name: id(value) for name, value in model.named_parameters()}


class Halving(nn.Module):
    """Takes another path for odd widths."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        shift = 1.0 if sample.shape[-1] % 2 == 0 else 2.0
        return self.conv(sample) + timestep * shift


def test_open_sizes_are_held_to_the_steps_that_the_captured_path_is_right_for():
    inputs = {"sample": torch.randn(2, 3, 8, 8), "timestep": torch.tensor(1.0)}
    program = capture(Halving().eval(), inputs, dynamic={"width": (4, 16)})
    assert program.steps == {"width": 2}
    run = session(program)
    assert run(torch.randn(2, 3, 8, 12), torch.tensor(1.0)).shape == (2, 3, 8, 12)
    with pytest.raises(InputError, match="width must be 4 to 16 in steps of 2, got 7"):
        run(torch.randn(2, 3, 8, 7), torch.tensor(1.0))
    with pytest.raises(CaptureError, match="begin with one of these"):
        capture(Halving().eval(), inputs, dynamic={"width": (5, 16)})


def test_a_static_input_is_held_to_its_example():
    inputs = {"sample": torch.randn(2, 3, 8, 8), "timestep": torch.tensor(1.0)}
    program = capture(Halving().eval(), inputs, roles={"timestep": "static"})
    run = session(program)
    run(inputs["sample"], torch.tensor(1.0))
    with pytest.raises(InputError, match="its role is static"):
        run(inputs["sample"], torch.tensor(2.0))
