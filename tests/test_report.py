"""Reports from hand-written manifests: figures, self-containedness, escaping, whole files only."""

import importlib
import io
import json
import shutil
import subprocess
import sys
import warnings
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from effuse.errors import ArtifactError, MissingExtra
from effuse.evaluate import Evaluation, Run
from effuse.naming import block_names
from effuse.plan import Guide, to_json
from effuse.report import Report, write_html
from effuse.report_pictures import difference
from effuse.report_plan import DECIDES, FORECASTS, HOLDS, KEEPS, mark, plan_line, plan_picture

NASTY = '<script>alert("x")</script> & [bold]a cat[/bold]'
CHROMIUM = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--hide-scrollbars",
)  # fmt: skip


def step(variant, fills=(), reads=(), sources=()):
    return {"variant": variant, "fills": list(fills), "reads": list(reads),
            "sources": list(sources)}  # fmt: skip


def manifest(**changes):
    layers = [
        {"name": "conv_in", "op": "conv2d", "format": "float", "parameters": 100,
         "sqnr_db": None, "reason": "first layer"},
        {"name": "mid", "op": "linear", "format": "w8a8", "parameters": 2000,
         "sqnr_db": 40.0, "reason": ""},
        {"name": "up", "op": "linear", "format": "float", "parameters": 3000,
         "sqnr_db": 12.5, "reason": "under the bound: 12.5 dB, the bound is 20 dB"},
    ]  # fmt: skip
    passes = [
        {"name": "canonicalize", "options": {"include": []}, "exact": True, "error": 1e-7,
         "rewrites": {"view": 2, "identity": 61}, "reasons": {}, "notes": [], "sqnr_db": 136.9},
        {"name": "quantize", "options": {"min_sqnr_db": 20.0}, "exact": False, "error": 0.02,
         "rewrites": {"quantize": 1}, "reasons": {"quantize": {"first layer": 1, "noise": 7}},
         "notes": ["a note"], "sqnr_db": 33.3},
    ]  # fmt: skip
    part = {"rate": "step", "nodes": 1234, "parameters": 4_030_000, "weight_bytes": 4_100_000}
    return {
        "format": 1,
        "effuse": "0.1.0",
        "backend": "onnx",
        "config": {"backend": "onnx"},
        "program": {
            "inputs": [
                {"path": ["added", "text"], "role": "prompt", "shape": ["batch", 8],
                 "dtype": "float32"},
                {"path": ["timestep"], "role": "timestep", "shape": [], "dtype": "int64"},
            ],
            "plan": {
                "default": "full",
                "steps": [step("full", ["a"]), *[step("deep", (), ["a"], [0])] * 2, step("full")],
                "slots": [],
                "decision": None,
            },
            "timesteps": [900.0, 600.0, 300.0, 0.0],
        },
        "model": {"class": "TinyUNet", "parameters": 4_030_000, "dtype": "float32"},
        "passes": passes,
        "layers": layers,
        "parts": {"full": {**part, "flops": 41_200_000_000}, "deep": {**part, "flops": 7}},
        "plan": {
            "blocks": ["conv_in", "down.0", "down.1", "up.0", "conv_out"],
            "variants": {"full": [10e9, 20e9, 20e9, 40e9, 10e9], "deep": [10e9, 0, 0, 20e9, 10e9]},
            "flops": 280e9,
            "full_flops": 400e9,
        },
        "rates": {"step": {"parameters": 300, "flops": 0}, "prompt": {"parameters": 100}},
        "native": {"linear_dynamic": "simulated"},
        "parity": {"error": 1e-6, "sqnr_db": 120.0},
        "versions": {"python": "3.11"},
        "files": {"full.onnx": {"bytes": 1234567, "sha256": "ab" * 32}},
        **changes,
    }  # fmt: skip


def evaluation(prompts=("a cat", NASTY), size=32):
    draw = np.random.default_rng(0)
    pictures = draw.integers(0, 250, (len(prompts), size, size, 3), dtype=np.uint8)
    equal, many = (200.0,) * len(prompts), (30.0,) * len(prompts)
    return Evaluation(
        Run("original", 200.0, 600.0, 16.0, pictures, 200.0, equal, (200.0,) * 3),
        (
            Run("exact", 160.0, 480.0, 15.5, pictures, 200.0, equal, (200.0,) * 3),
            Run("w8a8", 50.0, 150.0, 4.0, pictures + 5, 33.1, many, (35.0, None, 21.4)),
        ),
        prompts,
        (900.0, 500.0, 100.0),
        {"processor": "Test CPU", "cores": 2},
    )


class Page(HTMLParser):
    """What a browser would load, and what it would show."""

    VOID = frozenset(("meta", "img", "path", "use", "rect", "br"))

    def __init__(self, text):
        super().__init__()
        self.links, self.tags, self.text, self.open = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href", "xlink:href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data):
        self.text.append(data)

    @property
    def words(self):
        return " ".join(" ".join(self.text).split())


def page(tmp_path, given=None, compared=None):
    path = write_html(tmp_path / "r.html", {"w8a8": Report(given or manifest())}, compared)
    return Page(path.read_text(encoding="utf-8"))


def terminal(report):
    console = Console(file=io.StringIO(), width=150)
    report.summary(console)
    return console.file.getvalue()


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    return page(tmp_path_factory.mktemp("report"), compared=evaluation())


def test_the_page_loads_nothing_from_elsewhere(full):
    assert full.links and all(link.startswith(("data:image/png;", "#")) for link in full.links)
    assert not {"script", "link", "iframe"} & set(full.tags)
    assert full.open == []  # every tag is closed
    assert "@import" not in full.words and "url(http" not in full.words


def test_every_internal_link_leads_somewhere(tmp_path):
    path = write_html(tmp_path / "r.html", {"w8a8": Report(manifest())}, evaluation())
    text = path.read_text(encoding="utf-8")
    for link in Page(text).links:
        assert not link.startswith("#") or f'id="{link[1:]}"' in text


@pytest.mark.parametrize(
    "words",
    [
        "3 steps take 150 ms instead of 600 ms (4.00 times as fast)",
        "the network 4.0 MB instead of 16.0 MB; its pictures agree to 33.1 dB (PSNR).",
        "its pictures are equal to the bit",
        "exact (equal to the bit)",
        "made 8 times brighter",
        "processor Test CPU, cores 2",
        "added.text prompt batch × 8 float32",
        "full 2 of 4 steps 1,234 4.03 M 4.10 41.2",
        "2 of 4 steps in full, 2 run 'deep' (40 % of a full step): the plan runs 70 % of the "
        "arithmetic of 4 full steps (280 of 400 GFLOPs)",
        "kept values conv_in down.0 down.1 up.0 conv_out",
        "reads it as it was",
        "61 × identity, 2 × view",
        "7 × noise 1 × first layer",
        "a note",
        "left alone SQNR of a full step, dB canonicalize",
        "3 layers: 2 in float, 1 in w8a8.",
        "12.5 dB at worst, 26.2 dB in the middle",
        "under the bound 1 3 k",
        "bound 20 dB",
        "1 – 2 600 – 300 2 deep a 0",
        "linear_dynamic simulated",
        "prompt 100 (25.0 %)",
        "full.onnx 1,234,567 " + "ab" * 32,
        "agrees with reference to 120.0 dB",
    ],
)
def test_figures_are_on_the_page(full, words):
    assert words in full.words


def test_the_plan_is_a_picture_on_the_terminal_where_it_fits():
    lines = terminal(Report(manifest())).splitlines()
    rows = [line.rstrip() for line in lines if set(line) & set("▓░▒")]
    assert rows == [
        "conv_in              ▓▓▓▓",
        "down.0 … down.1 (2)  ▓░░▓",
        "up.0                 ▓▒▒▓",
        "conv_out             ▓▓▓▓",
        "▓ computed  ▒ in part  ░ not computed, by step",
    ]
    assert plan_picture(manifest(), 10) == []
    narrow = Console(file=io.StringIO(), width=20)
    Report(manifest()).summary(narrow)
    assert "░" not in narrow.file.getvalue()


def test_many_variants_are_counted():
    given = manifest()
    names = ["full", "a", "b", "c", "d"]
    given["program"]["plan"]["steps"] = [step(name) for name in names]
    given["plan"]["variants"] |= {name: [1e10 * place, 0, 0, 0, 0] for place, name in
                                  enumerate(names) if place}  # fmt: skip
    line = plan_line(given).replace("\N{NO-BREAK SPACE}", " ")
    assert "1 of 5 steps in full, 4 run 4 smaller variants (10 % to 40 % of a full step):" in line


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        ([""], None),  # a network without modules in it
        (["in", "down.0.conv.1", "down.0.conv.2", "up"], None),  # few: each by itself
        ([f"blocks.{n}.{layer}" for n in range(30) for layer in ("attn", "ff")],
         [f"blocks.{n}" for n in range(30) for _ in "af"]),
        (["in", *(f"blocks.{n}" for n in range(59))],
         ["in", *(f"blocks.{n}–{n + 1}" for n in range(0, 58, 2) for _ in "ab"), "blocks.58"]),
    ],
)  # fmt: skip
def test_blocks_are_the_smallest_modules_that_a_picture_has_room_for(paths, names):
    assert list(block_names(paths).values()) == (names or paths)


def test_what_steps_do_with_kept_values():
    marks = [step("full"), step("full", ["a"]), step("deep", (), ["a"], [0]),
             step("deep", (), ["a"], [1, 0]), step("deep", (), ["a"])]  # fmt: skip
    assert list(map(mark, marks)) == ["", KEEPS, HOLDS, FORECASTS, DECIDES]


def test_a_plan_with_every_mark_and_many_slots(tmp_path):
    given = manifest()
    given["program"]["plan"] |= {
        "steps": [step("full", "abcd"), step("deep", (), "abcd"), step("deep", (), "a", [1, 0])],
        "decision": {"signal": "a", "threshold": 0.1},
        "guidance": to_json(Guide("batch", True, 0.99, 0, ())),
    }
    words = page(tmp_path, given).words
    assert "computes in full if a signal says so" in words
    assert "forecasts it from several steps" in words
    assert "GFLOPs); more where the run decides for a full step" in words
    assert "Guidance: conditional rows only" in words
    assert "4 slots" in words and "a, b, c, d" not in words


def test_steps_that_all_run_the_same_are_no_picture(tmp_path):
    given = manifest()
    given["program"]["plan"]["steps"] = [step("full")] * 4
    words = page(tmp_path, given).words
    assert "0 – 3 900 – 0 4 full" in words and "Plan by step" not in words


def many_runs(names=("exact", "cache", "w8a8", "cache + w8a8")):
    found = evaluation()
    saw = {"step_sqnr_db": (120.0, 30.0, 200.0), "variants": {"full": 2, "deep": 1}}
    runs = [replace(found.runs[0], name=name) for name in names]
    return replace(found, runs=(*runs[:-1], replace(runs[-1], **saw)))


def test_five_networks_and_the_variants_that_ran(tmp_path):
    found = page(tmp_path, compared=many_runs())
    assert found.tags.count("img") == 2 * 9
    for words in ("cache + w8a8 2 × full, 1 × deep", "75 dB or more", "w8a8 (equal to the bit)"):
        assert words in found.words
    text = " ".join(terminal(replace(Report(manifest()), evaluation=many_runs())).split())
    assert "2 × full" in text and "cache + w8a8: 3 steps take" in text


def test_a_chart_of_steps_that_are_all_poor_keeps_its_place(tmp_path):
    """Nothing is drawn above the axes, which would leave no room for them."""
    found = evaluation()
    poor = replace(found.runs[1], step_sqnr_db=(20.0, 5.0, -11.0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        words = page(tmp_path, compared=replace(found, runs=(poor,))).words
    assert "75 dB or more" not in words and "SQNR, dB (higher is better)" in words


def test_reasons_that_many_places_share_are_counted_without_the_places(tmp_path):
    reasons = {f"down.{n}: holds other spans": 2 for n in range(4)} | {"up: odd": 1, "noise": 3}
    given = manifest(passes=[{"name": "prune", "reasons": {"span": reasons}}])
    words = page(tmp_path, given).words.replace("\N{NO-BREAK SPACE}", " ")
    assert "8 × holds other spans 3 × noise 1 × up: odd" in words
    given = manifest(passes=[{"name": "prune", "reasons": {"span": {"a: x": 1, "b: x": 1}}}])
    assert "1 × a: x" in page(tmp_path, given).words.replace("\N{NO-BREAK SPACE}", " ")


def test_layers_come_worst_first(full):
    start = full.words.index("All layers, worst first")
    places = [
        full.words.index(name, start) for name in ("up linear", "mid linear", "conv_in conv2d")
    ]
    assert places == sorted(places)


def test_figures_are_on_the_terminal_and_markup_is_text():
    text = terminal(
        Report(manifest(model={"class": "[bold]X[/bold]"}), {"lower": 2.0}, evaluation())
    )
    for words in ("[bold]X[/bold]", "added.text", "under the bound", "simulated", "(lower 2.0 s)"):
        assert words in text
    assert "4.00 times as fast" in text and "21.4" in text


def test_markup_in_a_prompt_is_shown_as_it_is(full):
    assert NASTY in full.words
    assert "script" not in full.tags


def test_hardly_anything_has_to_be_there(tmp_path):
    bare = {"format": 1, "program": {"inputs": []}, "model": {}}
    assert "every step any – full" in page(tmp_path, bare).words
    assert "every step" in terminal(Report(bare))
    empty = write_html(tmp_path / "empty.html", {}, None)
    assert Page(empty.read_text(encoding="utf-8")).open == []


def test_differences_are_amplified_and_black_where_equal():
    one, other = np.zeros((2, 2, 3), np.uint8), np.full((2, 2, 3), 5, np.uint8)
    assert difference(other, one).tolist() == difference(one, other).tolist()
    assert difference(one, other).max() == 40
    assert difference(one, one).max() == 0
    assert difference(one, other + 90).max() == 255


def test_large_pictures_are_shown_smaller_and_said_so(tmp_path):
    words = page(tmp_path, compared=evaluation(("a",), size=300)).words
    assert "Shown at most 256 pixels wide, compared at full size." in words


def test_many_pictures_fold(tmp_path):
    found = page(tmp_path, compared=evaluation(tuple(f"prompt {i}" for i in range(15))))
    assert "More pictures 3" in found.words and found.tags.count("img") == 15 * 5


def test_equal_reports_are_equal_bytes(tmp_path):
    paths = [Report(manifest(), {}, evaluation()).to_html(tmp_path / name) for name in "ab"]
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_data_is_json():
    data = json.loads(json.dumps(Report(manifest(), {"capture": 1.5}, evaluation()).data()))
    assert data["seconds"] == {"capture": 1.5}
    assert data["evaluation"]["runs"][1]["speedup"] == 4.0
    assert Report(manifest()).data()["evaluation"] is None


def test_a_missing_folder_is_named_and_nothing_is_written(tmp_path):
    path = tmp_path / "missing" / "r.html"
    with pytest.raises(ArtifactError, match=r"r\.html: the folder .*missing' does not exist"):
        Report(manifest()).to_html(path)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_the_old_page_and_no_scraps(tmp_path, monkeypatch):
    path = Report(manifest()).to_html(tmp_path / "r.html")
    before = path.read_bytes()

    def full_disk(self, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.replace", full_disk)
    with pytest.raises(ArtifactError, match=r"r\.html: cannot write .*No space left"):
        Report(manifest(model={"class": "Other"})).to_html(path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("library", ["jinja2", "matplotlib", "PIL"])
def test_a_missing_library_is_named(tmp_path, monkeypatch, library):
    real = importlib.import_module

    def hidden(name, package=None):
        if name.partition(".")[0] == library:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, package)

    monkeypatch.setattr(importlib, "import_module", hidden)
    with pytest.raises(MissingExtra, match=rf"{library}.*pip install 'effuse\[compiler\]'"):
        write_html(tmp_path / "r.html", {"w8a8": Report(manifest())}, evaluation())
    assert list(tmp_path.iterdir()) == []


def test_importing_loads_neither_torch_nor_the_libraries_of_the_page():
    code = (
        "import sys, effuse.report, effuse.evaluate\n"
        "print([n for n in ('torch', 'matplotlib', 'jinja2', 'rich', 'PIL') if n in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_a_browser_shows_the_page(tmp_path):
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("needs chromium: apt-get install chromium")
    path = write_html(tmp_path / "r.html", {"w8a8": Report(manifest())}, evaluation())
    shot = tmp_path / "shot.png"
    flags = (f"--user-data-dir={tmp_path / 'profile'}", f"--screenshot={shot}")
    command = [chromium, *CHROMIUM, *flags, "--window-size=1200,2000", path.as_uri()]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    pixels = np.asarray(Image.open(shot).convert("L"))
    assert pixels.shape == (2000, 1200)
    inked = (pixels != pixels[0, 0]).any(axis=1)
    assert inked[:1000].mean() > 0.4 and inked[1000:].mean() > 0.2  # text, pictures, then tables
