"""Whole builds of two lossy passes in ONNX: what was planned runs, near the network itself."""

from __future__ import annotations

import functools
import logging

import diffusers
import onnx
import pytest
import torch
from torch import nn

import effuse
from effuse.metrics import sqnr_db
from effuse.passes import Cache, Hoist, Quantize, Skip

logging.getLogger("torch.__trace").disabled = True  # pytest's log capture would pay for it

TIMES = [900, 700, 500, 300, 100]
CACHE = Cache(interval=2, order=1, mode="block", include=("transformer_blocks.1",))
SKIP = Skip(steps={1: "transformer_blocks.0", 2: "transformer_blocks.2"}, what="block")
BUILDS = [  # a pass beside the cache, how often each variant runs, least SQNR (dB)
    (Quantize(), {"full": 4, "reuse": 1}, 30),
    (SKIP, {"full": 2, "full_skip1": 1, "full_skip2": 1, "reuse": 1}, 15),
]


@functools.cache
def network():
    torch.manual_seed(0)
    net = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, num_layers=3,
        sample_size=8, num_embeds_ada_norm=5, norm_num_groups=1,
    )  # fmt: skip
    for parameter in net.parameters():  # adaLN-zero would hide the blocks
        if parameter.count_nonzero() == 0:
            nn.init.normal_(parameter, std=0.05)
    return net.eval()


def trajectory():
    """A trajectory's inputs: noise that shrinks towards a picture."""
    generator = torch.Generator().manual_seed(0)
    noise, picture = torch.randn(2, 2, 4, 8, 8, generator=generator)
    for time in TIMES:
        share = time / 1000
        yield {
            "hidden_states": share * noise + (1 - share) * picture,
            "timestep": torch.full((2,), time),
            "class_labels": torch.tensor([1, 2]),
            "return_dict": False,
        }


def eight_bit_calls(path):
    graph = onnx.load(path, load_external_data=False).graph
    return sum(node.op_type == "QuantizeLinear" for node in graph.node)


@pytest.mark.parametrize(("other", "runs", "least"), BUILDS, ids=["quantize", "skip"])
def test_what_was_planned_beside_a_cache_runs_near_the_network(other, runs, least, tmp_path):
    config = effuse.Config(passes=(Hoist(), CACHE, other), backend="onnx")
    example = next(trajectory())
    made = effuse.compile(network(), config, inputs=example, schedule=TIMES, progress=False)
    assert made.manifest["parity"]["error"] < 1e-2
    loaded = effuse.load(made.save(tmp_path / "composed.effuse"))
    found = torch.stack([loaded(**given)[0] for given in trajectory()])
    assert loaded.session.steps == runs
    with torch.no_grad():
        exact = torch.stack([network()(**given)[0] for given in trajectory()])
    assert least < sqnr_db(exact.numpy(), found.numpy()) < 60
    quantized = {name: eight_bit_calls(loaded.folder / f"{name}.onnx") > 0 for name in runs}
    assert set(quantized.values()) == {other.name == "quantize"}
