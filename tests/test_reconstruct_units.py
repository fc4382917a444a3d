"""Rounding learned by units: which units there are, what they learn, and going on after a stop."""

from __future__ import annotations

import functools
import logging
from itertools import pairwise

import pytest
import torch
from diffusers import DiTTransformer2DModel, UNet2DModel
from torch import nn

from effuse.calibrate import calibrate, step_values
from effuse.capture import capture
from effuse.errors import PassError
from effuse.graph import calls, evaluate
from effuse.kernels.formats import parse
from effuse.kernels.quantizers import round_trip
from effuse.pass_manager import run_passes
from effuse.passes import Canonicalize, Hoist, Quantize
from effuse.passes.base import Work
from effuse.passes.quantize_sites import SITES, recipe, sites
from effuse.passes.quantize_writer import Rounded, plain
from effuse.passes.reconstruct import Recipe
from effuse.passes.reconstruct_units import SHARE, rounded_by_reconstruction
from effuse.passes.resume import Store
from effuse.passes.rounded import rounded_by_gptq, weight_name
from effuse.passes.units import Frontier, piece, sources, units
from effuse.plan import Rate

logging.getLogger("torch.__trace").disabled = True  # pytest's log capture would pay for it

TIMES = (900.0, 500.0, 100.0)
FORMAT = "int3/channel:none"


class Blocks(nn.Module):
    """Three residual blocks on correlated values, between two layers."""

    def __init__(self):
        super().__init__()
        self.enter, self.leave = nn.Linear(8, 16), nn.Linear(16, 8)
        self.up = nn.ModuleList(nn.Linear(16, 24) for _ in range(3))
        self.down = nn.ModuleList(nn.Linear(24, 16) for _ in range(3))

    def forward(self, sample, timestep):
        x = self.enter(sample) + timestep.float().div(1000).cos()[:, None, None]
        for up, down in zip(self.up, self.down, strict=True):
            x = x + down(torch.nn.functional.gelu(up(x)))
        return self.leave(x)


@functools.cache
def blocks():
    torch.manual_seed(0)
    values = {"sample": torch.randn(4, 32, 8), "timestep": torch.full((4,), 900)}
    return prepared(Blocks(), values)


def prepared(module, values):
    program = capture(module.eval(), values, timesteps=TIMES)
    return run_passes(program, (Canonicalize(), Hoist()))


@functools.cache
def calibration():
    return calibrate(blocks(), None, step_values)


def layers_of(program, format=FORMAT):
    part = program.part("full")
    return {s: recipe(s, parse(format), Rate.STEP, "format") for s in sites(part, program.weights)}


def learned(iterations=150, resume="", progress=lambda what, done, total: None):
    program = blocks()
    return rounded_by_reconstruction(
        program.part("full"), program, program.weights, {}, layers_of(program),
        calibration().probes["full"], progress, Recipe(iterations=iterations), resume,
    )  # fmt: skip


def unet():
    torch.manual_seed(0)
    model = UNet2DModel(
        sample_size=8, in_channels=3, out_channels=3, block_out_channels=(8, 16),
        layers_per_block=1, down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"), norm_num_groups=4, attention_head_dim=8,
    )  # fmt: skip
    values = {"sample": torch.randn(2, 3, 8, 8), "timestep": torch.tensor(900)}
    return prepared(model, {**values, "return_dict": False})


def dit():
    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=4, in_channels=3, out_channels=3, num_layers=3,
        sample_size=8, patch_size=4, num_embeds_ada_norm=5, norm_elementwise_affine=False,
    )  # fmt: skip
    values = {"hidden_states": torch.randn(2, 3, 8, 8), "timestep": torch.tensor([900, 900]),
              "class_labels": torch.tensor([0, 5]), "return_dict": False}  # fmt: skip
    return prepared(model, values)


# ---- units ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("network", "most_layers"), [(unet, 8), (dit, 6), (blocks, 2)])
def test_units_cover_each_layer_once_in_order(network, most_layers):
    program = network()
    part = program.part("full")
    wanted = calls(part.graph, *SITES)
    found = units(part, program, wanted)
    inside = [layer for unit in found for layer in unit.layers]
    assert sorted(inside, key=wanted.index) == wanted and len(set(inside)) == len(wanted)
    nodes = [node for unit in found for node in unit.nodes]
    assert len(set(nodes)) == len(nodes)
    assert max(len(unit.layers) for unit in found) == most_layers
    assert sum(len(unit.layers) for unit in found if len(unit.layers) > 1) > len(wanted) / 2
    assert all(unit.outputs for unit in found)
    for one, other in pairwise(found):  # nothing reads what comes later
        assert not set(sources(one.nodes)) & set(other.nodes)


@pytest.mark.parametrize("network", [unet, dit])
def test_a_frontier_and_the_units_give_the_values_of_the_whole_graph(network):
    program = network()
    part = program.part("full")
    found = units(part, program, calls(part.graph, *SITES))
    probe = calibrate(program, None, step_values).probes["full"][0]
    whole = {}
    evaluate(part.graph, program.weights, probe, lambda node, value: whole.update({node: value}))
    frontier = Frontier(part.graph, [unit.givens for unit in found])
    values = {n.name: probe[str(n.target)] for n in part.graph.nodes if n.op == "placeholder"}
    most = 0
    for unit in found:
        graph = frontier.advance()
        made = evaluate(graph, program.weights, values)
        values |= zip(frontier.names, made, strict=True)
        live = {node.name for node in frontier.at_hand}
        values = {name: value for name, value in values.items() if name in live}
        most = max(most, len(values))
        given = evaluate(piece(unit.nodes, unit.outputs), program.weights, values)
        for node, value in zip(unit.outputs, given, strict=True):
            assert torch.equal(value, whole[node])
    assert most < len(whole) / 3  # what was read is dropped


# ---- what is learned -----------------------------------------------------------------------------


def output_error(rounded):
    """Of the network's output on the probes, over its power."""
    program = blocks()
    graph = program.part("full").graph
    weights = dict(program.weights)
    weights |= {name: each.values.view(weights[name].shape) for name, each in rounded.items()}
    noise = signal = 0.0
    for probe in calibration().probes["full"]:
        exact = evaluate(graph, program.weights, probe)[0]
        noise += (evaluate(graph, weights, probe)[0] - exact).square().sum().item()
        signal += exact.square().sum().item()
    return noise / signal


def test_learning_lowers_the_error_of_gptq_and_nearest():
    program = blocks()
    found = learned()
    part, how = program.part("full"), layers_of(program)
    probes = calibration().probes["full"]
    gptq = rounded_by_gptq(part.graph, program.weights, {}, how, probes, lambda *_: None)
    nearest = {}
    for site, each in how.items():
        start = plain(program.weights[weight_name(site)], each)
        nearest[weight_name(site)] = Rounded(round_trip(start.values, each.weight), start.scale)
    errors = [output_error(each) for each in (found.rounded, gptq, nearest)]
    assert errors == sorted(errors) and errors[0] < 0.95 * errors[1]
    assert all(share <= 1 for share in found.shares) and min(found.shares) < 0.9
    for site, each in how.items():  # still on the grid, under the scales that were there
        rounded = found.rounded[weight_name(site)]
        codes = rounded.values / rounded.scale
        assert torch.allclose(codes, codes.round(), atol=1e-4)
        assert codes.abs().max() <= 2 ** (each.weight.grid.bits - 1) - 1 + 1e-4


def test_progress_runs_over_all_units():
    told = []
    learned(4, progress=lambda *each: told.append(each))
    seen = [done for what, done, total in told if what == "reconstruct"]
    assert seen == sorted(seen) and seen[-1] == told[-1][2] == 4 * 5  # units


class Stop(Exception):
    pass


def stop_in_third(what, done, total):
    if what == "reconstruct" and done == 2 * 5 + 2:
        raise Stop


def test_an_interrupted_run_goes_on_and_gives_the_same_bytes(tmp_path):
    whole = learned(5)
    with pytest.raises(Stop):
        learned(5, str(tmp_path), stop_in_third)
    kept = sorted(tmp_path.iterdir())
    assert len(kept) == 2
    times = [path.stat().st_mtime_ns for path in kept]
    again = learned(5, str(tmp_path))
    assert [path.stat().st_mtime_ns for path in kept] == times
    assert again.shares == whole.shares and len(list(tmp_path.iterdir())) == 5
    for name, each in whole.rounded.items():
        assert torch.equal(again.rounded[name].values, each.values)
    learned(6, str(tmp_path))  # another recipe is another result
    assert len(list(tmp_path.iterdir())) == 10


def test_a_damaged_file_is_learned_anew_and_a_bad_folder_refused(tmp_path):
    before = learned(5, str(tmp_path))
    files = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for path in files:
        path.write_bytes(path.read_bytes()[:-20])
    after = learned(5, str(tmp_path))
    assert after.shares == before.shares
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == files
    taken = tmp_path / "taken"
    taken.write_text("")
    with pytest.raises(PassError, match="resume: expected a folder"):
        Store.of(str(taken))
    assert Store.of("") is None and SHARE not in before.rounded


def test_the_pass_stores_what_was_learned(tmp_path):
    options = {"format": "int4/channel:none", "edges": True, "min_sqnr_db": 0.0}
    pass_ = Quantize(**options, rounding="reconstruct", iterations=20, resume=str(tmp_path))
    work = Work(calibration=calibration())
    with torch.no_grad():
        found = pass_.run(blocks(), work)
        plain = Quantize(**options).run(blocks(), Work(calibration=calibration()))
    assert "5 blocks learned" in work.log.notes[-1]
    names = [name for name in found.weights if name.endswith(".int4")]
    assert len(names) == 8
    assert any(not torch.equal(found.weights[n], plain.weights[n]) for n in names)
    assert "iterations" in Quantize(iterations=0).requires(blocks())
