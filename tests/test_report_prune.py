"""Pruning and recovery in reports: tables, sentences, charts from 1 candidate to 300."""

import html
import io
import re

import numpy as np
import pytest
from rich.console import Console

from effuse.report import Report, write_html
from effuse.report_prune import (
    LISTED,
    MOST_ROWS,
    Scale,
    every_table,
    importance_chart,
    places,
    prune_lines,
    rows_of,
)

NO_BREAK = "\N{NO-BREAK SPACE}"
NASTY = '<script>alert("x")</script> & [bold]a block[/bold]'


def manifest(*passes):
    return {"program": {"inputs": []}, "passes": list(passes)}


def shown(text):
    """The words between the tags."""
    bare = re.sub(r"<style>.*?</style>|<[^>]+>", " ", str(text), flags=re.DOTALL)
    return " ".join(html.unescape(bare).replace(NO_BREAK, " ").split())


def page(tmp_path, given):
    path = write_html(tmp_path / "r.html", {"x": Report(given)}, None)
    return path.read_text(encoding="utf-8")


def terminal(given):
    console = Console(file=io.StringIO(), width=150)
    Report(given).summary(console)
    return console.file.getvalue()


def candidate(name, score, gone=False, parameters=1000, kind="span"):
    return {"name": name, "kind": kind, "parameters": parameters, "flops": 10 * parameters,
            "score": score, "gone": gone}  # fmt: skip


def pruned(candidates, **changes):
    data = {
        "by": "loss", "measure": "parameters", "budget": 0.2, "candidates": candidates,
        "removed": {"flops": 0.274, "parameters": 0.213}, **changes,
    }  # fmt: skip
    return manifest({"name": "prune", "data": data})


def some(count=4):
    return [candidate(f"blocks.{n}.ff", 0.1 / (n + 1), n == 1, 1000 * (n + 1))
            for n in range(count)]  # fmt: skip


def sums(**changes):
    return {"predicted": [0.1, 0.2, 0.4], "measured": [0.1, 0.3, 0.5], "correlation": 0.968,
            "chosen": [0.05, 0.061], **changes}  # fmt: skip


COURSE = {"updates": [1, 50, 100], "loss": [3.0, 1.0, 0.5], "before": 0.31, "after": 0.121,
          "updates_total": 100}  # fmt: skip


def marks(chart):
    """How many rings and diamonds the chart has, its legend aside."""
    styles = re.findall(r'<(?:use|path) [^>]*style="([^"]+)"', str(chart))
    rings = sum("fill: none; stroke: var(--series-0)" in style for style in styles)
    diamonds = sum("fill: var(--series-1)" in style for style in styles)
    return max(rings - 1, 0), max(diamonds - 1, 0)


def test_the_page_tells_what_went_and_how_well_it_recovered(tmp_path):
    given = pruned(some(), additivity=sums())
    given["passes"].append({"name": "distill", "data": COURSE})
    words = shown(page(tmp_path, given))
    for text in (
        "1 of 4 candidates went, and with them 21.3 % of the parameters and 27.4 % of the arith",
        "relative squared error of the output without it (logarithmic)",
        "Pruned candidate kind parameters GFLOPs score blocks.1.ff span 2 k 2e-05 0.05",
        "All candidates, in the graph's order 4",
        "without all that went: 0.061, where single losses add up to 0.05. Over 3 random sets the "
        "correlation is 0.97.",
        "100 updates took the output's relative error from 31.0 % to 12.1 %",
    ):
        assert text in words


def test_what_went_is_marked_differently():
    every = [candidate(f"blocks.{n}", 0.1 * (n + 1), n in (1, 4)) for n in range(7)]
    assert marks(importance_chart(pruned(every))) == (5, 2)


@pytest.mark.parametrize(
    "passes",
    [
        [],
        [{"name": "prune", "notes": ["old"]}],
        [{"name": "prune", "data": {}}, {"name": "distill"}],
    ],
)
def test_manifests_without_the_data_have_nothing_on_pruning(tmp_path, passes):
    given = manifest(*({"exact": False, **each} for each in passes))
    assert "Pruning" not in shown(page(tmp_path, given))
    assert "Pruned" not in terminal(given)
    assert prune_lines(given) == ["", "", ""] and importance_chart(given) == ""


def test_the_terminal_lists_the_largest_of_what_went():
    gone = [candidate(f"blocks.{n}.ff", 0.1, True, 1000 + n) for n in range(20)]
    text = terminal(pruned([*gone, candidate("stem", 1.0, parameters=10**6)]))
    assert f"Pruned: the largest {LISTED} of 20" in text
    names = re.findall(r"(blocks\.\d+\.ff)", text)
    assert names == [f"blocks.{n}.ff" for n in range(19, 19 - LISTED, -1)]
    assert "stem" not in text and "20 of 21 candidates went" in text


def test_all_candidates_are_in_the_graphs_order_with_what_became_of_them():
    rows = every_table(pruned([*some(2), candidate("last", None)])).rows
    assert [(row[0], row[4], row[5]) for row in rows] == [
        ("blocks.0.ff", "0.1", "stays"),
        ("blocks.1.ff", "0.05", "went"),
        ("last", "not finite", "stays"),
    ]


def test_only_the_last_pruning_counts():
    given = pruned(some(4))
    given["passes"] += [*pruned(some(3))["passes"]]
    assert prune_lines(given)[0].startswith("1 of 3 candidates")


def test_candidates_without_a_score_are_marked_and_explained(tmp_path):
    given = pruned([candidate("a", None), candidate("b", 0.1), candidate("c", None)])
    assert "stays: no finite output without it" in shown(importance_chart(given))
    assert "Crosses at the right" in shown(page(tmp_path, given))
    assert "Crosses" not in shown(page(tmp_path, pruned(some())))


@pytest.mark.parametrize(
    "candidates",
    [
        [candidate("only", 0.1)],
        [candidate("only", 0.1, True)],
        [candidate("only", None)],
        [candidate("only", 0.0, True, 0)],
        [candidate("a", 1e-300), candidate("b", 1e300), candidate("c", -1.0)],
        [candidate("same", 0.5)] * 3,
    ],
)
def test_charts_of_odd_scores(candidates):
    chart = str(importance_chart(pruned(candidates)))
    assert candidates[0]["name"] in chart and "nan" not in chart.lower()


def test_three_hundred_candidates_share_rows_by_block(tmp_path):
    draw = np.random.default_rng(0)
    names = [f"transformer_blocks.{n // 15}.attn[head {n % 15}]" for n in range(300)]
    scores = draw.random(300).tolist()
    kinds = ["head", "unit"] * 150
    every = [
        candidate(name, score, number % 7 == 0, kind=kind)
        for number, (name, score, kind) in enumerate(zip(names, scores, kinds, strict=True))
    ]
    words = shown(page(tmp_path, pruned(every)))
    assert "Several marks in a row" in words and "each kind from the network's input" in words
    chart = importance_chart(pruned(every))
    rows = re.findall(r"transformer_blocks\.\d+(?!\d)", shown(chart))
    assert rows == [f"transformer_blocks.{n}" for n in range(20)]
    assert marks(chart) == (257, 43)


def test_names_that_are_too_many_become_blocks_and_else_stay():
    few = [f"b.{n}.ff[unit 1]" for n in range(MOST_ROWS)]
    assert rows_of(few) == few
    many = [f"b.{n // 3}.ff.{n % 3}" for n in range(60)]
    assert rows_of(many) == [f"b.{n // 3}" for n in range(60)]


def test_marks_of_one_row_keep_their_order_and_their_row():
    found = places(["a", "a", "b", "a"])
    assert found[0] < found[1] < found[3] < 0.5 and found[1] == pytest.approx(0)
    assert found[2] == pytest.approx(1)


def test_a_scale_has_a_place_for_every_figure():
    scale = Scale.of([0.0, 1e-3, None, 10.0])
    given = [-1.0, 0.0, 1e-3, 10.0, None]
    found = [scale.place(each) for each in given]
    assert found == sorted(found) and min(found) > 0
    assert found[1] < 1e-3 and found[4] > 10
    assert Scale.of([]).place(None) > Scale.of([]).place(0.0) > 0


@pytest.mark.parametrize("name", [NASTY, "a$_b$c_{", "a & b < c", "x" * 300])
def test_names_are_shown_as_they_are(tmp_path, name):
    given = pruned([candidate(name, 0.1, True), candidate("other", 0.2)])
    text = page(tmp_path, given)
    assert html.escape(name, quote=False) in text.replace("&#34;", '"') and "<script" not in text
    assert name[:40] in terminal(given)
    if len(name) < 50:
        assert name in shown(importance_chart(given))


@pytest.mark.parametrize(
    "changes",
    [
        {"correlation": None},
        {"correlation": None, "predicted": [], "measured": []},
        {"chosen": [0.0, 0.0], "measured": [0.0, 1.0, None]},
    ],
)
def test_sums_that_tell_little(tmp_path, changes):
    given = pruned(some(), additivity=sums(**changes))
    words = shown(page(tmp_path, given))
    assert "Do single losses add up?" in words
    assert ("correlation is" in words) == (sums(**changes)["correlation"] is not None)


def recovered(**changes):
    return manifest({"name": "distill", "data": {**COURSE, **changes}})


def test_recovery_alone_and_one_that_diverged_at_once(tmp_path):
    given = recovered(updates=[0], loss=[3.0], before=None, updates_total=0)
    words = shown(page(tmp_path, given))
    assert "Recovery by training 0 updates took" in words and "one that is not finite to" in words
    assert "Pruned" not in words and "loss, smoothed" not in words
    assert "loss, smoothed" in shown(page(tmp_path, recovered(loss=[1.0, None, 0.5])))


def test_equal_data_are_equal_bytes(tmp_path):
    given = pruned(some(), additivity=sums())
    pages = [write_html(tmp_path / name, {"x": Report(given)}, None) for name in "ab"]
    assert pages[0].read_bytes() == pages[1].read_bytes()
