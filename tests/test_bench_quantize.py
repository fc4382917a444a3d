"""The quantization benchmark: its rows, its winners, its table and chart, and one short run."""

import importlib
import json
from pathlib import Path

import pytest

from effuse.passes import SplitShortcut

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture
def module(monkeypatch):
    """A module of the benchmark, which runs as a script among its neighbours."""
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module


def refused(module, capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        module("quantize").main(list(arguments))
    assert stop.value.code == 2
    return capsys.readouterr().err


def of(module, format, **gains):
    """The studied rows of a format, with the named ones' gains; 0 dB for the others."""
    rows = module("quantize_rows").studied("unet", format)
    named = {row.method.split("=")[-1].strip('"()'): row for row in rows}
    found = dict.fromkeys(rows, 0.0)
    for name, gain in gains.items():
        found[named[name]] = gain
    return found


def test_winners_join_passes_and_options_in_the_legal_order(module):
    gains = of(module, "w4a4", correct_bias=0.5, gptq=2.0, Smooth=1.0, SplitShortcut=0.2, mse=-1.0)
    row = module("quantize_rows").winners("w4a4", gains)
    assert [each.name for each in row.before] == ["split_shortcut", "smooth"]
    assert row.options == {"rounding": "gptq", "correct_bias": True}
    assert row.remark == 'rounding="gptq", Smooth(), correct_bias, SplitShortcut()'


def test_of_methods_that_exclude_each_other_the_better_one_wins(module):
    rows = module("quantize_rows")
    gains = of(module, "w4a4")
    both = [row for row in gains if row.method in rows.SPLITS]
    gains |= {both[0]: 0.5, both[1]: 0.7}
    assert rows.winners("w4a4", gains).before == (SplitShortcut(through_norm=True),)


def test_no_winners(module):
    row = module("quantize_rows").winners("w8a8", of(module, "w8a8", gptq=0.05))
    assert (row.before, row.options, row.remark) == ((), {}, "no method gains")


def test_a_row_of_an_unknown_option_is_skipped_and_says_so(module):
    rows = module("quantize_rows")
    assert "rounding='never'" in rows.Row("w8a8", "x", options={"rounding": "never"}).missing
    assert "nothing=1" in rows.Row("w8a8", "x", options={"nothing": 1}).missing
    assert rows.Row("w8a8", "x", options={"rounding": "gptq"}).missing is None


def test_every_row_that_is_not_missing_is_a_configuration(module):
    rows, measure = module("quantize_rows"), module("quantize_measure")
    for network in ("unet", "dit"):
        found = [row for row in rows.rows(network) if not row.missing]
        assert len({row.name for row in found}) == len(found)
        for row in found:
            named = measure.named(row)
            options = next(each for each in named["passes"] if each["name"] == "quantize")
            assert options["min_sqnr_db"] == rows.NO_BOUND


def test_ranges_by_step_for_convolutions_leave_linear_layers_alone(module):
    text = module("quantize_rows").step_text("w4a8")
    assert text == ("int4/group64:int8/group64/dynamic:int4/channel:uint8/tensor/asymmetric/step")


def test_only_takes_the_plain_row_along(module):
    names = [row.name for row in module("quantize").chosen("dit", "w4a4.*=.gptq")]
    assert names == ["w4a4", 'w4a4 + rounding="gptq"']
    names = [row.name for row in module("quantize").chosen("dit", r"nvfp4a4.*\(8\)")]
    assert names == ["nvfp4a4", "nvfp4a4 + LowRank(8)"]


def result(format, method, sqnr, psnr):
    return {
        "name": f"{format} {method}", "format": format, "method": method, "sqnr_db": sqnr,
        "sqnr_worst_db": sqnr - 1, "psnr_db": psnr, "layers_db": None, "megabytes": 1.5,
        "build_s": 2.0, "remark": "",
    }  # fmt: skip


def test_gains_are_over_the_same_formats_plain_row(module, tmp_path):
    show = module("quantize_show")
    failed = {"name": "c", "format": "w4a8", "method": "gptq", "remark": "failed: x"}
    found = [result("w8a8", "plain", 30.0, 40.0), result("w4a4", "plain", 10.0, 20.0),
             result("w4a4", "gptq", 12.5, 19.0), failed]  # fmt: skip
    lines = show.table(found)
    assert {len(line) for line in lines} == {len(show.COLUMNS)}
    assert [line[2] for line in lines] == ["", "", "+2.50", ""]
    assert lines[2][5] == "-1.00" and lines[3][-1] == "failed: x"
    assert show.plot(tmp_path / "a.png", "unet", found).stat().st_size > 1000
    assert show.plot(tmp_path / "b.png", "unet", found[:2]) is None


def test_skewed_halves(module):
    """(1 / 0.05)² in squared range; the tails of a sample move it by a few per cent."""
    text = module("quantize_measure").skewed()
    times = float(text.split(" times less")[0].split()[-1])
    assert times == pytest.approx(400, rel=0.15)


def test_arguments(module, capsys):
    assert "--prompts" in refused(module, capsys, "--prompts", "0")
    assert "--steps" in refused(module, capsys, "--steps", "1")
    assert "no regular expression" in refused(module, capsys, "--only", "(")


def test_list_and_dry_run(module, capsys):
    quantize = module("quantize")
    assert quantize.main(["--list", "--network", "unet", "--only", "Smooth"]) == 0
    assert "unet: w4a4 + Smooth()" in capsys.readouterr().out
    assert quantize.main(["--dry-run", "--network", "dit", "--only", "w8a8.*gptq"]) == 0
    assert "'rounding': 'gptq'" in capsys.readouterr().out


TINY = """
import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel
from emoji_dit import FOLDER, EmojiDitPipeline, names


class Tiny(EmojiDitPipeline):
    @classmethod
    def open(cls):
        torch.manual_seed(0)
        network = DiTTransformer2DModel(
            num_attention_heads=2, attention_head_dim=16, in_channels=3, out_channels=3,
            num_layers=1, sample_size=32, patch_size=8, num_embeds_ada_norm=len(names()),
        )
        return cls(network.eval(), DDIMScheduler.from_pretrained(FOLDER / "scheduler"))
"""


def test_a_short_run(module, monkeypatch, tmp_path):
    """A small network in the place of a trained one: plain rows, and one that gains nothing."""
    (tmp_path / "tiny_emoji.py").write_text(TINY)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(
        module("cache_bench").NETWORKS, "tiny", ("tiny_emoji", "Tiny", "transformer")
    )
    monkeypatch.setitem(module("cache_show").TITLES, "tiny", "a small transformer")
    arguments = ["--network", "tiny", "--steps", "2", "--prompts", "1", "--out", str(tmp_path)]
    assert module("quantize").main([*arguments, "--only", r"^(fp8|w8a8|w8a8 \+ Start.*)$"]) == 0
    report = json.loads((tmp_path / "quantize-tiny.json").read_text())
    w8a8, start, fp8 = report["rows"]
    assert w8a8["sqnr_db"] == start["sqnr_db"] and start["remark"] == "rewrites nothing here"
    assert 15 < fp8["sqnr_db"] != w8a8["sqnr_db"] > 15
    assert fp8["quantized"] == w8a8["quantized"] < fp8["layers"]
    assert report["setting"]["calibration"] != report["setting"]["pictures"]
    text = (tmp_path / "quantize-tiny.md").read_text()
    assert text.count("| fp8 |") == 1 and "unfinished" not in text
