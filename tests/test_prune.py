"""Prune: the knapsack equals brute force, scores, budgets, bad input."""

from __future__ import annotations

import doctest
import functools
import io
import json
import logging
from dataclasses import replace
from itertools import pairwise

import diffusers
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from typer.testing import CliRunner

from effuse.calibrate import drive
from effuse.capture import capture
from effuse.cli_app import app
from effuse.cli_prune import show
from effuse.config import Config
from effuse.errors import ConfigError, PassError
from effuse.graph import calls, evaluate
from effuse.log import Log
from effuse.pass_manager import run_passes
from effuse.passes import (
    Canonicalize,
    Hoist,
    Prune,
    Quantize,
    prune_axes,
    prune_knapsack,
    prune_names,
    prune_scores,
    prune_ties,
)
from effuse.passes.base import Work
from effuse.passes.prune_candidates import find_candidates
from effuse.passes.prune_cost import forwards
from effuse.passes.prune_figures import rows, size_of
from effuse.passes.prune_knapsack import lightest
from effuse.passes.prune_scores import (
    correlation,
    latent_shifts,
    losses,
    magnitudes,
    record_inputs,
    shift,
)
from effuse.passes.prune_surgery import pruned
from effuse.passes.resume import Store
from effuse.verify import relative_error

logging.getLogger("torch.__trace").disabled = True  # pytest's log capture would pay for it

TIMES = (900.0, 600.0, 300.0, 100.0)

aten = torch.ops.aten

few = settings(deadline=None, max_examples=40)


def dit():
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=4, attention_head_dim=4, in_channels=4, num_layers=2, sample_size=8,
        patch_size=2, num_embeds_ada_norm=10,
    )  # fmt: skip
    return model, {"hidden_states": torch.randn(2, 4, 8, 8), "timestep": torch.full((2,), 300.0),
                   "class_labels": torch.tensor([1, 2])}  # fmt: skip


@functools.cache
def network():
    """A captured network whose biases, gates and norms are not those of a fresh one."""
    torch.manual_seed(0)
    model, inputs = dit()
    with torch.no_grad():
        for each in model.parameters():
            each += 0.1 * torch.randn_like(each)
    return captured(model, inputs)


def captured(model, inputs, times=TIMES):
    program = capture(model.eval(), inputs, timesteps=times)
    return run_passes(program, (Canonicalize(),))


@functools.cache
def found(kind, groups=None):
    return tuple(find_candidates(network(), (kind,), Log(), groups))


def sample(program, watch):
    drive(program, None, watch)


def run(program, **options):
    return run_passes(program, (Prune(**options),), drive=sample)


def outputs(program, values=None):
    graph = program.part("full").graph
    with torch.no_grad():
        return evaluate(graph, program.weights, values or program.examples)


def test_the_examples_of_the_docstrings_hold():
    for module in (prune_axes, prune_ties, prune_knapsack, prune_names, prune_scores):
        result = doctest.testmod(module)
        assert result.attempted and not result.failed


# ---- the knapsack --------------------------------------------------------------------------------

items = st.lists(st.tuples(st.floats(0, 10), st.integers(0, 30)), min_size=1, max_size=15)


@few
@given(items, st.floats(0, 1))
def test_the_knapsack_equals_brute_force(pairs, share):
    values, sizes = map(list, zip(*pairs, strict=True))
    need = round(share * sum(sizes))
    chosen = lightest(values, sizes, need)
    bits = np.arange(2 ** len(pairs))[:, None] >> np.arange(len(pairs)) & 1
    fitting = bits @ sizes >= need
    best = np.where(fitting, bits @ values, np.inf).min()
    assert sum(sizes[item] for item in chosen) >= need
    assert sum(values[item] for item in chosen) == pytest.approx(best, abs=1e-9)


@few
@given(items, st.integers(1, 10**9))
def test_rounded_sizes_still_meet_the_need(pairs, factor):
    values = [value for value, _ in pairs]
    sizes = [size * factor + size % 7 for _, size in pairs]
    needs = [round(share * sum(sizes)) for share in (0.2, 0.5, 1.0)]
    for need in needs:
        assert sum(sizes[item] for item in lightest(values, sizes, need)) >= need
    assert lightest(values, sizes, sum(sizes) + 1) is None


@few
@given(items)
def test_more_to_remove_never_costs_less(pairs):
    values, sizes = map(list, zip(*pairs, strict=True))
    costs = [sum(values[item] for item in lightest(values, sizes, need))
             for need in range(0, sum(sizes) + 1, 7)]  # fmt: skip
    assert all(one <= other + 1e-9 for one, other in pairwise(costs))


# ---- scores --------------------------------------------------------------------------------------


def test_a_sweep_that_was_interrupted_goes_on(tmp_path):
    program, every = network(), found("span")
    store, seen = Store(tmp_path), []

    def progress(what, done, total):
        if what != "prune: losses":
            return
        seen.append((done, total))
        if len(seen) == 3:
            raise KeyboardInterrupt

    with torch.no_grad():
        probes = record_inputs(program, 2, Work(drive=sample))
        with pytest.raises(KeyboardInterrupt):
            losses(program, every, probes, Work(progress=progress), store)
        kept = {file.name: file.stat().st_mtime_ns for file in tmp_path.iterdir()}
        assert len(kept) == 3
        resumed = losses(program, every, probes, Work(progress=progress), store)
        assert resumed.tolist() == losses(program, every, probes, Work()).tolist()
    assert seen[-1] == (8, 8)
    assert all((tmp_path / name).stat().st_mtime_ns == time for name, time in kept.items())
    assert len(list(tmp_path.iterdir())) == 8


def test_what_a_sweep_takes_is_told_before(tmp_path):
    program, every = network(), found("span")
    told = []
    work = Work(drive=sample, progress=lambda what, done, total: told.append(what))
    with torch.no_grad():
        probes = record_inputs(program, 2, Work(drive=sample))
        losses(program, every, probes, work, Store(tmp_path))
        count = 2 * forwards(program.part("full"), every)
        start = f"prune: losses of 4 spans on 2 inputs: about {count:.0f} forwards of "
        assert told[0].startswith(start) and told[0].endswith(" s")
        told.clear()
        losses(program, every, probes, work, Store(tmp_path))
        assert set(told) == {"prune: losses"}
        latent_shifts(program, every[:1], work, 0, None)
    assert any(what.startswith("prune: latents without 1 span: about 1 samp") for what in told)


def test_shifts_of_latents():
    torch.manual_seed(0)
    one = [torch.randn(4, 3, 5, 5)]
    other = [torch.randn(4, 3, 5, 5)]
    order = torch.randperm(4)
    assert shift(one, one) == 0
    assert shift(one, other) > 0.1
    assert shift([one[0][order]], [other[0][order]]) == pytest.approx(shift(one, other), rel=1e-5)
    program, every = network(), found("span")
    with torch.no_grad():
        found_ = latent_shifts(program, every, Work(drive=sample), 0, None)
    assert (found_ > 1e-3).all() and len(set(found_.tolist())) == len(every)


def test_magnitudes_are_those_of_what_goes():
    program, every = network(), found("head")
    whole = sum(float(program.weights[name].double().square().sum()) for name in program.weights)
    for each, found_ in zip(every, magnitudes(program, every), strict=True):
        less = pruned(program, [each])
        left = sum(float(less.weights[name].double().square().sum()) for name in less.weights)
        assert found_ == pytest.approx(whole - left, rel=1e-6)


def test_a_correlation_needs_something_to_vary():
    assert correlation([1.0, 2.0, 3.0], [2.0, 4.0, 6.0]) == pytest.approx(1)
    assert correlation([1.0, 1.0], [2.0, 4.0]) is None
    assert correlation([], []) is None


def test_groups_are_of_like_magnitude():
    program, every = network(), found("unit", 4)
    site = every[0].site
    assert site.count == 4 and {each.parameters for each in every} == {16 * 33}
    weight = program.weights[f"{site.name.removesuffix('.0')}.2.weight"]
    assert weight.shape == (16, 64)
    sums = magnitudes(program, every)[:4]
    assert all(one < other for one, other in pairwise(sums.tolist()))


# ---- the pass ------------------------------------------------------------------------------------


def test_a_budget_is_met_at_a_loss_that_grows_with_it():
    program = network()
    costs = []
    for share in (0.05, 0.1, 0.2):
        record = run(program, parameters=share, calls=2).records[-1]
        shares = [float(word.rstrip("%")) for word in record.notes[0].split() if "%" in word]
        assert shares[0] >= 100 * share - 0.05
        assert record.sqnr_db is not None and not record.exact
        costs.append(float(record.notes[1].split()[6]))
        assert "additivity: correlation" in record.notes[2]
    assert costs[0] <= costs[1] < costs[2]


def test_figures_are_kept_as_data():
    program = network()
    done = run(program, parameters=0.1, calls=1)
    data = done.records[-1].data
    assert json.loads(json.dumps(done.records[-1].to_json()))["data"] == data
    assert (data["by"], data["measure"], data["budget"]) == ("loss", "parameters", 0.1)
    told = data["candidates"]
    for name in ("name", "parameters", "flops"):
        assert [each[name] for each in told] == [getattr(each, name) for each in found("span")]
    gone = [each for each in told if each["gone"]]
    assert 0 < len(gone) < len(told)
    for measure, share in data["removed"].items():
        left = size_of(done, measure) / size_of(program, measure)
        assert share == pytest.approx(1 - left, rel=1e-5)
    predicted, measured = data["additivity"]["chosen"]
    assert predicted == pytest.approx(sum(each["score"] for each in gone), rel=1e-4)
    assert measured > 0
    assert len(data["additivity"]["predicted"]) == len(data["additivity"]["measured"]) == 8
    assert "data" not in done.records[0].to_json()


def test_a_score_that_is_not_finite_is_none_as_data():
    every = found("span")[:2]
    scores = [each["score"] for each in rows(every, np.array([np.inf, 0.5]), {1})]
    assert scores == [None, 0.5]


@pytest.mark.parametrize("by", ("latent", "magnitude", "random"))
def test_every_criterion_meets_a_budget_of_arithmetic(by):
    program = network()
    less = run(program, flops=0.3, by=by)
    assert size_of(less, "flops") <= 0.7 * size_of(program, "flops")
    again = run(program, flops=0.3, by=by)
    assert less.records[-1].notes == again.records[-1].notes


def test_an_atom_of_each_site_stays():
    less = run(network(), parameters=0.2, what=("head", "unit"), groups=4, by="magnitude")
    assert any(each["gone"] for each in less.records[-1].data["candidates"])
    attention = calls(less.part("full").graph, aten.scaled_dot_product_attention.default)
    assert all(node.meta["val"].shape[1] >= 1 for node in attention)


def test_it_comes_before_all_that_makes_parts_and_formats():
    config = Config(passes=(Quantize("w8a8"), Hoist(), Prune(parameters=0.2)))
    assert [each.name for each in config.passes] == ["prune", "hoist", "quantize"]
    (again,) = Config(passes=({"name": "prune", "flops": 0.1, "what": ("head", "unit")},)).passes
    assert again.kinds == ("head", "unit") and again.measure == "flops"


def test_fuel_stops_it():
    program = network()
    done = run_passes(program, (Prune(parameters=0.3, by="magnitude"),), fuel=0)
    assert size_of(done, "parameters") == size_of(program, "parameters")
    assert relative_error(outputs(done), outputs(program)) == 0


def test_what_breaks_the_network_stays():
    program = network()
    name = "transformer_blocks.0.ff.net.2.bias"
    weights = dict(program.weights)
    weights[name] = torch.full_like(weights[name], -1e38)
    huge = replace(program, weights=weights, expected=None)
    span = found("span")[1]
    with torch.no_grad():
        swept = losses(huge, [span], [dict(huge.examples)], Work())
    assert not np.isfinite(swept).all()


# ---- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "one budget"),
        ({"parameters": 0.1, "flops": 0.1}, "one budget"),
        ({"milliseconds": 0.1, "flops": 0.1}, "one budget"),
        ({"milliseconds": 1.5}, "milliseconds=1.5: expected a share"),
        ({"parameters": 0.1, "by": "masks"}, "masks are learned for heads and hidden units"),
        ({"parameters": 0.1, "by": "masks", "what": ("head", "channel")}, "masks are learned"),
        ({"parameters": 0.1, "updates": 0}, "updates=0"),
        ({"parameters": 1.0}, "between 0 and 1"),
        ({"flops": 0.0}, "between 0 and 1"),
        ({"parameters": 0.1, "by": "los"}, "did you mean 'loss'"),
        ({"parameters": 0.1, "what": "heads"}, "did you mean 'head'"),
        ({"parameters": 0.1, "what": ("span", "head")}, "hold what the other kinds cut"),
        ({"parameters": 0.1, "what": ()}, "expected 'span'"),
        ({"parameters": 0.1, "calls": 0}, "calls=0"),
        ({"parameters": 0.1, "groups": 1}, "groups=1"),
    ],
)
def test_bad_options_are_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        Prune(**options)


def test_a_budget_that_cannot_be_met_says_the_most():
    with pytest.raises(PassError, match=r"all 6 candidates \(of head\) \d+\.\d% is removed"):
        run(network(), parameters=0.5, what="head", by="random")


def test_it_runs_before_other_passes():
    with pytest.raises(PassError, match="it runs before hoist, quantize"):
        run_passes(network(), (Hoist(), Quantize("w8a8", activations="dynamic"),
                                    Prune(parameters=0.1)))  # fmt: skip


def test_measuring_needs_calibration():
    with pytest.raises(PassError, match="by='magnitude'"):
        run_passes(network(), (Prune(parameters=0.1),))


def test_nothing_to_prune():
    with pytest.raises(PassError, match="has no channel"):
        run(network(), parameters=0.1, what="channel")
    with pytest.raises(PassError, match="include and exclude leave none"):
        run(network(), parameters=0.1, exclude=("*",))
    only = run(network(), parameters=0.05, by="random", include=("*.1.*",))
    names = [each["name"] for each in only.records[-1].data["candidates"]]
    assert names and all("blocks.1" in name for name in names)


def test_inspect_lists_the_candidates_without_weights():
    sizes = ("num_layers=2", "sample_size=8", "num_attention_heads=4", "attention_head_dim=4")
    settings = (word for size in sizes for word in ("--set", size))
    words = ("diffusers.DiTTransformer2DModel", *settings, "--prune")
    data = json.loads(CliRunner().invoke(app, ["inspect", *words, "--json"]).stdout)
    page = Console(file=io.StringIO(), width=200)
    show(page, data)
    said = page.file.getvalue()
    assert "transformer_blocks.1.ff.net.2" in said and "no candidates" in said
    rows = {(each["kind"], each["name"]): each for each in data["candidates"]}
    assert rows["head", "transformer_blocks.0.attn1"]["count"] == 4
    assert rows["unit", "transformer_blocks.1.ff.net.0"]["parameters"] == 64 * 33
    assert {kind for kind, _ in rows} == {"span", "block", "head", "unit"}
    assert any("layer_norm" in reason for reason in data["rejected"]["unit"])
    assert "a sweep by loss takes for each input" in said
    assert data["forwards"].keys() == {"span", "block", "head", "unit"}
    assert 2 < data["forwards"]["block"] < data["forwards"]["span"] < 2 + 4


def test_inspect_refuses_an_artifact(tmp_path):
    (tmp_path / "manifest.json").write_text("{}")
    result = CliRunner().invoke(app, ["inspect", str(tmp_path), "--prune"])
    assert result.exit_code == 1 and "compiled already" in str(result.output)
