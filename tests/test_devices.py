"""Targets of ONNX Runtime: what is refused, what is written, and which providers a session gets."""

from functools import cache

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

import effuse
from effuse.devices import CPU, DEVICES, device_of, missing
from effuse.errors import BackendError, ConfigError
from effuse.kernels.formats import FORMATS
from effuse.passes import AutoBits, Hoist, Quantize
from effuse.targets import TARGETS

TIMES = [800, 600, 400, 200]
EXACT = (Hoist(),)


class Net(nn.Module):
    """A denoiser with convolutions, a norm, attention and a prompt."""

    def __init__(self, width=32):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, width, 3, padding=1)
        self.norm = nn.GroupNorm(4, width)
        self.middle = nn.Conv2d(width, width, 3, padding=1)
        self.query, self.key = nn.Linear(width, width), nn.Linear(4, width)
        self.value, self.out = nn.Linear(4, width), nn.Linear(width, width)
        self.last = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, sample, timestep, encoder_hidden_states, return_dict=True):
        h = self.first(sample) + torch.sin(timestep * 1.37)  # angles that float16 lacks
        h = h + self.middle(nn.functional.silu(self.norm(h)))
        n, c, height, width = h.shape
        tokens = h.flatten(2).transpose(1, 2)

        def heads(x):
            return x.unflatten(-1, (2, -1)).transpose(1, 2)

        query, key = heads(self.query(tokens)), heads(self.key(encoder_hidden_states))
        seen = nn.functional.scaled_dot_product_attention(
            query, key, heads(self.value(encoder_hidden_states))
        )
        tokens = tokens + self.out(seen.transpose(1, 2).flatten(2))
        h = tokens.transpose(1, 2).reshape(n, c, height, width)
        return {"sample": self.last(h)} if return_dict else (self.last(h),)


def given():
    return {
        "sample": torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(1)),
        "timestep": torch.tensor(600),
        "encoder_hidden_states": torch.ones(1, 2, 4),
        "return_dict": False,
    }


@cache  # none of the tests changes what it gets
def built(target, passes=EXACT):
    config = effuse.Config(passes=passes, target=target)
    return effuse.compile(Net().eval(), config, inputs=given(), schedule=TIMES, progress=False)


def called(compiled):
    return compiled(**given())[0].numpy()


def models(compiled):
    paths = sorted(compiled.folder.glob("*.onnx"))
    return [onnx.load(path, load_external_data=False) for path in paths]


def domains(compiled):
    return {node.domain for model in models(compiled) for node in model.graph.node}


def test_rows_name_formats_that_there_are_and_end_at_the_cpu():
    for name, device in DEVICES.items():
        assert device.name == name and name in TARGETS
        assert {*device.formats, *device.stored} <= set(FORMATS)
        assert device.providers[-1][0] == CPU
        assert bool(device.ranges) == bool(device.formats)


REFUSED = {
    ("cuda", "w8a8"): "would only simulate 'w8a8'; the nearest that it computes in low bits is "
                      "'w4a16' (all: w4a16; small in the file alone: w8a16)",
    ("cuda-fp16", "w4a8"): "the nearest that it computes in low bits is 'w4a16'",
    ("qnn", "w4a16"): "the nearest that it computes in low bits is 'w8a8'",
    ("qnn", "int8/channel:int8/tensor"): "would only simulate 'int8/channel:int8/tensor'",
    ("xnnpack", "fp8"): "the nearest that it computes in low bits is 'w8a8'",
    ("coreml", "w8a8"): "it computes nothing in low bits: leave Quantize out (and see the target "
                        "'coreml-fp16'), or keep a small file with 'w8a16'",
    ("cpu-avx2", "nvfp4"): "the nearest that it computes in low bits is 'w8a8'",
    ("cpu-avx512vnni", "w4a4"): "the nearest that it computes in low bits is 'w4a16'",
}  # fmt: skip


@pytest.mark.parametrize(("target", "format"), REFUSED)
def test_a_format_that_a_device_would_simulate_is_refused(target, format):
    with pytest.raises(ConfigError) as caught:
        effuse.Config(passes=(Quantize(format),), target=target)
    assert str(caught.value).startswith(f"target: {target!r} would only simulate ")
    assert REFUSED[target, format] in str(caught.value)


def test_formats_of_single_layers_and_of_auto_bits_are_looked_at_too():
    mixed = Quantize("w8a8", layers=(("middle", "w4a16"),))
    for chosen in (mixed, AutoBits(formats=("w8a8", "w4a16"))):
        with pytest.raises(ConfigError, match="would only simulate 'w4a16'"):
            effuse.Config(passes=(chosen,), target="qnn")


@pytest.mark.parametrize("target", DEVICES)
def test_what_a_device_has_is_accepted(target):
    for name in (*DEVICES[target].formats, *DEVICES[target].stored):
        assert effuse.Config(passes=(Quantize(name),), target=target).target == target


def test_ranges_found_at_run_time_are_refused_where_scales_are_constants():
    for when in ("step", "dynamic"):
        with pytest.raises(ConfigError, match=f"no layers whose ranges are '{when}'"):
            effuse.Config(passes=(Quantize(activations=when),), target="qnn")


def test_open_sizes_are_refused_where_sizes_are_fixed():
    for target in ("qnn", "coreml", "xnnpack"):
        with pytest.raises(ConfigError, match=r"leaves \['batch'\] open; list the sizes"):
            effuse.Config(dynamic={"batch": (1, 8)}, target=target)
    assert effuse.Config(dynamic={"batch": (1, 8)}, target="cuda").dynamic


def test_other_back_ends_do_not_build_for_them():
    with pytest.raises(ConfigError, match="'qnn' is for ONNX Runtime; backend='triton' builds"):
        effuse.Config(target="qnn", backend="triton")
    with pytest.raises(ConfigError, match="'cuda' is for ONNX Runtime; set backend='onnx'"):
        effuse.Config(target="cuda", backend="reference")


def test_saturation_of_avx2_is_kept_out_by_the_session():
    from effuse.ort import session_options

    key = "session.x64quantprecision"
    assert session_options(device_of("cpu-avx2")).get_session_config_entry(key) == "1"
    with pytest.raises(RuntimeError):
        session_options(device_of("cpu-avx512vnni")).get_session_config_entry(key)


@pytest.mark.skipif(missing(DEVICES["xnnpack"]) is None, reason="onnxruntime here has XNNPACK")
def test_a_device_that_is_not_here(tmp_path):
    target = "xnnpack"
    compiled = built(target)
    assert compiled.manifest["parity"]["sqnr_db"] > 90  # checked on the CPU
    with pytest.raises(BackendError) as caught:
        called(compiled)
    message = str(caught.value)
    for part in (DEVICES[target].providers[0][0], DEVICES[target].install, CPU,
                 *onnxruntime.get_available_providers()):  # fmt: skip
        assert part in message
    assert compiled.manifest["absent"] == message
    path = compiled.save(tmp_path / "net.effuse")
    loaded = effuse.load(path)
    assert loaded.plan == compiled.plan  # to be looked at
    with pytest.raises(BackendError, match="or ask for the CPU"):
        called(loaded)
    asked = effuse.load(path, providers=[CPU])
    np.testing.assert_allclose(called(asked), called(built(None)), rtol=1e-4, atol=1e-5)


def test_a_provider_that_does_not_start_is_not_replaced_in_silence(tmp_path):
    path = built(None).save(tmp_path / "net.effuse")
    with (
        pytest.warns(UserWarning, match="not in available provider names"),
        pytest.raises(BackendError, match=r"could not start it .* or ask for the CPU"),
    ):
        effuse.load(path, providers=[("XnnpackExecutionProvider", {}), CPU])


def test_a_cpu_is_here_and_its_session_opens_when_it_is_called():
    compiled = built("cpu-avx512vnni")
    assert compiled.manifest["absent"] is None
    np.testing.assert_array_equal(called(compiled), called(built(None)))


def test_standard_operators_alone_where_a_provider_has_no_others():
    assert "com.microsoft" in domains(built(None))
    quantized = built("xnnpack", (Hoist(), Quantize("w8a8")))
    assert domains(quantized) == domains(built("xnnpack")) == {""}
    formats = {layer["format"] for layer in quantized.manifest["layers"]}
    assert "w8a8" in formats


HALVES = {"cuda-fp16": EXACT, "coreml-fp16": (), "cpu-arm64-fp16": (Hoist(), Quantize("w8a8"))}


@pytest.mark.parametrize("target", HALVES)
def test_the_float16_variant_is_smaller_and_says_what_it_costs(target):
    compiled, whole = built(target, HALVES[target]), built(None)
    assert 45 < compiled.manifest["parity"]["sqnr_db"] < 80  # of the lowering, in float16
    weights = (each.folder / "weights.safetensors" for each in (compiled, whole))
    small, large = (path.stat().st_size for path in weights)
    assert small < 0.6 * large
    expected = called(whole)
    found = effuse.load(compiled.folder, providers=[CPU])
    error = np.abs(called(found) - expected).max() / np.abs(expected).max()
    assert 0 < error < (0.05 if "Quantize" in str(HALVES[target]) else 2e-3)


def test_norms_and_angles_stay_in_float32_and_so_do_inputs_and_outputs():
    full = models(built("coreml-fp16", ()))[0].graph
    whole = onnx.TensorProto.FLOAT
    assert {each.type.tensor_type.elem_type for each in (*full.input, *full.output)} <= {
        whole, onnx.TensorProto.INT64,
    }  # fmt: skip
    made = {name: node for node in full.node for name in node.output}
    norms = [node for node in full.node if node.op_type in ("InstanceNormalization", "Sin")]
    assert len(norms) == 2
    for node in norms:
        source = made[node.input[0]]
        while source.op_type in ("Reshape", "Mul"):
            source = made[source.input[0]]
        assert source.op_type == "Cast"
        assert [each.i for each in source.attribute if each.name == "to"] == [whole]
