"""Through ONNX Runtime: the field's networks equal eager, and 8-bit layers really run in 8 bits."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

import effuse
from effuse.backends import onnx_exporter
from effuse.backends.onnx_ops import TRANSLATIONS
from effuse.errors import BackendError
from effuse.metrics import sqnr_db

TIMES = [900, 500, 100]


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def unet():
    from diffusers import UNet2DModel

    net = UNet2DModel(
        sample_size=8, in_channels=3, out_channels=3, layers_per_block=1, block_out_channels=(8,),
        down_block_types=("DownBlock2D",), up_block_types=("AttnUpBlock2D",), mid_block_type=None,
        norm_num_groups=4, attention_head_dim=4,
    )  # fmt: skip
    return net, {"sample": randn(2, 3, 8, 8), "timestep": torch.tensor(500)}, TIMES


def unet_condition():
    from diffusers import UNet2DConditionModel

    net = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(8,),
        down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",),
        mid_block_type=None, norm_num_groups=4, attention_head_dim=2, cross_attention_dim=8,
    )  # fmt: skip
    given = {
        "sample": randn(2, 4, 8, 8),
        "timestep": torch.tensor(500),
        "encoder_hidden_states": randn(2, 5, 8, seed=1),
    }
    return net, given, TIMES


def dit():
    from diffusers import DiTTransformer2DModel

    net = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=1,
        sample_size=8, patch_size=2, num_embeds_ada_norm=10, norm_type="ada_norm_zero",
    )  # fmt: skip
    given = {
        "hidden_states": randn(2, 4, 8, 8),
        "timestep": torch.tensor([500, 500]),
        "class_labels": torch.tensor([1, 7]),
    }
    return net, given, TIMES


def pixart():
    from diffusers import PixArtTransformer2DModel

    net = PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=1,
        sample_size=8, patch_size=2, cross_attention_dim=16, caption_channels=8,
        use_additional_conditions=False, norm_type="ada_norm_single", num_embeds_ada_norm=1000,
    )  # fmt: skip
    given = {
        "hidden_states": randn(2, 4, 8, 8),
        "encoder_hidden_states": randn(2, 6, 8, seed=1),
        "timestep": torch.tensor([500, 500]),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        "encoder_attention_mask": torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0]]),
    }
    return net, given, TIMES


def sd3():
    from diffusers import SD3Transformer2DModel

    net = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=1,
        attention_head_dim=8, num_attention_heads=2, joint_attention_dim=8,
        caption_projection_dim=16, pooled_projection_dim=16, pos_embed_max_size=8,
    )  # fmt: skip
    given = {
        "hidden_states": randn(2, 4, 8, 8),
        "encoder_hidden_states": randn(2, 6, 8, seed=1),
        "pooled_projections": randn(2, 16, seed=2),
        "timestep": torch.tensor([500.0, 500.0]),
    }
    return net, given, TIMES


def flux():
    from diffusers import FluxTransformer2DModel

    net = FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=8, pooled_projection_dim=8,
        axes_dims_rope=(4, 6, 6), guidance_embeds=True,
    )  # fmt: skip
    rows = torch.arange(16) // 4
    given = {
        "hidden_states": randn(2, 16, 4),
        "encoder_hidden_states": randn(2, 5, 8, seed=1),
        "pooled_projections": randn(2, 8, seed=2),
        "timestep": torch.tensor([0.7, 0.7]),
        "img_ids": torch.stack([rows * 0, rows, torch.arange(16) % 4], 1).float(),
        "txt_ids": torch.zeros(5, 3),
        "guidance": torch.tensor([3.5, 3.5]),
    }
    return net, given, [1.0, 0.7, 0.3]


class Decoder(nn.Module):
    """A VAE's decoder as a network of its own."""

    def __init__(self):
        super().__init__()
        from diffusers import AutoencoderKL

        self.vae = AutoencoderKL(
            block_out_channels=(4, 8), down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, norm_num_groups=2,
        )  # fmt: skip
        del self.vae.encoder

    def forward(self, latents, return_dict=True):
        return self.vae.decode(latents, return_dict=return_dict)


def decoder():
    return Decoder(), {"latents": randn(1, 4, 4, 4)}, None


class Small(nn.Module):
    """A convolution at the step's rate and a linear layer at the prompt's, between two more."""

    def __init__(self):
        super().__init__()
        self.prompt = nn.Linear(32, 8)
        self.layers = nn.ModuleList(
            nn.Conv2d(a, b, 3, padding=1) for a, b in ((3, 8), (8, 8), (8, 3))
        )

    def forward(self, sample, prompt, return_dict=True):
        h = self.layers[0](sample) + self.prompt(prompt).mean(1)[:, :, None, None]
        return (self.layers[2](torch.relu(self.layers[1](torch.relu(h)))),)


def small():
    return Small(), {"sample": randn(2, 3, 8, 8), "prompt": randn(2, 6, 32, seed=1)}, None


NETWORKS = [unet, unet_condition, dit, pixart, sd3, flux, decoder]


def made(make):
    torch.manual_seed(0)
    net, given, times = make()
    with torch.no_grad():
        for each in net.parameters():  # networks with zeros to begin with hide their errors
            each.add_(0.05 * torch.randn_like(each))
    return net.eval(), given, times


def compiled_as(make, config):
    net, given, times = made(make)
    inputs = {**given, "return_dict": False}
    return effuse.compile(net, config, inputs=inputs, schedule=times, progress=False)


def eager(net, given):
    with torch.no_grad():
        return net(**given, return_dict=False)[0]


def executed(compiled, given) -> set[str]:
    """The operators that onnxruntime's profile says the step program ran."""
    options = onnxruntime.SessionOptions()
    options.enable_profiling = True
    options.profile_file_prefix = str(Path(compiled.folder) / "profile")
    path = str(compiled.folder / "full.onnx")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    env = recorded_values(compiled, given)
    session.run(None, {each.name: env[each.name] for each in session.get_inputs()})
    trace = Path(session.end_profiling())
    events = json.loads(trace.read_text())
    trace.unlink()
    return {each["args"]["op_name"] for each in events if "op_name" in each.get("args", {})}


def recorded_values(compiled, given):
    """All named values of one step: the inputs, the step index, and the slower parts' results."""
    session = compiled.session
    values = {
        each.name: session.arrays.take(given[each.name], each) for each in session.spec.inputs
    }
    index = np.array([session.step_index(values) or 0], dtype=np.int64)
    env = {**values, "step_index": session.arrays.array(index)}
    for part in session.spec.parts:
        if part.name != "full":
            env.update(zip(part.outputs, session._recall(part, env), strict=True))
    return env


@pytest.mark.parametrize("make", NETWORKS)
def test_exact_equals_eager(make):
    net, given, times = made(make)
    compiled = compiled_as(make, "exact")
    for index in range(2):
        for name in ("sample", "hidden_states", "latents"):
            if name in given:
                given[name] = randn(*given[name].shape, seed=10 + index)
        if times:
            given["timestep"] = torch.full_like(given["timestep"], times[2 * index])
        expected = eager(net, given)
        found = compiled(**given, return_dict=False)[0]
        assert found.shape == expected.shape and found.dtype == expected.dtype
        error = (found - expected).abs().max() / expected.abs().max()
        assert float(error) < 1e-5
    assert compiled.manifest["parity"]["error"] < 1e-5
    assert compiled.manifest["native"] == {}


STATIC = {"QLinearConv", "MatMulIntegerToFloat", "QGemm", "QLinearMatMul"}
DYNAMIC = {"DynamicQuantizeMatMul", "ConvInteger", "MatMulInteger", "DynamicQuantizeLinear"}


@pytest.fixture(scope="module", params=["w8a8", "w8a8-dynamic"])
def preset(request):
    return request.param


@pytest.fixture(scope="module", params=[unet, dit])
def quantized(request, preset):
    """A quantized network whose every layer was wanted, with the original and an input."""
    config = {"passes": ["hoist", {"name": "quantize", "min_sqnr_db": 0, "activations":
              "static" if preset == "w8a8" else "dynamic"}]}  # fmt: skip
    net, given, _ = made(request.param)
    return compiled_as(request.param, config), net, given, preset, request.param


def test_eight_bit_layers_run_in_integer_kernels(quantized):
    compiled, _, given, preset, make = quantized
    ran = executed(compiled, given)
    if preset == "w8a8":
        assert ran & {"MatMulIntegerToFloat", "QGemm", "QLinearMatMul"}, ran
        assert make is dit or "QLinearConv" in ran
    else:
        assert ran & {"DynamicQuantizeMatMul", "MatMulInteger"}, ran
        assert make is dit or "ConvInteger" in ran
    counted = [each for each in compiled.manifest["layers"] if each["format"] == "w8a8"]
    assert len(counted) >= 4
    assert set(compiled.manifest["native"].values()) == {"native"}


def test_weights_of_eight_bit_layers_are_stored_in_eight_bits_only(quantized):
    compiled, net, *_ = quantized
    layers = {each["name"]: each for each in compiled.manifest["layers"]}
    model = onnx.load(compiled.folder / "full.onnx")
    stored = [onnx.numpy_helper.to_array(each) for each in model.graph.initializer]
    bytes_ = sum(each.size for each in stored if each.dtype == np.int8 and each.ndim > 1)
    eight = [name for name, each in layers.items() if each["format"] == "w8a8"]
    assert bytes_ == sum(layers[name]["parameters"] for name in eight)
    floats = {np.sort(each.ravel()).tobytes() for each in stored if each.dtype == np.float32}
    for name in eight:
        weight = net.get_submodule(name).weight.detach().numpy()
        assert np.sort(weight.ravel()).tobytes() not in floats, name


def test_the_quantized_network_is_near_the_original(quantized):
    compiled, net, given, _, _ = quantized
    expected = eager(net, given)
    found = compiled(**given, return_dict=False)[0]
    assert sqnr_db(expected.numpy(), found.numpy()) > 15
    record = compiled.manifest["passes"][-1]
    assert record["name"] == "quantize" and not record["exact"] and record["sqnr_db"] > 15


def test_parity_with_reference_is_measured_and_in_the_manifest(quantized):
    compiled, *_ = quantized
    parity = compiled.manifest["parity"]
    assert set(parity) == {"error", "sqnr_db"}
    assert parity["sqnr_db"] > compiled.manifest["passes"][-1]["sqnr_db"]
    stored = json.loads((compiled.folder / "manifest.json").read_text())
    assert stored["parity"] == parity


def test_prompt_programs_keep_float_activations():
    """ONNX Runtime would quantize them too, in MatMulNBits, if it were not told otherwise."""
    ours, theirs = (
        compiled_as(small, {"passes": "w8a8", "backend": backend})
        for backend in ("onnx", "reference")
    )
    _, given, _ = made(small)
    name = ours.session.spec.part("prompt").outputs[0]
    formats = {each["name"]: each["format"] for each in ours.manifest["layers"]}
    assert formats["prompt"] == "w8"
    found, expected = (torch.as_tensor(recorded_values(c, given)[name]) for c in (ours, theirs))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_lowering_that_computes_something_else_is_refused(monkeypatch):
    from effuse.backends import onnx_ops

    def wrong(x, scale, zero_point, axis):
        enlarged = onnx_ops.op.Mul(x, onnx_ops.op.Constant(value_float=1.05))
        return onnx_ops.op.QuantizeLinear(enlarged, scale, zero_point, axis=axis)

    target = torch.ops.effuse.quantize.default
    monkeypatch.setitem(onnx_ops.TRANSLATIONS, target, wrong)
    with pytest.raises(BackendError, match=r"onnx agrees with reference to .* dB only"):
        compiled_as(small, "w8a8")


def test_an_op_without_an_onnx_form_is_named():
    class Odd(nn.Module):
        def forward(self, sample):
            return torch.special.bessel_j0(sample)

    with pytest.raises(BackendError, match=r"the part 'full' has no ONNX form"):
        effuse.compile(Odd().eval(), "none", inputs={"sample": randn(1, 2)}, progress=False)
    fallback = effuse.compile(
        Odd().eval(), {"backend": "reference"}, inputs={"sample": randn(1, 2)}, progress=False
    )
    assert fallback.manifest["backend"] == "reference"


def test_the_exporter_s_table_of_operators_is_made_once(monkeypatch):
    made = []
    registry = onnx_exporter.import_module(f"{onnx_exporter.INTERNALS}._registration").ONNXRegistry
    whole = registry.from_torchlib
    monkeypatch.setattr(registry, "from_torchlib", lambda *_, **kw: made.append(kw) or whole(**kw))
    onnx_exporter.operators.cache_clear()
    exported = torch.export.export(nn.Linear(3, 2), (randn(2, 3),))

    def nodes():
        model = onnx_exporter.to_onnx(exported, ["x"], ["y"], TRANSLATIONS)
        return [(node.op_type, [value.name for value in node.inputs]) for node in model.graph]

    first = nodes()
    assert nodes() == first and made == [{"opset_version": 21}]
    monkeypatch.setattr(onnx_exporter, "takes_table", lambda: False)  # as in another torch
    assert nodes() == first and len(made) == 2


def test_auto_takes_onnx_and_falls_back_with_the_reason(monkeypatch):
    from effuse.backends import onnx as backend

    config = {"passes": "exact", "backend": "auto"}
    assert compiled_as(small, config).manifest["backend"] == "onnx"
    monkeypatch.setattr(backend, "available", lambda: "no onnx here")
    fallen = compiled_as(small, config)
    assert (fallen.manifest["backend"], fallen.manifest["fallback"]) == (
        "reference",
        "no onnx here",
    )
    with pytest.raises(BackendError, match="onnx: no onnx here"):
        compiled_as(small, "exact")


def test_reference_equals_eager_to_the_bit_before_and_after_saving(tmp_path):
    net, given, _ = made(small)
    compiled = compiled_as(small, {"passes": "none", "backend": "reference"})
    loaded = effuse.load(compiled.save(tmp_path / "net.effuse"))
    expected = eager(net, given)
    assert torch.equal(compiled(**given)[0], expected)
    assert torch.equal(loaded(**given)[0], expected)


@pytest.mark.parametrize("backend", ["reference", "onnx"])
def test_a_half_precision_network(tmp_path, backend):
    net, given, times = made(small)
    net = net.half()
    given = {name: value.half() for name, value in given.items()}
    config = {"passes": "exact", "backend": backend}
    inputs = {**given, "return_dict": False}
    compiled = effuse.compile(net, config, inputs=inputs, schedule=times, progress=False)
    expected = eager(net, given)
    for each in (compiled, effuse.load(compiled.save(tmp_path / "half.effuse"))):
        assert each.dtype == torch.float16
        found = each(**given)[0]
        assert found.dtype == torch.float16
        assert sqnr_db(expected.float().numpy(), found.float().numpy()) > 45
