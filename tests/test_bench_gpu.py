"""The benchmark on a GPU, as far as a CPU goes: inputs, checks, turns, rows, tables."""

from __future__ import annotations

import contextlib
import importlib
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"
META = torch.device("meta")
CPU = torch.device("cpu")


@pytest.fixture
def module(monkeypatch):
    """A module of the benchmark, which runs as a script among its neighbours."""
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module


# ---- the command ---------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_ends(module, capsys, tmp_path):
    gpu = module("gpu")
    assert gpu.main(["--out", str(tmp_path / "new")]) == 2
    told = capsys.readouterr()
    assert told.err.strip() == gpu.NO_GPU and not told.out
    assert not (tmp_path / "new").exists()


def test_sections_are_chosen(module, capsys):
    gpu = module("gpu")
    assert "tune" not in gpu.parsed([]).sections and len(gpu.parsed([]).sections) == 6
    assert gpu.parsed(["--tune"]).sections == list(gpu.SECTIONS)
    assert gpu.parsed(["--only", "tune", "fused"]).sections == ["fused", "tune"]
    assert gpu.parsed(["--skip", "blocks", "kernels"]).sections[-1] == "fused"
    for wrong in (["--only", "kernel"], ["--seconds", "0"]):
        with pytest.raises(SystemExit) as end:
            gpu.parsed(wrong)
        assert end.value.code == 2
    with pytest.raises(SystemExit) as end:
        gpu.main(["--help"])
    assert end.value.code == 0 and "Exit status" in capsys.readouterr().out


def test_sections_share_what_is_left(module):
    gpu, rows = module("gpu"), module("gpu_rows")
    assert gpu.share(["blocks"]) == 1
    left = 1.0
    for number in range(len(rows.SECTIONS)):
        left -= gpu.share(list(rows.SECTIONS)[number:]) * left
    assert left == pytest.approx(0)


def test_a_wrong_kernel_ends_the_run_and_a_cut_run_keeps_what_it_has(module, monkeypatch, tmp_path):
    gpu = module("gpu")

    def section(name, arguments, report, until):
        if name == "correct":
            raise RuntimeError("linear int8: 3 of 9 elements differ")
        return [{"name": "copy", "kind": "copy", "ms": 1.0, "gbs": 4000.0}]

    monkeypatch.setattr(gpu, "section", section)
    arguments = gpu.parsed(["--out", str(tmp_path), "--seed", "3"])
    assert gpu.run(arguments, gpu.start(arguments)) == 1
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["ceilings"][0]["gbs"] == 4000 and "kernels" not in found and found["seed"] == 3
    assert "3 of 9 elements differ" in (tmp_path / "gpu.md").read_text()
    again = gpu.start(gpu.parsed(["--out", str(tmp_path), "--add", "--only", "kernels"]))
    assert again["ceilings"] == found["ceilings"] and "measured earlier" in again["notes"][0]


# ---- timing --------------------------------------------------------------------------------------


def test_turns_go_there_and_back_and_ratios_are_of_rounds(module):
    time, order = module("gpu_time"), []
    clock = {"a": iter([2.0, 4.0]), "b": iter([1.0, 4.0])}
    found = time.turns(
        {name: lambda name=name: name for name in clock},
        lambda call, times: [order.append(call()) or next(clock[call()])] * times, 2, 3,
    )  # fmt: skip
    assert order == ["a", "b", "b", "a"] and found == {"a": [2, 4], "b": [1, 4]}
    figures = {name: {"ms": 1.0, "ms_rounds": each} for name, each in found.items()}
    assert time.ratio(figures["a"], figures["b"]) == 1.5
    assert time.ratio(figures["a"], {"error": "no"}) is None


def test_what_fails_does_not_stop_the_others(module):
    bench = module("gpu_time").Bench(CPU, rounds=2, times=1)

    def broken():
        raise ImportError("torchao is not installed\nat all")

    found = bench.measure({"bad": broken, "good": lambda: lambda: None})
    assert found["bad"] == {"error": "ImportError: torchao is not installed"}
    assert list(found) == ["bad", "good"] and len(found["good"]["ms_rounds"]) == 2


def test_cases_end_with_the_time(module):
    time = module("gpu_time")
    bench = time.Bench(CPU)
    seen = []
    for _ in bench.within("abc", "letters"):
        seen.append(1)
        bench.end = 0.0
    assert len(seen) == 1 and bench.notes == ["letters: no time was left for b, c"]


def test_a_bound_breaks_off_what_swallows_exceptions(module):
    time = module("gpu_time")
    with pytest.raises(time.OutOfTime, match="more than 0 s"), time.bounded(0.02):
        while True:
            with contextlib.suppress(Exception):
                time.time.sleep(0.01)
    with time.bounded(5):
        pass


# ---- arguments and launches ----------------------------------------------------------------------


def tensors(work):
    return [each for each in work[1] if isinstance(each, torch.Tensor)]


def test_arguments_are_made_on_the_device_that_they_are_for(module):
    fused, rows, kernels = module("gpu_fused"), module("gpu_rows"), module("gpu_kernels")
    works = list(kernels.works_of(32, rows.Layer("x", 64, 128), META))
    works += kernels.branch_works(rows.FORMATS[2], 32, rows.Layer("x", 64, 128), 16, META)
    works += [each for case in fused.CASES for each in fused.works_of(case, META)]
    assert {each.device for work in works for each in tensors(work)} == {META}


def test_all_launches_are_known_without_memory(module):
    args, rows, kernels = module("gpu_args"), module("gpu_rows"), module("gpu_kernels")
    makes = [lambda layer=layer: kernels.works_of(4096, layer, "cpu") for layer in rows.LAYERS[::6]]
    found = args.launches(makes)
    assert len(found) == len(makes) * (len(rows.FORMATS) + len(rows.TOGETHER))
    for launch in found:
        assert launch.kernel.__name__.endswith("_kernel") and min(launch.grid) > 0


def test_another_tile_changes_the_launch_alone(module):
    args, rows, tune = module("gpu_args"), module("gpu_rows"), module("gpu_tune")
    for format in rows.FORMATS:
        known = tune.module_of(format).TILES
        work = args.random_linear(format, 48, 64, 128, "cpu")
        for rows_, columns, depth, warps, stages in ((32, 64, 64, 4, 2), (64, 32, 128, 8, 3)):
            launch = tune.tiled(format, work, tune.Tile(rows_, columns, depth, warps, stages))
            assert (launch.constants["BM"], launch.constants["BN"]) == (rows_, columns)
            assert (launch.warps, launch.stages) == (warps, stages)
            assert launch.grid == (-(-48 // rows_) * (64 // columns),)
        assert tune.module_of(format).TILES is known


def test_the_best_tile_is_told_and_what_fails_is_counted(module, monkeypatch):
    rows, time, tune = module("gpu_rows"), module("gpu_time"), module("gpu_tune")
    monkeypatch.setattr(tune, "FORMATS", rows.FORMATS[:1])
    tiles = ((16, 16, 64, 4, 2), (32, 32, 64, 4, 2), (24, 16, 64, 4, 2))  # 24: no power of two
    bench = time.Bench(CPU, rounds=1, times=1)
    (found,) = tune.tune(bench, [rows.Layer("x", 16, 64)], 2, tiles)
    assert (found["tried"], found["failed"]) == (4, 1)
    assert found["gain"] == pytest.approx(found["ms"] / found["best_ms"]) and found["gain"] >= 1
    assert found["best"] is None or tuple(found["best"].values()) in tiles[:2]


def test_layers_are_those_of_the_networks(module):
    rows = module("gpu_rows")
    flux = {(n, k) for name, n, k in rows.LAYERS if name == "FLUX"}
    assert {(3072, 3072), (12288, 3072), (3072, 12288), (21504, 3072), (3072, 15360)} <= flux
    assert {layer.network for layer in rows.LAYERS} == {"FLUX", "SD3", "PixArt", "SDXL"}
    assert set(rows.ROWS) == {1024, 4096, 4608} and rows.RANKS == (16, 32, 64, 128)
    for layer in rows.LAYERS:
        assert layer.depth % 64 == 0


# ---- correctness ---------------------------------------------------------------------------------

CHECKED = (
    "linear int8, zero", "linear fp8, branch", "linear w4a8,", "quantize_rows e4m3",
    "row_norm rms, modulated, int8", "gated swiglu_first,", "rotary halves", "conv2d 3x3 by 2 at",
    "group_norm_act, int8",
)  # fmt: skip


@pytest.fixture
def tiny(module):
    """The cases that are checked here, at a size for the interpreter."""
    check = module("gpu_check")
    torch.manual_seed(1)
    made = list(check.cases((check.Sizes(3, 18, 64, (1, 8, 3)),)))
    return {name: next(each for each in made if each.name.startswith(name)) for name in CHECKED}


def test_kernels_agree_with_their_references(module, tiny):
    check = module("gpu_check")
    for case in tiny.values():
        errors = check.checked(case, CPU)
        assert len(errors) >= 1 and all(0 <= error < 0.1 for error in errors)


def test_every_operation_is_checked(module):
    check, table = module("gpu_check"), importlib.import_module("effuse.kernels.table")
    cases = list(check.cases((check.Sizes(3, 18, 64, (1, 8, 3)),)))
    checked = {id(case.native) for case in cases}
    assert {row.name for row in table.FUSED_OPS if id(row.native) not in checked} == set()


@pytest.mark.parametrize("name", CHECKED)
def test_a_kernel_that_writes_nothing_is_found(module, tiny, name):
    check = module("gpu_check")
    native = SimpleNamespace(empty=tiny[name].native.empty, launch=lambda *args: None)
    with pytest.raises(check.Wrong, match=name.split(",")[0]):
        check.checked(tiny[name]._replace(native=native), CPU)


def test_small_differences_are_found(module):
    check = module("gpu_check")
    want = torch.randn(64, 64)
    assert check.compared("x", want * (1 + 1e-6), want, 1e-5) < 2e-6
    one = want.clone()
    one[3, 5] += 0.01
    for got, bound in ((one, 1e-5), (want * 1.01, 1e-3), (want * float("nan"), 1e-1), (one, 0)):
        with pytest.raises(check.Wrong):
            check.compared("x", got, want, bound)
    codes = torch.randint(-100, 100, (64, 64), dtype=torch.int8)
    few = codes.clone()
    few[0, :9] += 1
    assert 0 < check.compared("x", few, codes, None) < 0.01
    for wrong in (codes + 1, torch.where(codes == codes[0, 0], codes + 2, codes)):
        with pytest.raises(check.Wrong, match="codes differ"):
            check.compared("x", wrong, codes, None)


# ---- rows ----------------------------------------------------------------------------------------


def test_rows_of_a_layer(module):
    kernels, rows, time = module("gpu_kernels"), module("gpu_rows"), module("gpu_time")
    bench = time.Bench(CPU, rounds=1, times=1)
    layer = rows.Layer("FLUX", 16, 64)
    found = kernels.kernels(bench, {"int8": 2.0}, [layer], [2])
    by = {row["by"]: row for row in found}
    assert {"effuse nvfp4", "quantize + effuse w4a8", "torch._int_mm int8"} <= by.keys()
    assert [row["by"] for row in found if row["by"].startswith("effuse") and "error" in row] == []
    ours, base = by["effuse int8"], by[kernels.BASE]
    assert ours["tflops"] == pytest.approx(2 * 2 * 16 * 64 / ours["ms"] / 1e9)
    assert ours["share"] == pytest.approx(ours["tflops"] / 2)
    assert ours["over_bf16"] == pytest.approx(base["ms"] / ours["ms"])
    assert (base["weight_bytes"], ours["weight_bytes"]) == (2048, 1024)
    assert by["effuse w4a8"]["weight_bytes"] == 1024 * 4.5 / 8


def test_a_branch_is_added_fused_and_unfused_alike(module):
    args, kernels, rows = module("gpu_args"), module("gpu_kernels"), module("gpu_rows")
    results = []
    for fused in (True, False):
        torch.manual_seed(0)
        results.append(kernels.branch(rows.FORMATS[0], 2, 16, 64, 16, fused, CPU)())
    torch.manual_seed(0)
    none = kernels.branch(rows.FORMATS[0], 2, 16, 64, 0, True, CPU)()
    error = (results[0].float() - results[1].float()).norm() / results[1].float().norm()
    assert error < 0.02 and (results[0] - none).float().norm() > 10 * none.float().norm()
    assert results[0].dtype == args.BF16


def test_fused_operations_are_compared_with_their_chains(module):
    fused, time, rows = module("gpu_fused"), module("gpu_time"), module("gpu_rows")
    cases = (
        rows.Turn("rotary", 2, 2, 16), rows.Rowwise("swiglu", "swiglu", 2, 64, rows.TOKEN),
        rows.Image("norm", 1, 32, 2, True), rows.Conv("conv", 1, 16, 16, 2, 1),
    )  # fmt: skip
    found = fused.fused(time.Bench(CPU, rounds=1, times=1), {"copy": 2.0, "int8": 1.0}, cases)
    assert len(found) == 2 * len(cases) and not any("error" in row for row in found)
    turned, chain = found[:2]
    assert turned["bytes"] == 2 * 64 * 2 + 2 * 32 * 4  # x and y, cos and sin
    assert turned["gbs"] == pytest.approx(turned["bytes"] / turned["ms"] / 1e6)
    assert turned["share"] == pytest.approx(turned["gbs"] / 2)
    assert turned["over_unfused"] == pytest.approx(chain["ms"] / turned["ms"])
    assert found[-1]["tflops"] == pytest.approx(2 * 4 * 16 * 16 / found[-1]["ms"] / 1e9)


def test_unfused_chains_compute_what_the_kernels_do(module):
    args, peers, rows = module("gpu_args"), module("gpu_peers"), module("gpu_rows")
    for quantizer in (rows.TOKEN, rows.FP8, rows.GROUP):
        x = args.normal(CPU, 3, 128)
        codes, scale = peers.quantized(x, quantizer)
        native, given = args.quantize(x, quantizer)
        expected = importlib.import_module("effuse.kernels.quantize_rows").reference(*given)
        assert native is not None and codes.dtype == expected[0].dtype
        assert torch.equal(codes.float(), expected[0].float())
        assert torch.allclose(scale, expected[1])


def test_ceilings_are_the_best_of_each_kind(module):
    kernels = module("gpu_kernels")
    rows = [{"kind": "fp8 slow", "tflops": 3.0}, {"kind": "fp8", "tflops": 5.0},
            {"kind": "int8", "error": "no"}, {"kind": "copy", "gbs": 4.0},
            {"kind": kernels.FLOOR, "ms": 0.01}]  # fmt: skip
    assert kernels.best(rows) == {"fp8": 5.0, "copy": 4.0}


# ---- tables --------------------------------------------------------------------------------------


def layer_row(by, k, **figures):
    return {"name": f"FLUX 8x{k} M=4096: {by}", "by": by, "network": "FLUX", "m": 4096, "n": 8,
            "k": k, "ms": 1.0, **figures}  # fmt: skip


def made_up():
    """A report such as a run writes, with figures that are no one's."""
    return {
        "date": "2000-01-01", "machine": {"gpu": "made | up"}, "versions": {"torch": "0", "x": ""},
        "seed": 1, "seconds": 2.0, "notes": ["a note"],
        "ceilings": [{"name": "bf16 8x8x8", "kind": "bf16", "ms": 1.0, "tflops": 700.0}],
        "correct": [{"name": "a", "errors": [0.0]}, {"name": "b", "errors": [0.0, 1e-3]}],
        "kernels": [
            layer_row("cuBLAS bf16", 1, over_bf16=1.0),
            *(layer_row("effuse fp8", k, share=s, over_bf16=1.2) for k, s in ((1, 0.75), (2, 0.6))),
            *(layer_row("effuse int8", k, over_bf16=1.6, weight_bytes=16) for k in (1, 2)),
            *(layer_row("effuse w4a8", k, over_bf16=1.5, weight_bytes=9, ms=1.1) for k in (1, 2)),
            {"name": "failed", "by": "torchao fp8", "network": "FLUX", "m": 4096, "n": 8, "k": 1,
             "error": "ImportError: torchao is not installed"},
        ],
        "branches": [{"name": "b", "how": "fused", "rank": 32, "added": 0.2, "ms": 1.0}],
        "fused": [{"name": "f", "by": "effuse", "ms": 1.0, "gbs": 9.0, "over_unfused": 3.0}],
        "tune": [{"name": "t", "ms": 2.0, "best_ms": 1.0, "gain": 2.0, "tried": 3, "failed": 1,
                  "best": {"rows": 8}}],
        "blocks": [
            {"name": "FLUX block: effuse w8a8", "network": "FLUX block", "by": "effuse w8a8",
             "ms": 1.0, "over_compile": 1.7, "peak_bytes": 10**9, "remark": "cubins"},
            {"name": "FLUX block: torch.compile bf16", "network": "FLUX block",
             "by": "torch.compile bf16", "ms": 1.7, "over_compile": 1.0},
        ],
    }  # fmt: skip


def test_asked_figures_are_judged(module):
    show = module("gpu_show")
    found = {row["name"].split(",")[0].split(" ")[0]: row for row in show.reached(made_up())}
    assert [row["met"] for row in show.reached(made_up())] == [
        "in 1 of 2", "yes", "no", "yes", "yes", "yes",
    ]  # fmt: skip
    assert found["fp8"]["values"] == [0.6, 0.75] and found["rank-32"]["values"] == [0.2]
    assert found["FLUX"]["median"] == 1.7 and found["int8"]["median"] == 1.6
    assert {row["met"] for row in show.reached({})} == {"unmeasured"}


def test_tables_hold_every_section_ratios_first(module):
    show, rows = module("gpu_show"), module("gpu_rows")
    assert set(show.TABLES) == set(rows.SECTIONS)
    text = show.markdown(made_up())
    titles = [line[3:] for line in text.splitlines() if line.startswith("## ")]
    assert titles[:2] == ["asked and reached", "networks, end to end"]
    assert len(titles) == 2 + len(rows.SECTIONS)
    assert set(show.tables(made_up())) - set(show.printed(made_up())) == {show.LONG}
    assert "| FLUX M=4096: effuse fp8 | 1.20 (1.20 to 1.20) | 68% (60% to 75%) |  |" in text
    assert "torchao is not installed" in text and "made \\| up" not in text.splitlines()[0]
    assert "| 68% (60% to 75%) | in 1 of 2 |" in text and "a note" in text
    for columns, lines in show.tables(made_up()).values():
        assert {len(line) for line in lines} == {len(columns)}
    empty = {**made_up(), **{name: [] for name in rows.SECTIONS}}
    assert list(show.tables(empty)) == ["asked and reached"]


def test_the_plot_is_written_or_it_is_said_why_not(module, tmp_path):
    show = module("gpu_show")
    bare = {key: value for key, value in made_up().items() if key not in ("kernels", "blocks")}
    assert show.plot(bare, tmp_path / "no.png").startswith("no plot")
    pytest.importorskip("matplotlib")
    assert show.plot(made_up(), tmp_path / "a.png") is None
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
