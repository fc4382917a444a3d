"""LoRAs on compiled networks: what they add, that they leave no trace, and what is refused."""

from __future__ import annotations

import copy
import json
import logging
import subprocess
import sys
import textwrap
from dataclasses import replace

import numpy as np
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file
from torch import nn
from torch.nn import functional as F
from typer.testing import CliRunner

import effuse
from effuse.capture import capture
from effuse.cli_app import app
from effuse.errors import ConfigError, InputError, PassError, VerifyError
from effuse.lora import Factor, Loaded, joined
from effuse.lora_file import Pair
from effuse.pass_manager import run_passes
from effuse.passes import Cache, Canonicalize, Hoist, Lora, LowRank, Quantize, Smooth
from effuse.plan import Adapter, spec_from_json, to_json
from effuse.verify import verify

logging.getLogger("torch.__trace").disabled = True  # pytest's log capture would pay for it

SCHEDULE = list(range(900, -1, -100))
W4 = "int4/group32:none:int4/channel:none"
SMOOTH = Smooth(alpha=0.5, min_gain_db=-99.0)
BACKENDS = ("reference", "onnx")
TAKING = ("enter", "proj", "attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out", "attn2.to_q",
          "attn2.to_k", "attn2.to_v", "both", "ff.0", "ff.2", "leave")  # fmt: skip
LINEAR = tuple(name for name in TAKING if name.startswith(("attn", "ff")))


class Attention(nn.Module):
    """Two heads; queries of x, keys and values of c."""

    def __init__(self):
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(32, 32, bias=False) for _ in range(3))
        self.to_out = nn.Linear(32, 32)

    def forward(self, x, c):
        layers = (self.to_q, x), (self.to_k, c), (self.to_v, c)
        heads = [layer(each).unflatten(-1, (2, 16)).transpose(1, 2) for layer, each in layers]
        return self.to_out(F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))


class Net(nn.Module):
    """Convolutions, attention to itself and to the prompt, and a layer for both of them."""

    def __init__(self):
        super().__init__()
        self.time = nn.Linear(8, 32)
        self.enter, self.proj = nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(32, 32, 1)
        self.attn1, self.attn2 = Attention(), Attention()
        self.both, self.leave = nn.Linear(32, 32), nn.Conv2d(32, 3, 1)
        self.ff = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32))

    def forward(self, sample, timestep, encoder_hidden_states):
        angles = timestep.float()[:, None] * 0.001 * torch.arange(8)
        h = self.enter(sample) + self.time(angles.cos())[:, :, None, None]
        x = self.proj(F.silu(h)).flatten(2).transpose(1, 2)
        x = x + self.attn1(x, x)
        x = x + self.attn2(x, self.both(encoder_hidden_states))
        x = x + self.both(x) + self.ff(x)
        return self.leave(x.transpose(1, 2).reshape(h.shape))


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return Net().eval()


def inputs(seed=1, time=500, batch=2):
    generator = torch.Generator().manual_seed(seed)
    return {
        "sample": torch.randn(batch, 3, 8, 8, generator=generator),
        "timestep": torch.tensor([time] * batch),
        "encoder_hidden_states": torch.randn(batch, 5, 32, generator=generator),
    }


def compiled(net, *passes, backend="reference", **options):
    config = effuse.Config(passes=passes, backend=backend, **options)
    return effuse.compile(net, config, inputs=inputs(), schedule=SCHEDULE, progress=False)


def lora(net, path, rank=4, only=TAKING, seed=0, size=0.1):
    """A file of random factors for some layers, and the network with them merged."""
    generator = np.random.default_rng(seed)
    merged, tensors = copy.deepcopy(net), {}
    for name in only:
        weight = merged.get_submodule(name).weight.data
        down = generator.normal(size=(rank, *weight.shape[1:])).astype(np.float32)
        up = (size * generator.normal(size=(len(weight), rank))).astype(np.float32)
        product = torch.from_numpy(up @ down.reshape(rank, -1))
        weight += product.reshape(weight.shape)
        tensors |= {f"unet.{name}.lora_A.weight": down, f"unet.{name}.lora_B.weight": up}
    save_file(tensors, path)
    return path, merged


def error(one, other):
    return ((one - other).norm() / other.norm()).item()


def on(net, **given):
    with torch.no_grad():
        return net(**(given or inputs()))


@pytest.fixture(scope="module", params=BACKENDS)
def slotted(request, net):
    slots = Lora(max_rank=16, convolutions=True, exclude=("attn2.to_out",))
    return compiled(net, Hoist(), slots, backend=request.param, dynamic={"batch": (1, 8)})


@pytest.fixture
def result(slotted):
    yield slotted
    slotted.unload_lora()


# ---- what they add -------------------------------------------------------------------------------


def test_the_network_with_the_lora_merged(net, result, tmp_path):
    before = on(result)
    path, merged = lora(net, tmp_path / "style.safetensors")
    assert result.load_lora(path) == "style"
    assert error(on(result), on(merged)) < 2e-6 < 0.1 < error(on(result), before)
    other = inputs(batch=5)
    assert error(on(result, **other), on(merged, **other)) < 2e-6
    assert result.loras[0].scale == 1.0 and set(result.loras[0].ranks) == set(TAKING)


def test_scale_and_several_at_once(net, result, tmp_path):
    one, merged = lora(net, tmp_path / "one.safetensors", rank=2, seed=1)
    other, _ = lora(net, tmp_path / "other.safetensors", rank=5, seed=2, only=TAKING[2:6])
    result.load_lora(one, scale=0.5)
    half = copy.deepcopy(net)
    for mine, full in zip(half.parameters(), merged.parameters(), strict=True):
        mine.data.lerp_(full.data, 0.5)
    assert error(on(result), on(half)) < 2e-6
    result.load_lora(other, name="second")
    assert error(on(result), on(lora(half, other, rank=5, seed=2, only=TAKING[2:6])[1])) < 2e-6
    assert [each.name for each in result.loras] == ["one", "second"]
    result.load_lora(one, scale=-0.5, name="undone")
    result.unload_lora("second")
    assert error(on(result), on(net)) < 2e-6


def test_empty_slots_change_nothing(net, result):
    backend = result.manifest["backend"]
    plain = on(compiled(net, Hoist(), backend=backend))
    assert error(on(result), plain) < 1e-6
    assert backend == "onnx" or torch.equal(on(result), plain)


def test_layers_of_the_prompt_run_again(net, result, tmp_path):
    before = on(result)
    runs = result.session.runs["prompt"]
    path, merged = lora(net, tmp_path / "text.safetensors", only=("attn2.to_k", "attn2.to_v"))
    result.load_lora(path)
    assert error(on(result), on(merged)) < 2e-6 < 1e-2 < error(on(result), before)
    assert result.session.runs["prompt"] == runs + 1
    result.unload_lora()
    assert torch.equal(on(result), before)


def test_a_branch_that_is_there_takes_them(net, tmp_path):
    """Three layers share D, and two of them have a LoRA."""
    branch = LowRank(rank=4, format=W4, inputs=False, rounds=1, half=False)
    result = compiled(net, Hoist(), branch, Lora())
    slots = {each.path: each for each in result.session.spec.adapters}
    q, k, v = (slots[f"attn1.to_{name}"] for name in "qkv")
    assert q.down == k.down == v.down and len({q.up, k.up, v.up}) == 3
    path, merged = lora(
        net, tmp_path / "some.safetensors", only=("attn1.to_v", "attn1.to_q", "proj")
    )
    result.load_lora(path)
    assert error(on(result), on(merged)) < 4e-6
    result.unload_lora()
    path, merged = lora(net, path, only=("both",))  # read once a step, and once a picture
    result.load_lora(path, name="other")
    assert error(on(result), on(merged)) < 4e-6


def test_a_branch_in_half_precision_rounds_them(net, tmp_path):
    branch = LowRank(rank=4, format=W4, inputs=False, rounds=1, half=True)
    result = compiled(net, Hoist(), branch, Lora())
    path, merged = lora(net, tmp_path / "some.safetensors", only=("attn1.to_v", "attn2.to_q"))
    result.load_lora(path)
    assert error(on(result), on(merged)) < 1e-3
    with pytest.raises(InputError, match="beyond float16"):
        result.load_lora(path, scale=1e6, name="loud")
    assert error(on(result), on(merged)) < 1e-3


def test_on_smoothed_layers(net, tmp_path):
    """Columns of weights are scaled with their inputs, and rows for what reads them."""
    result = compiled(net, Hoist(), SMOOTH, Lora())
    slots = {each.path: each for each in result.session.spec.adapters}
    assert slots["attn1.to_q"].columns and slots["ff.0"].rows and slots["ff.0"].columns
    path, merged = lora(net, tmp_path / "style.safetensors", only=LINEAR)
    result.load_lora(path)
    assert error(on(result), on(merged)) < 4e-6


FEW_BITS = {
    "w8a8": (Quantize("w8a8", activations="dynamic", min_sqnr_db=-99.0),),
    "w4": (
        SMOOTH,
        LowRank(rank=4, format=W4, inputs=False, rounds=1, half=False),
        Quantize(W4, min_sqnr_db=-99.0),
    ),
}


@pytest.mark.parametrize("passes", FEW_BITS.values(), ids=FEW_BITS)
def test_on_quantized_layers(net, passes, tmp_path):
    """Back ends agree but for ties; what is added errs as the layers did before."""
    path, merged = lora(net, tmp_path / "style.safetensors", size=0.04, only=LINEAR)
    one, other = (compiled(net, Hoist(), *passes, Lora(), backend=each) for each in BACKENDS)
    base = error(on(one), on(net))
    for each in (one, other):
        each.load_lora(path)
    assert error(on(one), on(other)) < 2e-3
    assert error(on(one), on(merged)) < 1.5 * base < error(on(merged), on(net))


def test_calibrated_ranges_are_those_without_the_lora(net, tmp_path):
    """A LoRA that moves the output by a seventh fits them, one that moves it by more is clipped."""
    result = compiled(net, Hoist(), Quantize("w8a8", min_sqnr_db=-99.0), Lora())
    base = error(on(result), on(net))
    found = {}
    for size in (0.01, 0.04):
        path, merged = lora(net, tmp_path / f"{size}.safetensors", size=size, only=LINEAR)
        name = result.load_lora(path)
        found[size] = error(on(result), on(merged))
        result.unload_lora(name)
    assert found[0.01] < 1.5 * base < found[0.04] < 0.1 * error(on(merged), on(net))


def test_slots_leave_alone_which_layers_are_quantized(net):
    """The path through a slot of the last layer does not make last layers of all before it."""
    plain, slotted = (
        compiled(net, Hoist(), *each, Quantize("w8a8", min_sqnr_db=-99.0))
        for each in ((), (Lora(),))
    )
    layers = [{row["name"]: row["reason"] for row in each.manifest["layers"]}
              for each in (plain, slotted)]  # fmt: skip
    assert layers[0] == layers[1]
    assert list(layers[0].values()).count("last layer") == 1


def test_both_variants_of_a_cache(net, tmp_path):
    """As the network with the LoRA merged, compiled with the same plan."""
    path, merged = lora(net, tmp_path / "style.safetensors", only=LINEAR)
    passes = (Hoist(), Cache(at=("attn1",), interval=2))
    result, expected = compiled(net, *passes, Lora()), compiled(merged, *passes)
    result.load_lora(path)
    sample = inputs()["sample"]
    for number, time in enumerate(SCHEDULE):
        given = {**inputs(time=time), "sample": sample * 0.9**number}
        assert error(on(result, **given), on(expected, **given)) < 4e-6
    assert len(result.session.steps) == 2 and result.session.steps == expected.session.steps


# ---- that they leave no trace --------------------------------------------------------------------


def test_a_hundred_times_in_and_out(net, result, tmp_path):
    before = on(result)
    path, _ = lora(net, tmp_path / "style.safetensors")
    for _ in range(100):
        result.load_lora(path)
        result.unload_lora("style")
    assert torch.equal(on(result), before) and not result.loras


def test_unloading_leaves_what_the_others_give(net, result, tmp_path):
    one, other = (lora(net, tmp_path / f"{seed}.safetensors", seed=seed)[0] for seed in (1, 2))
    result.load_lora(one)
    alone = on(result)
    result.load_lora(other)
    result.unload_lora("2")
    assert torch.equal(on(result), alone)
    result.load_lora(other)
    result.unload_lora("1")
    late = on(result)
    result.unload_lora()
    result.load_lora(other)
    assert torch.equal(on(result), late) and not torch.equal(late, alone)


def test_saved_as_it_was_built_and_run_without_torch(net, slotted, tmp_path):
    path, merged = lora(net, tmp_path / "style.safetensors")
    before = on(slotted)
    slotted.load_lora(path)
    kept = slotted.save(tmp_path / "net.effuse")
    slotted.unload_lora()
    again = effuse.load(kept)
    assert torch.equal(on(again), before) and not again.loras
    if slotted.manifest["backend"] != "onnx":
        return
    given = {name: value.numpy() for name, value in inputs().items()}
    np.savez(tmp_path / "given.npz", **given, expected=on(merged).numpy())
    code = f"""
    import sys
    for name in ("torch", "safetensors", "onnx"):
        sys.modules[name] = None
    import numpy as np, effuse
    net = effuse.load({str(kept)!r})
    data = dict(np.load({str(tmp_path / "given.npz")!r}))
    expected = data.pop("expected")
    net.load_lora({str(path)!r})
    assert np.abs(net(**data) - expected).max() < 1e-5
    """
    code = textwrap.dedent(code)
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_on_the_command_line(net, slotted, tmp_path):
    path, _ = lora(net, tmp_path / "style.safetensors", size=0.03)
    other, _ = lora(net, tmp_path / "a:b.safetensors", seed=1, size=0.03)
    kept = slotted.save(tmp_path / "net.effuse")
    pictures = []
    for words in ((), ("--lora", path), ("--lora", f"{path}:0.5", "--lora", other)):
        png = tmp_path / f"{len(pictures)}.png"
        words = ("run", kept, "-o", png, "--size", "batch=2", *words)
        said = CliRunner().invoke(app, [str(word) for word in words])
        assert said.exit_code == 0, said.output
        pictures.append(png.read_bytes())
    assert "LoRA style: 13 layers, scale 0.5" in said.stdout
    assert "LoRA a:b: 13 layers, scale 1" in said.stdout
    assert len(set(pictures)) == 3


def test_the_models_ask_for_nothing_more(slotted):
    if slotted.manifest["backend"] != "onnx":
        pytest.skip("of the ONNX back end")
    for part in slotted.session.spec.parts:
        path = str(slotted.folder / f"{part.name}.onnx")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(path, options)
        assert {each.name for each in session.get_inputs()} == set(part.inputs)
        slots = {each.name: each.shape for each in session.get_overridable_initializers()}
        here = [each for each in slotted.session.spec.adapters if each.down in slots]
        assert here and all(slots[each.up][1] == slots[each.down][0] for each in here)
        assert all(str(slots[each.down][0]).startswith("rank_") for each in here)


# ---- what is refused -----------------------------------------------------------------------------


def test_bad_requests_change_nothing(net, result, tmp_path):
    path, _ = lora(net, tmp_path / "style.safetensors", rank=9)
    result.load_lora(path)
    before = on(result)
    left, _ = lora(net, tmp_path / "left.safetensors", only=("proj", "attn2.to_out"))
    gone, _ = lora(net, tmp_path / "gone.safetensors", only=("proj", "time"))
    for words, message in (
        ({"path": path}, "'style' is loaded already; hand another name="),
        ({"path": path, "name": ""}, "'' is empty"),
        ({"path": path, "name": "a", "scale": float("nan")}, "scale: expected a finite number"),
        ({"path": path, "name": "a", "scale": "1"}, "scale: expected a finite number"),
        ({"path": path, "name": "a"}, r"maximum of 16 in 13 layers.*\n.*: 9 \+ 9"),
        ({"path": left}, "1 of its 2 layers take no LoRA .*\n  attn2.to_out: among exclude"),
        ({"path": gone}, "1 of its 2 layers take no LoRA .*\n  time: Hoist has made tables"),
        ({"path": tmp_path / "none.safetensors"}, "none.safetensors"),
    ):
        with pytest.raises(InputError, match=f"(?s){message}"):
            result.load_lora(**words)
    with pytest.raises(InputError, match="'styl' is loaded; did you mean 'style'"):
        result.unload_lora("styl")
    assert torch.equal(on(result), before) and len(result.loras) == 1


def test_without_slots(net, tmp_path):
    path, _ = lora(net, tmp_path / "style.safetensors")
    with pytest.raises(InputError, match=r"add Lora\(\) to the passes"):
        compiled(net).load_lora(path)
    nothing = compiled(net, Lora(include=("nowhere",)))
    with pytest.raises(InputError, match=r"add Lora\(\) to the passes"):
        nothing.load_lora(path)


def test_layers_that_are_left_out_say_why(net):
    program = run_passes(capture(net, inputs(), timesteps=SCHEDULE),
                         (Canonicalize(), Hoist(), Lora(exclude=("attn1.*",))))  # fmt: skip
    reasons = {each.path: each.reason for each in program.adapters}
    assert reasons["attn1.to_q"] == "among exclude" and not reasons["attn2.to_q"]
    assert reasons["enter"] == "a convolution, without convolutions=True"
    assert not any(each.up for each in program.adapters if each.reason)


def test_what_computes_something_else_takes_none():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.other = nn.Linear(8, 8), nn.Linear(8, 8)
            self.free = nn.Parameter(torch.randn(8, 8))
            self.pair = nn.ParameterList([torch.randn(8, 8), torch.randn(8, 8)])
            self.other.weight = self.one.weight
            self.groups = nn.Conv2d(8, 8, 1, groups=2)

        def forward(self, sample, timestep):
            x = self.one(sample) + self.other(sample) * timestep.float()[:, None]
            return F.linear(x, self.free) + self.groups(x[:, :, None, None])[:, :, 0, 0]

    torch.manual_seed(0)
    given = {"sample": torch.randn(2, 8), "timestep": torch.tensor([1, 2])}
    program = run_passes(capture(Tied().eval(), given), (Canonicalize(), Lora()))
    slots = {each.path: each for each in program.adapters}
    assert set(slots) == {"one", "other", "groups"}  # F.linear is of no module
    assert slots["groups"].reason == "a grouped convolution"
    assert not slots["one"].reason and slots["one"].up != slots["other"].up


def test_the_pass_refuses(net):
    captured = capture(net, inputs(), timesteps=SCHEDULE)
    once = run_passes(captured, (Canonicalize(), Lora()))
    with pytest.raises(PassError, match="slots for LoRAs already"):
        run_passes(once, (Lora(),))
    with pytest.raises(ConfigError, match="max_rank: expected 1 or more, came 0"):
        Lora(max_rank=0)
    assert effuse.Config(passes=(Quantize(), Lora(), LowRank())).passes == (
        LowRank(), Lora(), Quantize(),
    )  # fmt: skip


def test_a_slot_without_its_weights_is_found(net):
    program = run_passes(capture(net, inputs()), (Canonicalize(), Lora()))
    broken = (replace(program.adapters[1], up="nowhere"), *program.adapters)
    with pytest.raises(VerifyError, match="no weight is called nowhere"):
        verify(replace(program, adapters=broken))
    wrong = (replace(program.adapters[1], shape=(3, 32)), *program.adapters)
    with pytest.raises(VerifyError, match=r"\(3, 32\): D is"):
        verify(replace(program, adapters=wrong))


def test_artifacts_without_slots_still_load(net):
    spec = run_passes(capture(net, inputs()), (Canonicalize(), Lora())).spec()
    data = json.loads(json.dumps(to_json(spec)))
    assert spec_from_json(data) == spec
    del data["adapters"], data["max_rank"]
    assert spec_from_json(data) == replace(spec, adapters=(), max_rank=0)


# ---- algebra -------------------------------------------------------------------------------------


@given(layers=st.integers(1, 4), kept=st.integers(0, 3), conv=st.booleans(),
       ranks=st.lists(st.tuples(st.integers(0, 15), st.integers(1, 4)), max_size=4),
       seed=st.integers(0, 99))  # fmt: skip
@settings(deadline=None, max_examples=60)
def test_joined_factors_give_the_sum_of_all_products(layers, kept, conv, ranks, seed):
    draw = np.random.default_rng(seed).normal
    kernel, ones = ((3, 3), (1, 1)) if conv else ((), ())
    group = [Adapter(f"l{n}", (6 + n, 5, *kernel), "d", f"u{n}") for n in range(layers)]
    stored = {"d": Factor(draw(size=(kept, 5, *kernel)), "float64")}
    stored |= {
        each.up: Factor(draw(size=(each.shape[0], kept, *ones)), "float64") for each in group
    }
    if not kept:  # a slot of its own: rank 1, of zeros
        stored = {name: replace(each, value=np.zeros([n or 1 for n in each.value.shape]))
                  for name, each in stored.items()}  # fmt: skip
    loaded = [
        Loaded(str(n), n - 1.5, {
            each.path: Pair(draw(size=(each.shape[0], rank)).astype(np.float32),
                            draw(size=(rank, 5, *kernel)).astype(np.float32))
            for place, each in enumerate(group) if which >> place & 1
        })
        for n, (which, rank) in enumerate(ranks)
    ]  # fmt: skip
    found = joined(group, stored, loaded)

    def product(up, down):
        return up.reshape(up.shape[:2]) @ down.reshape(len(down), 5 * 9 if conv else 5)

    for each in group:
        expected = product(stored[each.up].value, stored["d"].value)
        for one in loaded:
            if pair := one.pairs.get(each.path):
                expected = expected + one.scale * product(pair.up.astype(float), pair.down)
        assert np.allclose(product(found[each.up].value, found["d"].value), expected, atol=1e-6)
    added = sum(rank for which, rank in ranks for place in range(layers) if which >> place & 1)
    assert len(found["d"].value) == kept + added
