"""Through OpenVINO: networks equal eager, and 8-bit layers really run in 8 bits."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections import Counter

import numpy as np
import onnx
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import effuse
from effuse import openvino_run
from effuse.errors import ArtifactError, BackendError, ConfigError, InputError
from effuse.metrics import sqnr_db
from effuse.passes import Cache, Hoist, Lora, LowRank, Quantize

openvino = pytest.importorskip("openvino")

logging.getLogger("torch.__trace").disabled = True  # pytest's log capture would pay for it

SCHEDULE = list(range(90, -1, -15))
LINEAR = "FullyConnected"
OPTIONS = {"min_sqnr_db": -100.0, "edges": True}


class Net(nn.Module):
    """A skip around a convolution and attention with its four linear layers; a timestep scales."""

    def __init__(self):
        super().__init__()
        self.enter = nn.Conv2d(3, 32, 3, padding=1)
        self.norm = nn.GroupNorm(4, 32)
        self.query, self.key = nn.Linear(32, 32), nn.Linear(32, 32, bias=False)
        self.value, self.join = nn.Linear(32, 32), nn.Linear(32, 32)
        self.leave = nn.Conv2d(64, 3, 1)

    def forward(self, sample, timestep):
        enter = F.silu(self.enter(sample)) * (1 + timestep.float().cos())[:, None, None, None]
        tokens = self.norm(enter).flatten(2).transpose(1, 2)
        heads = [
            each(tokens).unflatten(-1, (4, 8)).transpose(1, 2)
            for each in (self.query, self.key, self.value)
        ]
        mixed = F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
        tokens = tokens + self.join(mixed)
        return self.leave(torch.cat([tokens.transpose(1, 2).reshape(enter.shape), enter], 1))


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return Net().eval()


def noise(seed=1, batch=2):
    return torch.randn(batch, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def compiled(net, *passes, backend="openvino", **options):
    inputs = {"sample": noise(), "timestep": torch.tensor([45, 45])}
    settings = effuse.Config(passes=(Hoist(), *passes), backend=backend, **options)
    return effuse.compile(net, settings, inputs=inputs, schedule=SCHEDULE, progress=False)


def at(index):
    return torch.tensor([SCHEDULE[index]] * 2)


def on(net, *values):
    with torch.no_grad():
        return net(*values)


def agreement(one, other):
    """SQNR, dB, at the worst of three steps of two networks."""
    pairs = [(on(one, noise(n), at(n)), on(other, noise(n), at(n))) for n in (0, 2, 6)]
    return min(sqnr_db(a.numpy(), b.numpy()) for a, b in pairs)


def runtime(result, name="full"):
    """OpenVINO's compiled model of a part, as a session compiles it."""
    settings = openvino_run.read_settings(result.folder).of(name)
    path = result.folder / f"{name}.onnx"
    return openvino_run.compile_part(openvino.Core(), path, settings)


def kernels(model):
    """What the runtime's graph runs: (layer, precision, kernel)."""
    infos = [node.get_rt_info() for node in model.get_runtime_model().get_ops()]
    keys = ("layerType", "runtimePrecision", "primitiveType")
    return [tuple(info[key].astype(str) for key in keys) for info in infos]


def test_exact_equals_eager_at_every_step(net):
    result = compiled(net)
    assert agreement(net, result) > 110
    assert result.manifest["parity"]["sqnr_db"] > 110
    assert result.manifest["versions"]["openvino"] and result.device == torch.device("cpu")
    assert {kind: low for kind, (low, _) in layers(result).items()} == {
        "Convolution": 0,
        "FullyConnected": 0,
    }


def layers(result):
    return openvino_run.low_bit_layers(runtime(result))


W4A16 = "int4/group32:none:int4/channel:none"
W4A8 = "int4/group32:int8/group32/dynamic:int4/channel:uint8/tensor/asymmetric"


@pytest.fixture(scope="module")
def eight(net):
    return compiled(net, Quantize("w8a8", **OPTIONS))


def test_eight_bit_layers_run_in_integer_kernels_and_equal_reference(net, eight):
    assert layers(eight) == {"Convolution": (2, 2), "FullyConnected": (4, 4)}
    weights = [each for each in kernels(runtime(eight)) if each[:2] == ("Const", "i8")]
    assert len(weights) == 6
    reference = compiled(net, Quantize("w8a8", **OPTIONS), backend="reference")
    assert agreement(reference, eight) > 100
    assert 15 < agreement(net, eight) < 60
    assert set(eight.manifest["native"].values()) == {"native"}


def test_attention_transposes_what_it_must_and_the_tables_are_read_at_once(eight):
    kinds = Counter(each[0] for each in kernels(runtime(eight)))
    assert kinds["Transpose"] == 4  # 7 as exported: the tokens thrice, the keys twice
    assert kinds["Gather"] == 1


class Tokens(nn.Module):
    """A sum over tokens between two 1×1 convolutions, as in a UNet's attention."""

    def __init__(self):
        super().__init__()
        self.enter = nn.Conv2d(3, 32, 3, padding=1)
        self.into, self.out = nn.Conv2d(32, 32, 1), nn.Conv2d(32, 3, 1)
        self.mix = nn.Linear(32, 32)

    def forward(self, sample, timestep):
        h = self.enter(sample) + timestep.float().cos()[:, None, None, None]
        tokens = self.into(h).permute(0, 2, 3, 1).reshape(len(sample), 64, 32)
        tokens = tokens + self.mix(tokens)
        return self.out(tokens.reshape(len(sample), 8, 8, 32).permute(0, 3, 1, 2))


def test_roundings_stand_before_changes_of_layout():
    torch.manual_seed(0)
    tokens = Tokens().eval()
    eight = compiled(tokens, Quantize("w8a8", **OPTIONS))
    assert layers(eight) == {"Convolution": (3, 3), LINEAR: (1, 1)}
    assert eight.manifest["parity"]["sqnr_db"] > 100
    model = onnx.load(eight.folder / "full.onnx", load_external_data=False).graph
    made = {node.output[0]: node.op_type for node in model.node}
    rounded = {made.get(n.input[0]) for n in model.node if n.op_type == "QuantizeLinear"}
    assert rounded and not rounded & {"Reshape", "Transpose"}


@pytest.mark.parametrize("name, held", [(W4A16, "u4"), ("w8a16", "i8")])
def test_weights_alone_stay_in_few_bits_beside_a_low_rank_branch(net, name, held):
    result = compiled(net, LowRank(rank=4), Quantize(name, **OPTIONS))
    precisions = Counter(each[1] for each in kernels(runtime(result)) if each[0] == LINEAR)
    assert precisions[held] == 4
    assert result.manifest["parity"]["sqnr_db"] > 100  # against reference
    assert set(result.manifest["native"].values()) == {"native"}


def test_four_bit_weights_with_activations_rounded_as_they_come(net):
    result = compiled(net, Quantize(W4A8, **OPTIONS))
    assert openvino_run.read_settings(result.folder).groups == {"full": 32}
    assert layers(result)["Convolution"] == (2, 2)
    assert result.manifest["parity"]["sqnr_db"] > 100
    path = result.folder / "full.onnx"
    plain = openvino_run.compile_part(openvino.Core(), path, openvino_run.Settings().of("full"))
    found = plain({"sample": noise(0).numpy(), "step_index": np.array([0])})[0]
    assert sqnr_db(result(noise(0), at(0)).numpy(), found) < 60  # in float, if not told so


def test_wide_convolutions_on_four_bit_weights_run_in_integer_kernels():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 64, 3, padding=1), nn.Conv2d(64, 64, 3, padding=1), nn.SiLU())
    given = {"input": noise()}
    settings = effuse.Config(passes=(Quantize(W4A8, **OPTIONS),), backend="openvino")
    result = effuse.compile(net.eval(), settings, inputs=given, progress=False)
    assert layers(result) == {"Convolution": (2, 2)}
    assert result.manifest["parity"]["sqnr_db"] > 100


@pytest.mark.parametrize("name", ["int4/group32:int4/group32/dynamic", "fp8"])
def test_what_it_lacks_is_refused_with_what_it_has(net, name):
    with pytest.raises(BackendError, match=r"openvino: it computes nothing with .*w8a8.*w4a8"):
        compiled(net, Quantize(name, **OPTIONS))


def test_ranges_at_run_time_are_refused_with_the_way_out(net):
    with pytest.raises(BackendError, match="activations='static'"):
        compiled(net, Quantize("w8a8", activations="dynamic", **OPTIONS))


def test_ranges_by_step_become_one_and_it_says_so(net, eight):
    result = compiled(net, Quantize("w8a8", activations="step", **OPTIONS))
    assert layers(result) == layers(eight) == {"Convolution": (2, 2), LINEAR: (4, 4)}
    record = result.manifest["passes"][-1]
    assert record["name"] == "openvino" and record["sqnr_db"] > 15
    assert "one that covers all steps" in record["notes"][0]
    assert result.manifest["parity"]["sqnr_db"] > 100
    assert abs(agreement(net, result) - agreement(net, eight)) < 1  # as if it were static


def test_a_target_of_onnx_runtime_is_refused():
    with pytest.raises(ConfigError, match="backend='onnx'"):
        effuse.Config(backend="openvino", target="qnn")


# ---- plans, sizes, slots -------------------------------------------------------------------------


def test_a_cached_plan_runs_as_in_reference(net):
    ours, theirs = (
        compiled(net, Cache(interval=3, mode="unit"), backend=backend)
        for backend in ("openvino", "reference")
    )
    sample, other = noise(3), noise(3)
    for time in SCHEDULE:
        times = torch.tensor([time, time])
        sample, other = ours(sample, times), theirs(other, times)
    assert sqnr_db(other.numpy(), sample.numpy()) > 90
    assert ours.session.steps == theirs.session.steps
    assert len(ours.session.steps) == 2
    model = [path for path in ours.folder.glob("*.safetensors")]
    assert len(model) == 1  # both variants read one file


def test_open_batches_and_loras(net, tmp_path):
    from safetensors.torch import save_file

    result = compiled(net, Lora(max_rank=8), dynamic={"batch": (1, 8)})
    for batch in (1, 2, 7):
        given = noise(batch, batch), torch.full((batch,), 60)
        assert sqnr_db(on(net, *given).numpy(), result(*given).numpy()) > 110
    generator = torch.Generator().manual_seed(2)
    down, up = (0.2 * torch.randn(*shape, generator=generator) for shape in ((4, 32), (32, 4)))
    save_file({"unet.value.lora_A.weight": down, "unet.value.lora_B.weight": up},
              tmp_path / "style.safetensors")  # fmt: skip
    result.load_lora(tmp_path / "style.safetensors")
    merged = Net().eval()
    merged.load_state_dict(net.state_dict())
    merged.value.weight.data += up @ down
    assert agreement(merged, result) > 110 > 60 > agreement(net, result)
    result.unload_lora()
    assert agreement(net, result) > 110


def test_a_lora_on_a_wide_convolution_is_refused(net):
    with pytest.raises(BackendError, match=r"'enter.*Lora\(convolutions=False\)"):
        compiled(net, Lora(max_rank=4, convolutions=True))


# ---- artifacts -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(eight, tmp_path_factory):
    return eight, eight.save(tmp_path_factory.mktemp("saved") / "net.effuse")


def test_a_loaded_artifact_gives_the_same_without_torch(saved, tmp_path):
    result, path = saved
    np.savez(tmp_path / "given.npz", sample=noise().numpy())
    code = (
        "import sys, numpy, effuse; "
        "given = numpy.load(sys.argv[2])['sample']; "
        "found = effuse.load(sys.argv[1], threads=1)(given, numpy.array([45, 45])); "
        "numpy.save(sys.argv[3], found); print('torch' in sys.modules, 'onnx' in sys.modules)"
    )
    arguments = [str(path), str(tmp_path / "given.npz"), str(tmp_path / "found.npy")]
    done = subprocess.run([sys.executable, "-P", "-c", code, *arguments], capture_output=True,
                          text=True, check=True)  # fmt: skip
    assert done.stdout.split() == ["False", "False"]
    expected = result(noise(), torch.tensor([45, 45]))
    assert np.array_equal(np.load(tmp_path / "found.npy"), expected.numpy())


def test_the_same_build_gives_the_same_files(net, saved):
    first, again = saved[0], compiled(net, Quantize("w8a8", **OPTIONS))
    names = {path.name for path in first.folder.iterdir()}
    assert names == {path.name for path in again.folder.iterdir()}
    for name in names:
        assert (first.folder / name).read_bytes() == (again.folder / name).read_bytes(), name


def test_results_stay_when_the_next_step_has_run(saved):
    one = saved[0](noise(1), at(0))
    before = one.clone()
    saved[0](noise(2), at(1))
    assert torch.equal(one, before)


def test_floats_in_bfloat16_where_that_is_asked_for(net):
    narrow = compiled(net, Quantize("w8a8", **OPTIONS), target="openvino-bf16")
    asked = {"INFERENCE_PRECISION_HINT": "bf16"}.items()
    assert asked <= openvino_run.read_settings(narrow.folder).of("full").items()
    assert layers(narrow)["Convolution"] == (2, 2)
    if "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        assert 27 < narrow.manifest["parity"]["sqnr_db"] < 70
    with pytest.raises(ConfigError, match="backend='openvino'"):
        effuse.Config(passes=(), backend="onnx", target="openvino-bf16")


def test_what_does_not_fit_is_named(saved, tmp_path):
    with pytest.raises(InputError, match="sample"):
        saved[0](noise(batch=3), torch.tensor([45] * 3))
    with pytest.raises(BackendError, match=r"providers: .*OpenVINO"):
        effuse.load(saved[1], providers=["CUDAExecutionProvider"])


def test_a_part_that_this_openvino_cannot_read(saved, tmp_path):
    spec = saved[0].session.spec
    with pytest.raises(ArtifactError, match=r"openvino.json: missing"):
        openvino_run.open_session(spec, tmp_path)
    (tmp_path / "openvino.json").write_text(json.dumps({"precision": "u1", "groups": {}}))
    with pytest.raises(ArtifactError, match=r"openvino.json: .*damaged"):
        openvino_run.open_session(spec, tmp_path)
    openvino_run.write_settings(tmp_path, openvino_run.Settings())
    (tmp_path / "full.onnx").write_bytes(b"no model")
    with pytest.raises(ArtifactError, match=r"full.onnx: OpenVINO .* pip install -U openvino"):
        openvino_run.open_session(spec, tmp_path)


def test_without_openvino_the_way_to_it_is_named(saved, monkeypatch):
    from effuse.backends import openvino as backend

    assert backend.available() is None and backend.absent(None) is None
    monkeypatch.setitem(sys.modules, "openvino", None)
    assert "pip install 'effuse[openvino]'" in (backend.available() or "")
    with pytest.raises(ImportError, match=r"pip install 'effuse\[openvino\]'"):
        effuse.load(saved[1])
