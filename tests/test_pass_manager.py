"""The manager verifies after every pass: seeded faults are found, and errors say where."""

from __future__ import annotations

import dataclasses
import logging
import math
import operator
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from effuse.build import rewrite
from effuse.capture import capture
from effuse.config import Config
from effuse.dump import dump
from effuse.errors import ConfigError, PassError, VerifyError
from effuse.graph import (
    calls,
    clone,
    eliminate,
    emit,
    emit_input,
    emit_weight,
    inputs,
    outputs,
    set_outputs,
    substitute,
    value_of,
)
from effuse.metrics import CEILING_DB, psnr_db, sqnr_db
from effuse.pass_manager import bisect, run_passes
from effuse.passes import ORDER, Canonicalize, Hoist, Pass, Quantize
from effuse.plan import Depends, Plan
from effuse.program import Part
from effuse.progress import Phases
from effuse.statistics import Calibration, Statistics
from effuse.verify import compare, exact_bound, relative_error, verify

logging.getLogger("torch.__trace").disabled = True  # pytest's log capture would pay for it

aten = torch.ops.aten


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(5))
        self.time, self.text = nn.Linear(1, 4), nn.Linear(3, 4)

    def forward(self, sample, timestep, prompt):
        h = sample + self.time(timestep.float()[:, None]) + self.text(prompt)
        for layer in self.layers:
            h = F.relu(layer(h)) + h
        return h


@pytest.fixture(scope="module")
def program():
    torch.manual_seed(0)
    values = {"sample": torch.randn(2, 4), "timestep": torch.tensor([7, 7])}
    values["prompt"] = torch.randn(2, 3)
    return capture(Net().eval(), values, timesteps=(9.0, 7.0, 1.0))


def edited(program, edit):
    """The program with `edit(graph, weights)` done to a copy of its first part."""
    (full,), weights = program.parts, dict(program.weights)
    graph, _ = clone(full.graph)
    edit(graph, weights)
    return replace(program, parts=(replace(full, graph=graph),), weights=weights)


def relu(graph):
    return calls(graph, aten.relu.default)[1]


def wrong_shape(graph, _):
    relu(graph).meta["val"] = value_of(relu(graph)).new_empty(3, 4)


def wrong_dtype(graph, _):
    relu(graph).meta["val"] = value_of(relu(graph)).half()


def no_value(graph, _):
    del relu(graph).meta["val"]


def in_place(graph, _):
    relu(graph).target = aten.relu_.default


def foreign(graph, _):
    relu(graph).target = torch.ops.profiler._record_function_enter_new.default


def misfit(graph, _):
    relu(graph).target = aten.mm.default


FAULTS = {
    wrong_shape: r"recorded as float32\[3x4\], but gives float32\[2x4\]",
    wrong_dtype: r"recorded as float16\[2x4\], but gives float32\[2x4\]",
    no_value: "it carries no recorded value",
    in_place: "it writes in place",
    foreign: "namespace 'profiler' is not allowed",
    misfit: "it does not accept its inputs",
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_seeded_fault_is_found_and_located(program, fault):
    wrong = edited(program, fault)
    with pytest.raises(VerifyError, match=FAULTS[fault]) as caught:
        verify(wrong, ["canonicalize", "broken"])
    place, passes, text = caught.value.__notes__
    assert str(caught.value).startswith("full: relu_1: ")
    assert "test_pass_manager.py" in place
    assert "h = F.relu(layer(h)) + h" in place
    assert passes == "after the passes: canonicalize, broken"
    marked = [line for line in text.splitlines() if line.startswith("> ")]
    assert len(marked) == 1
    assert "relu" in marked[0] or "mm" in marked[0] or "profiler" in marked[0]
    assert len(text.splitlines()) > 10


def test_an_error_names_the_module(program):
    def fault(graph, _):
        calls(graph, aten.linear.default)[3].meta["val"] = None

    with pytest.raises(VerifyError) as caught:
        verify(edited(program, fault))
    assert caught.value.__notes__[0].startswith("in layers.1; File ")
    assert caught.value.__notes__[1] == "after the passes: none"


def unknown_weight(graph, weights):
    del weights["layers.2.weight"]


def other_weight(graph, weights):
    weights["layers.2.weight"] = torch.zeros(4, 5)


def other_type(graph, weights):
    weights["layers.2.weight"] = torch.zeros(4, 4, dtype=torch.float64)


def nobodys_value(graph, _):
    node = relu(graph)
    substitute(node, emit_input(graph, "phantom", value_of(node)))


def backwards(graph, _):
    first, last = calls(graph, aten.relu.default)[0], calls(graph, aten.relu.default)[-1]
    first.args = (last,)


def more_outputs(graph, _):
    set_outputs(graph, (*outputs(graph), *outputs(graph)))


def a_module(graph, _):
    node = relu(graph)
    with graph.inserting_before(node):
        substitute(node, graph.call_module("layers.0", node.args))


WHOLE = {
    unknown_weight: "no weight is called 'layers.2.weight'",
    other_weight: r"recorded as float32\[4x4\], but stored as float32\[4x5\]",
    other_type: r"recorded as float32\[4x4\], but stored as float64\[4x4\]",
    nobodys_value: "nothing before it gives 'phantom'",
    backwards: "not well formed: .*before it has been defined",
    more_outputs: "1 outputs are named, but 2 returned",
    a_module: "a call_module is not allowed here",
}


@pytest.mark.parametrize("fault", WHOLE, ids=lambda fault: fault.__name__)
def test_a_fault_of_the_graph_is_found(program, fault):
    with pytest.raises(VerifyError, match=WHOLE[fault]) as caught:
        verify(edited(program, fault), ["broken"])
    assert "after the passes: broken" in caught.value.__notes__
    assert "> " in caught.value.__notes__[-1]


def test_a_part_that_computes_from_more_than_it_declares_is_found(program):
    (full,) = program.parts
    prompt = Part("prompt", Depends.PROMPT, clone(full.graph)[0], ("h",))
    with pytest.raises(VerifyError, match=r"declared Depends\.PROMPT, but computes from"):
        verify(program.with_parts(prompt, full))


def test_a_part_cannot_read_what_a_later_part_gives(program):
    (full,) = program.parts
    graph = torch.fx.Graph()
    value = value_of(outputs(full.graph)[0])
    set_outputs(graph, [emit_input(graph, "late", value)])
    other = torch.fx.Graph()
    set_outputs(other, [emit_input(other, "prompt", value_of(inputs(full.graph)[2]))])
    first = Part("first", Depends.PROMPT, graph, ("early",))
    second = Part("second", Depends.PROMPT, other, ("late",))
    verify(program.with_parts(second, first, full))
    with pytest.raises(VerifyError, match="first: late: nothing before it gives 'late'"):
        verify(program.with_parts(first, second, full))


def test_python_operators_on_sizes_are_checked_too(program):
    def sizes(graph, _):
        with graph.inserting_before(relu(graph)):
            size = emit(graph, aten.sym_size.int, inputs(graph)[0], 1)
            emit(graph, operator.mul, size, 2)

    verify(edited(program, sizes))


# the manager


@dataclass(frozen=True)
class Neutral(Pass):
    """relu(x) -> clamp(x, 0), one unit of fuel each; wrong at the relu number `wrong`."""

    name: ClassVar[str] = "neutral"
    wrong: int = -1
    low: float = 0.5

    def run(self, program, work):
        (full,) = program.parts
        graph, _ = clone(full.graph)
        for number, node in enumerate(calls(graph, aten.relu.default)):
            if work.log.spend("relu"):
                with graph.inserting_before(node):
                    low = self.low if number == self.wrong else 0.0
                    substitute(node, emit(graph, aten.clamp.default, *node.args, low, like=node))
        eliminate(graph)
        work.log.note("done")
        return replace(program, parts=(replace(full, graph=graph),))

    def ensures(self, program):
        return "a relu is left" if calls(program.parts[0].graph, aten.relu.default) else None


def test_an_exact_pass_that_changes_numbers_is_refused(program):
    assert run_passes(program, (Neutral(),)).records[0].error == 0.0
    with pytest.raises(VerifyError, match="neutral is exact, but moved the output by") as caught:
        run_passes(program, (Canonicalize(), Neutral(wrong=2)))
    assert caught.value.__notes__ == ["after the passes: canonicalize, neutral"]
    assert "effuse bisect" in str(caught.value)


def test_the_bound_of_exactness_is_a_few_roundings(program):
    moved = Neutral(wrong=2, low=1e-6)
    found = program.expected[0].abs().max().item()
    assert exact_bound(torch.float32) == 32 * 2**-23
    assert exact_bound(torch.bfloat16) == 32 * 2**-7
    with pytest.raises(VerifyError):
        run_passes(program, (dataclasses.replace(moved, low=100 * 2**-23 * found),))


@dataclass(frozen=True)
class Lossy(Neutral):
    name: ClassVar[str] = "lossy"
    exact: ClassVar[bool] = False


def test_a_lossy_pass_records_what_it_costs(program):
    result = run_passes(program, (Lossy(wrong=0, low=0.01),))
    (record,) = result.records
    error, ratio = compare(result)
    assert record.exact is False
    assert record.error == float(f"{error:.3g}") > 0
    assert record.sqnr_db == round(ratio, 2) < 60
    assert record.rewrites == {"relu": 5}
    assert record.notes == ("done",)
    assert record.options == {"include": [], "exclude": [], "wrong": 0, "low": 0.01}


def test_an_exact_pass_after_a_lossy_one_is_not_held_to_eager(program):
    result = run_passes(program, (Lossy(wrong=0), Canonicalize()))
    assert [record.exact for record in result.records] == [False, True]


@dataclass(frozen=True)
class Reshapes(Pass):
    name: ClassVar[str] = "reshapes"
    target: ClassVar = aten.unsqueeze.default
    args: ClassVar = (0,)

    def run(self, program, work):
        def edit(graph, _):
            (found,) = outputs(graph)
            with graph.inserting_before(graph.output_node()):
                set_outputs(graph, [emit(graph, self.target, found, *self.args)])

        return edited(program, edit)


class Casts(Reshapes):
    target = aten.to.dtype
    args = (torch.float64,)


@pytest.mark.parametrize("kind", [Reshapes, Casts])
def test_an_exact_pass_that_changes_the_outputs_type_is_refused(program, kind):
    with pytest.raises(VerifyError, match="moved the output by inf"):
        run_passes(program, (kind(),))


def test_requires_and_ensures(program):
    result = run_passes(program, (Canonicalize(), Hoist()))
    with pytest.raises(PassError, match="hoist: the program is in parts already"):
        run_passes(result, (Hoist(),))

    class Lazy(Neutral):
        def run(self, program, work):
            return program

    with pytest.raises(VerifyError, match="neutral does not hold what it promises: a relu is left"):
        run_passes(program, (Lazy(),))


def test_the_input_is_verified_and_left_alone(program):
    before = dump(program.parts[0].graph)
    result = run_passes(program, (Canonicalize(), Hoist()))
    assert dump(program.parts[0].graph) == before
    assert program.records == ()
    assert [record.name for record in result.records] == ["canonicalize", "hoist"]
    with pytest.raises(VerifyError) as caught:
        run_passes(edited(program, wrong_shape), ())
    assert "after the passes: none" in caught.value.__notes__


def test_fuel_stops_rewriting_over_all_passes(program):
    def clamps(result):
        return len(calls(result.parts[0].graph, aten.clamp.default))

    for fuel in range(7):
        assert clamps(run_passes(program, (Neutral(),), fuel=fuel)) == min(fuel, 5)
    assert clamps(run_passes(program, (Neutral(),))) == 5

    class Twice(Neutral):
        name: ClassVar[str] = "twice"

        def run(self, program, work):
            work.log.spend("nothing")
            work.log.spend("nothing")
            return program

        def ensures(self, program):
            return None

    result = run_passes(program, (Twice(), Neutral()), fuel=5)
    assert clamps(result) == 3
    assert [dict(record.rewrites) for record in result.records] == [{"nothing": 2}, {"relu": 3}]


@pytest.mark.parametrize("wrong", range(5))
def test_bisect_finds_the_seeded_rewrite(program, wrong):
    tried = []

    def good(fuel):
        tried.append(fuel)
        result = run_passes(program, (Lossy(wrong=wrong),), fuel=fuel)
        return compare(result)[0] <= exact_bound(torch.float32)

    assert bisect(good, 5) == wrong + 1
    assert len(tried) <= 2 + 3


def test_bisect_of_what_is_right_and_of_what_no_rewrite_broke():
    assert bisect(lambda fuel: True, 5) is None
    assert bisect(lambda fuel: False, 5) == 0
    for rewrites in (1, 2, 100):
        for first in range(1, rewrites + 1):
            assert bisect(lambda fuel, first=first: fuel < first, rewrites) == first


def test_passes_come_in_the_legal_order():
    assert Config(passes=(Quantize(), Hoist())).passes == (Hoist(), Quantize())
    assert Config(passes=("quantize", "hoist")).passes == (Hoist(), Quantize())
    given = [Quantize(min_sqnr_db=7.0), Canonicalize(), Hoist()]
    found = Config(passes=given).passes
    assert [type(each) for each in found] == [each for each in ORDER if each in map(type, given)]
    assert found[-1].min_sqnr_db == 7.0
    with pytest.raises(ConfigError, match="hoist is given twice"):
        Config(passes=(Hoist(), Quantize(), Hoist()))


def texts(folder):
    return {path.name: path.read_text() for path in sorted(folder.iterdir())}


def test_dumps_are_written_after_every_pass(program, tmp_path):
    result = run_passes(program, (Canonicalize(), Hoist()), dump_to=tmp_path / "new")
    found = texts(tmp_path / "new")
    assert list(found) == ["00-capture.txt", "01-canonicalize.txt", "02-hoist.txt"]
    assert found["00-capture.txt"] == f"# full\n{dump(program.parts[0].graph)}"
    parts = (f"# {part.name}\n{dump(part.graph)}" for part in result.parts)
    assert found["02-hoist.txt"] == "\n".join(parts)
    assert "# prompt\n" in found["02-hoist.txt"]


def test_effuse_dump_and_effuse_fuel(program, tmp_path, monkeypatch):
    config = Config(passes=(Hoist(),))
    monkeypatch.setenv("EFFUSE_DUMP", str(tmp_path / "dumps"))
    result = rewrite(program, config, None, Phases())
    assert list(texts(tmp_path / "dumps")) == [
        "00-capture.txt", "01-canonicalize.txt", "02-hoist.txt"
    ]  # fmt: skip
    assert len(result.parts) == 2
    monkeypatch.delenv("EFFUSE_DUMP")
    monkeypatch.setenv("EFFUSE_FUEL", "0")
    starved = rewrite(program, config, None, Phases())
    assert len(starved.parts) == 1
    assert len(list(tmp_path.iterdir())) == 1
    assert starved.records[1].rewrites == {}


def test_calibration_runs_once_and_only_when_asked_for(program):
    ran = []

    def calibration(current):
        ran.append([record.name for record in current.records])
        return Calibration(Statistics(), (), 1)

    @dataclass(frozen=True)
    class Asks(Pass):
        name: ClassVar[str] = "asks"
        calibrates: ClassVar[bool] = True

        def run(self, program, work):
            assert work.calibration is not None
            return program

    run_passes(program, (Canonicalize(), Hoist()), calibration)
    assert ran == []
    run_passes(program, (Canonicalize(), Asks(), Asks()), calibration)
    assert ran == [["canonicalize"]]


def test_calibration_runs_again_only_where_the_program_was_rewritten_since(program):
    ran, handed = [], []

    def calibration(current):
        ran.append([record.name for record in current.records])
        return Calibration(Statistics(), {}, len(ran))

    @dataclass(frozen=True)
    class Asks(Pass):
        name: ClassVar[str] = "asks"
        calibrates: ClassVar[bool] = True
        rewrites: int = 0

        def run(self, program, work):
            handed.append(work.calibration.calls)
            for _ in range(self.rewrites):
                work.log.spend("something")
            return program

    def calibrated(*passes):
        ran.clear()
        handed.clear()
        run_passes(program, passes, calibration)
        return [len(done) for done in ran], list(handed)

    assert calibrated(Asks(rewrites=1), Asks(), Asks()) == ([0, 1], [1, 2, 2])
    assert calibrated(Asks(), Neutral(), Asks()) == ([0, 2], [1, 2])
    assert calibrated(Neutral(), Asks(), Asks(rewrites=2)) == ([1], [1, 1])
    assert calibrated(Asks(rewrites=1), Neutral()) == ([0], [1])


def test_progress_counts_the_passes(program):
    said = []
    run_passes(program, (Canonicalize(), Hoist()), progress=lambda *what: said.append(what))
    assert said == [("canonicalize", 0, 2), ("hoist", 1, 2), ("verified", 2, 2)]


# the measures


def test_relative_error():
    one, other = torch.tensor([1.0, -4.0]), torch.tensor([1.5, -4.0])
    assert relative_error([one], [other]) == 0.125
    assert relative_error([one, other], [one, one]) == 0.125
    assert relative_error([one], [one * 0]) == 4.0  # against zeros: absolute
    number = torch.complex(one, one)
    assert relative_error([number.conj()], [number]) == 2.0  # the same real parts
    assert relative_error([torch.zeros(0)], [torch.zeros(0)]) == 0.0
    assert relative_error([one], [torch.tensor([[1.0], [-4.0]])]) == math.inf
    nan = torch.tensor([math.nan, 1.0])
    for pair in ((nan, one), (one, nan), (nan, nan), (one / 0, one), (one, one / 0)):
        assert relative_error([pair[0]], [pair[1]]) == math.inf


def test_decibels():
    signal = torch.tensor([3.0, -4.0], dtype=torch.float64).numpy()
    assert sqnr_db(signal, signal) == CEILING_DB
    assert sqnr_db(signal, signal * 0.9) == pytest.approx(20.0)
    assert sqnr_db(signal, signal * 0) == pytest.approx(0.0)
    assert sqnr_db(signal * 0, signal) == -CEILING_DB
    assert sqnr_db(signal, signal * math.nan) == -CEILING_DB
    assert sqnr_db(signal * 1e-15, signal * 1e-15 + 1e150) == -CEILING_DB
    assert psnr_db(signal, signal) == CEILING_DB
    assert psnr_db(signal, signal + 0.2) == pytest.approx(20.0)
    assert psnr_db(signal, signal + 0.2, peak=1.0) == pytest.approx(20.0 - 20 * math.log10(2))
    assert psnr_db(signal, signal * math.nan) == -CEILING_DB
    assert psnr_db(signal, signal * math.inf) == -CEILING_DB


def test_a_program_without_examples_is_not_measured(program):
    assert compare(replace(program, examples={}, expected=None)) is None
    result = run_passes(replace(program, examples={}, expected=None), (Canonicalize(),))
    assert result.records[0].error is None


def test_the_plan_is_verified_after_every_pass(program):
    class Loses(Neutral):
        def run(self, program, work):
            return replace(program, plan=Plan("gone"))

        def ensures(self, program):
            return None

    with pytest.raises(VerifyError, match="no variant is called 'gone'") as caught:
        run_passes(program, (Loses(),))
    assert caught.value.__notes__ == ["after the passes: neutral"]


def test_a_new_weight_is_part_of_the_program(program):
    def edit(graph, weights):
        with graph.inserting_before(graph.output_node()):
            emit_weight(graph, weights, "new", torch.zeros(3))

    verify(edited(program, edit))
