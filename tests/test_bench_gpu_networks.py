"""The networks of the benchmark on a GPU: official sizes, and how they are compiled."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("triton")

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"
META = torch.device("meta")
CPU = torch.device("cpu")


@pytest.fixture
def module(monkeypatch):
    """A module of the benchmark, which runs as a script among its neighbours."""
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module


def count(network):
    return sum(each.numel() for each in network.parameters())


def test_networks_are_as_large_as_the_official_ones(module):
    blocks, unet = module("gpu_blocks"), module("gpu_unet")
    with META:
        double, single = count(blocks.Double()), count(blocks.Single())
        whole = count(blocks.Flux(19, 38))
        sdxl = count(unet.Unet(unet.Shape(depths=(0, 2, 10))))
    assert (double, single) == (339_831_296, 141_591_808)
    assert whole == 11_901_408_320  # FLUX.1-dev, as diffusers counts it
    assert sdxl == 2_567_463_684


def test_networks_take_their_inputs(module):
    blocks, unet = module("gpu_blocks"), module("gpu_unet")
    sizes = blocks.Sizes(width=64, heads=2, text=5, image=9, prompt=24, pooled=16, latent=8)
    for kind, make in (("Double", lambda: blocks.Double(sizes)),
                       ("Single", lambda: blocks.Single(sizes)),
                       ("Flux", lambda: blocks.Flux(1, 1, sizes))):  # fmt: skip
        network = blocks.randomized(make())
        names = blocks.parameters(getattr(blocks, kind))
        inputs = blocks.flux_inputs(names, sizes, torch.float32)
        result = network(**inputs)
        result = result[0] if isinstance(result, tuple) else result
        assert result.shape == inputs["hidden_states"].shape and result.isfinite().all()
    shape = unet.Shape((32, 64), (0, 1), 32, 24, 20, 1, 4, 3, 8)
    inputs = unet.unet_inputs(shape, torch.float32)
    assert blocks.randomized(unet.Unet(shape))(**inputs).shape == inputs["sample"].shape


def test_positions_turn_pairs_and_keep_lengths(module):
    blocks = module("gpu_blocks")
    cos, sin = blocks.rotation(blocks.Sizes(width=64, heads=2, text=2, image=9))
    x = torch.randn(1, 2, 11, 32)
    turned = blocks.rotated(x, cos, sin)
    assert torch.equal(turned[:, :, :3], x[:, :, :3])  # text, and the first pixel, are at (0, 0)
    assert torch.allclose(turned.norm(dim=-1), x.norm(dim=-1), rtol=1e-5)
    assert (turned[:, :, 3:] - x[:, :, 3:]).abs().amax(-1).min() > 0.1


def test_a_network_is_compiled_without_running_it(module):
    pytest.importorskip("onnxruntime")
    blocks, ends, time = module("gpu_blocks"), module("gpu_ends"), module("gpu_time")
    sizes = blocks.Sizes(width=64, heads=2, text=2, image=4)
    network = blocks.Network(
        "tiny", "", lambda: blocks.Single(sizes),
        lambda: blocks.flux_inputs(blocks.parameters(blocks.Single), sizes),
    )  # fmt: skip
    subject = ends.Subject(network, time.Bench(CPU))
    program = subject.program(ends.FORMATS["w8a8"])
    assert not any(layer.reason for layer in program.layers) and len(program.layers) == 6
    fused = ends.inductor(program, CPU)
    used = {str(node.target) for node in fused.graph.nodes}
    assert {"effuse.linear_scaled.default", "effuse.row_norm.default"} <= used
    found = ends.first(fused(**subject.here))
    assert ends.sqnr_db(ends._floats(subject.expected), ends._floats(found)) > 30


def test_convolutions_stay_in_float(module):
    pytest.importorskip("onnxruntime")
    ends = module("gpu_ends")
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Linear(4, 4))
    (passes,) = ends.floats_kept(network, ends.FORMATS["fp8"])
    assert passes.layers == (("0", "float"),)


def test_candidates_are_prepared_and_compared(module):
    pytest.importorskip("onnxruntime")
    blocks, ends, time = module("gpu_blocks"), module("gpu_ends"), module("gpu_time")
    sizes = blocks.Sizes(width=64, heads=2, text=2, image=4)
    network = blocks.Network(
        "tiny", "", lambda: blocks.Single(sizes),
        lambda: blocks.flux_inputs(blocks.parameters(blocks.Single), sizes),
    )  # fmt: skip
    bench = time.Bench(CPU, rounds=1, times=1)
    subject = ends.Subject(network, bench)
    candidate, row = ends.prepared(bench, subject, subject.eager)
    assert row["sqnr_db"] >= 100 and row["weight_bytes"] == 2 * count(subject.module)
    assert torch.equal(candidate.call(), subject.expected)
    figures = {ends.EAGER: {"ms": 2.0, "ms_rounds": [2.0]}, "x": {"ms": 1.0, "ms_rounds": [1.0]}}
    assert ends.versus(figures["x"], figures) == {"over_eager": 2.0}
