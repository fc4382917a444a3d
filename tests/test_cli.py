"""Every verb on a tiny network: what it prints, what it writes, and how it fails."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel, UNet2DModel
from typer.testing import CliRunner

from effuse.cli_app import VERBS, app
from effuse.cli_diff import align, difference

STEPS = 4
COMMAND = (sys.executable, "-P", "-m", "effuse.cli")  # -P: never the folder kernels/ of a root
BLOCKS = {"sample_size": 8, "block_out_channels": (8, 16), "layers_per_block": 1}
COMMON = {"norm_num_groups": 4, "attention_head_dim": 4, "in_channels": 3, "out_channels": 3}


def call(*words, code=0):
    """The output of one call, after checking its exit code."""
    result = CliRunner().invoke(app, [str(word) for word in words])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result


def fails(*words, code=1):
    """The message of a call that fails, on one line."""
    result = call(*words, code=code)
    assert "Traceback" not in result.stderr
    return " ".join(result.stderr.split())


@pytest.fixture(scope="module")
def unet(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "unet"
    torch.manual_seed(0)
    down, up = ("DownBlock2D",) * 2, ("UpBlock2D",) * 2
    UNet2DModel(
        **BLOCKS, **COMMON, down_block_types=down, up_block_types=up, add_attention=False
    ).save_pretrained(folder)
    DDIMScheduler(steps_offset=1).save_pretrained(folder / "scheduler")
    return folder


@pytest.fixture(scope="module")
def exact(unet):
    """A folder, compiled with the network's own scheduler; and what compile printed."""
    path = unet.parent / "exact.effuse"
    page = unet.parent / "compiled.html"
    words = ("--steps", STEPS, "-o", path, "--report", page)
    return path, call("compile", unet, *words).stdout


@pytest.fixture(scope="module")
def int8(unet, exact):
    """A zip, compiled quietly from a TOML file."""
    path, config = unet.parent / "int8.zip", unet.parent / "mine.toml"
    config.write_text('passes = [{name = "quantize", activations = "dynamic"}, "hoist"]\n')
    assert (
        call("compile", unet, "-c", config, "--timesteps", "751,1", "-o", path, "-q").stdout == ""
    )
    return path


@pytest.fixture(scope="module")
def prompted(tmp_path_factory):
    """An artifact with a prompt and an open batch, for any timestep."""
    folder = tmp_path_factory.mktemp("prompted")
    torch.manual_seed(0)
    down, up = ("CrossAttnDownBlock2D",), ("CrossAttnUpBlock2D",)
    shape = {**BLOCKS, **COMMON, "block_out_channels": (8,)}
    UNet2DConditionModel(
        **shape, cross_attention_dim=6, down_block_types=down, up_block_types=up
    ).save_pretrained(folder / "unet")
    call("compile", folder / "unet", "-o", folder / "a.effuse", "--dynamic", "batch=1:8")
    return folder / "a.effuse"


def test_help_is_fast_and_teaches():
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    found = subprocess.run([*COMMAND, "--help"], capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 3  # 0.2 s alone
    for name, _ in VERBS:
        assert name in found.stdout
        text = call(name, "--help").stdout
        assert "xample" in text and "effuse " in text


def test_help_loads_no_torch():
    code = "import sys; from effuse.cli_app import app; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-P", "-c", code], check=False).returncode == 0


def test_version():
    import effuse

    assert call("--version").stdout.strip() == f"effuse {effuse.__version__}"


def test_compile_says_what_it_wrote(unet, exact):
    path, said = exact
    assert path.stat().st_mode & 0o077  # others may read it too
    for name in ("full.onnx", "weights.safetensors", "manifest.json"):
        assert (path / name).is_file() and name in said
    assert "wrote" in said and "kB" in said
    assert "<html" in (unet.parent / "compiled.html").read_text().lower()
    assert sorted(p.name for p in unet.parent.iterdir() if p.name.startswith(".")) == []


def test_dry_run_writes_nothing(unet):
    before = sorted(unet.parent.iterdir())
    said = call("compile", unet, "-c", "w8a8", "--steps", STEPS, "--dynamic", "batch=1:8",
                "--batch", 3, "--dry-run").stdout  # fmt: skip
    order = [said.index(word) for word in ("  canonicalize", "  hoist", "  quantize")]
    assert order == sorted(order)
    for words in ("3×3×8×8", "latent", "4 timesteps, 751 to 1", "batch is left open, 1 to 8"):
        assert words in said
    assert "min_sqnr_db=20.0" in said and "weights.safetensors" in said
    assert sorted(unet.parent.iterdir()) == before


def test_inspect_json_of_network_and_artifact_agree(unet, exact):
    network = json.loads(call("inspect", unet, "--json").stdout)
    artifact = json.loads(call("inspect", exact[0], "--json").stdout)
    assert set(network["rates"]) == {"const", "schedule", "prompt", "step"}
    for rate, cost in network["rates"].items():
        assert set(cost) == {"parameters", "flops"}
        assert cost["parameters"] == artifact["rates"][rate]["parameters"]
    assert 0 < network["leaves_step_program"] < 1
    assert artifact["inputs"][0]["shape"] == [2, 3, 8, 8]


def test_inspect_table_and_settings(unet):
    said = call("inspect", unet, "--role", "sample=latent").stdout
    assert "every step" in said and "leave the step program" in said
    one, two = (
        json.loads(call("inspect", unet, "--json", "--set", f"layers_per_block={n}").stdout)
        for n in (1, 2)
    )
    assert one["parameters"] < two["parameters"]
    assert "layers_per_block" in fails("inspect", unet, "--set", "layer_per_block=2")
    assert "name=value" in fails("inspect", unet, "--set", "nonsense", code=2)


def test_run_samples_the_same_pictures_twice(unet, exact, tmp_path):
    from PIL import Image

    words = ("run", exact[0], "--scheduler", unet / "scheduler", "--seed", 3, "-o")
    said = call(*words, tmp_path / "a.png").stdout
    call(*words, tmp_path / "b.png")
    assert "wrote" in said and "2 pictures, 4 steps" in said
    pixels = np.asarray(Image.open(tmp_path / "a.png"))
    assert pixels.shape == (128, 256, 3) and pixels.std() > 0
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "b.png"]


def test_run_is_what_python_gives(unet, exact):
    import effuse
    from effuse.cli_sample import Live
    from effuse.sampler import Denoiser, Sampler, trajectory

    scheduler = DDIMScheduler.from_pretrained(unet / "scheduler")
    scheduler.set_timesteps(STEPS)
    compiled = effuse.load(exact[0])
    noise = np.random.default_rng(0).standard_normal((2, 3, 8, 8), np.float32)
    network = UNet2DModel.from_pretrained(unet).eval()
    x = torch.from_numpy(noise)
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(network(x, t).sample, t, x).prev_sample
    for solver in (Sampler.from_json(compiled.manifest["sampler"]), Live(scheduler, 0)):
        found = trajectory(Denoiser(compiled, {}), solver, noise, np.random.default_rng(0))
        assert np.allclose(found, x.numpy(), atol=1e-4)


def test_run_refuses_other_timesteps(unet, exact, tmp_path):
    words = ("run", exact[0], "-o", tmp_path / "a.png")
    assert "--scheduler DIR --steps 4" in fails(*words, "--steps", 6)
    other = fails(*words, "--scheduler", unet / "scheduler", "--steps", 5)
    assert "751" in other and "5 timesteps" in other
    assert "no prompt input" in fails(*words, "--guidance", 2)
    assert not (tmp_path / "a.png").exists()


def test_run_with_prompts_and_guidance(prompted, tmp_path):
    states = np.random.default_rng(0).standard_normal((3, 77, 6)).astype(np.float32)
    np.savez(tmp_path / "prompts.npz", encoder_hidden_states=states)
    words = ("run", prompted, "--steps", 2, "-o", tmp_path / "a.png")
    assert "encoder_hidden_states: zeros" in call(*words, "--size", "batch=2").stdout
    plain = (tmp_path / "a.png").read_bytes()
    told = (*words, "--inputs", tmp_path / "prompts.npz")
    assert "3 pictures" in call(*told).stdout
    said = call(*told, "--guidance", 4).stdout
    assert "without a prompt, encoder_hidden_states: zeros" in said
    assert (tmp_path / "a.png").read_bytes() != plain
    np.savez(tmp_path / "wrong.npz", encoder_hidden_state=states)
    message = fails(*words, "--inputs", tmp_path / "wrong.npz")
    assert "did you mean 'encoder_hidden_states'" in message
    assert "'width' is not left open" in fails(*words, "--size", "width=2")


def test_bench(exact, int8):
    data = json.loads(call("bench", exact[0], int8, "--repeat", 3, "--warmup", 1, "--json").stdout)
    assert [row["artifact"] for row in data["artifacts"]] == [str(exact[0]), str(int8)]
    for row in data["artifacts"]:
        assert 0 < row["p10_ms"] <= row["median_ms"] <= row["p90_ms"]
    assert data["artifacts"][0]["speedup"] == 1
    assert {"numpy", "onnxruntime"} <= set(data["machine"]["versions"])
    said = call("bench", exact[0], "--repeat", 2).stdout
    assert "1.00×" in said and "threads" in said


def test_report(exact, tmp_path):
    said = call("report", exact[0], "-o", tmp_path / "a.html").stdout
    assert "UNet2DModel" in said and "hoist" in said and "wrote" in said
    assert "<html" in (tmp_path / "a.html").read_text().lower()


def test_a_plan_by_step_is_shown_and_ran(unet, tmp_path):
    config, path = tmp_path / "cache.toml", tmp_path / "cache.effuse"
    config.write_text('passes = ["hoist", {name = "cache", interval = 2, warmup = 1}]\n')
    words = ("-c", config, "--steps", STEPS, "-o", path)
    said = call("compile", unet, *words).stdout.replace("\N{NO-BREAK SPACE}", " ")
    assert "2 of 4 steps in full, 2 run 'reuse'" in said
    assert "▓░▓░" in said and "▓▓▓▓" in said and "░ not computed" in said

    data = json.loads(call("report", path, "--json").stdout)["manifest"]
    plan, parts = data["plan"], data["parts"]
    totals = {name: sum(flops) for name, flops in plan["variants"].items()}
    assert totals == {name: parts[name]["flops"] for name in ("full", "reuse")}
    assert plan["flops"] == 2 * totals["full"] + 2 * totals["reuse"] < plan["full_flops"]
    assert plan["full_flops"] == 4 * totals["full"]
    assert {len(flops) for flops in plan["variants"].values()} == {len(plan["blocks"])}
    assert plan["blocks"][0] == "conv_in" and plan["blocks"][-1] == "conv_out"

    words = ("run", path, "--scheduler", unet / "scheduler", "-o", tmp_path / "a.png")
    assert "ran 2 × full, 2 × reuse" in " ".join(call(*words).stdout.split())
    assert "a call of its own" in fails("report", path, "--json", "-o", "a.html", code=2)


def test_dump_and_diff(unet, exact, int8, tmp_path):
    text = call("dump", exact[0], "--part", "full").stdout
    assert text.startswith("# full\n%0: float32[2x3x8x8] = input sample")
    network = call("dump", unet).stdout
    assert "aten.conv2d.default" in network
    (tmp_path / "before.txt").write_text(network)
    assert "no difference" in call("diff", exact[0], exact[0]).stdout
    said = call("diff", tmp_path / "before.txt", int8, code=1).stdout
    assert said.startswith("---") and "+" in said and "conv2d_dynamic" in said
    assert "did you mean 'full'" in fails("dump", exact[0], "--part", "fulll")


BEFORE = """# full
%0: float32[2] = input x
%1: float32[2] = aten.relu.default(%0)
%2: float32[2] = aten.neg.default(%0)
%3: float32[2] = aten.sub.Tensor(%1, %2)
return [%3]
"""


def test_diff_sees_through_numbers():
    lines = BEFORE.splitlines()
    new = "%1: float32[2] = aten.cos.default(%0)"
    after = [*lines[:2], new]
    for line in lines[2:]:
        for number in (3, 2, 1):
            line = line.replace(f"%{number}", f"%{number + 1}")
        after.append(line)
    hunks = list(difference(BEFORE, "\n".join(after)))
    assert [row.text for _, rows in hunks for row in rows if row.tag != " "] == [new]
    assert hunks[0][0] == "@@ full -1,4 +1,5 @@"


def test_diff_sees_other_wires():
    swapped = BEFORE.replace("(%1, %2)", "(%2, %1)")
    changed = [row for row in align(BEFORE.splitlines(), swapped.splitlines()) if row.tag != " "]
    assert [row.tag for row in changed] == ["-", "+"] and "sub" in changed[0].text


def test_passes_presets_doctor():
    said = call("passes").stdout
    assert "quantize (lossy)" in said and "min_sqnr_db" in said and "stays in float" in said
    assert "w8a8-dynamic" in call("presets").stdout
    said = call("doctor").stdout
    for words in (
        "onnxruntime",
        "avx512_vnni",
        "linear_dynamic",
        "simulated",
        "not in this version",
    ):
        assert words in said


def test_bisect_finds_the_first_rewrite(unet, tmp_path):
    config = tmp_path / "one.toml"
    config.write_text('passes = [{name = "quantize", include = ["*resnets.0.conv1"]}]\n')
    assert "no rewrite" in call("bisect", unet, "--min-db", 90).stdout
    words = ("-c", config, "--timesteps", "751,1", "--min-db", 150)
    said = call("bisect", unet, *words).stdout
    assert "quantize, rule 'quantize', its number 1" in said
    assert "before: 200.0 dB" in said and "+%" in said


def test_wrong_configurations(unet, tmp_path):
    goal, config = tmp_path / "a", tmp_path / "bad.toml"
    words = ("compile", unet, "-o", goal, "-c")
    assert "did you mean 'w8a8'" in fails(*words, "w8a9")
    assert "no such config file" in fails(*words, tmp_path / "none.toml")
    config.write_text('passes = ["quantise"]\n')
    assert "did you mean 'quantize'" in fails(*words, config)
    config.write_text('passes = [{name = "quantize", min_sqnr = 3}]\n')
    assert "did you mean 'min_sqnr_db'" in fails(*words, config)
    config.write_text("pases = []\n")
    assert "did you mean 'passes'" in fails(*words, config)
    assert "did you mean 'onnx'" in fails(*words, "exact", "--backend", "onx")
    assert "no size is called 'batsch'" in fails(*words, "exact", "--dynamic", "batsch=1:2")
    assert "low:high" in fails(*words, "exact", "--dynamic", "batch=8", code=2)
    assert not goal.exists()


def test_wrong_schedules(unet, tmp_path):
    words = ("compile", unet, "-o", tmp_path / "a")
    assert "--steps 50" in fails(*words, "--scheduler", unet / "scheduler")
    assert "no scheduler_config.json" in fails(*words, "--scheduler", tmp_path, "--steps", 3)
    assert "5000 steps" in fails(*words, "--steps", 5000)
    assert "leave out --steps" in fails(*words, "--steps", 3, "--timesteps", "1,2", code=2)
    assert "numbers" in fails(*words, "--timesteps", "one,two", code=2)


def test_wrong_places(unet, tmp_path):
    assert "does not exist" in fails("compile", unet, "-o", tmp_path / "none" / "a")
    assert "no artifact is there" in fails("compile", unet, "-o", unet)
    assert "does not exist" in fails("compile", unet, "-o", tmp_path / "a", "--report", "no/a.html")
    assert "no such folder" in fails("compile", tmp_path / "none", "-o", tmp_path / "a")
    assert "-o OUT" in fails("compile", unet, code=2)
    (tmp_path / "unet").mkdir()
    (tmp_path / "model_index.json").write_text("{}")
    assert "pipeline" in fails("compile", tmp_path, "-o", tmp_path / "a")


def test_wrong_artifacts(unet, exact, tmp_path):
    copy = tmp_path / "edited"
    shutil.copytree(exact[0], copy)
    with (copy / "weights.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x7f")
    for words in (["report"], ["bench"], ["inspect"], ["dump"], ["run", "-o", tmp_path / "a.png"]):
        verb, *rest = words
        assert "weights.safetensors is not as it was written" in fails(verb, copy, *rest)
    for verb in ("report", "bench"):
        assert "no such artifact" in fails(verb, tmp_path / "none")
    assert "no such artifact" in fails("diff", exact[0], tmp_path / "none")
    assert "this is no effuse artifact" in fails("report", unet)
    assert "compiled already" in fails("inspect", exact[0], "--set", "a=1")


def test_debug_shows_the_traceback(tmp_path):
    words = [*COMMAND, "report", str(tmp_path / "none"), "--debug"]
    found = subprocess.run(words, capture_output=True, text=True, check=False)
    assert found.returncode == 1 and "Traceback" in found.stderr and "ArtifactError" in found.stderr


def test_unknown_verb_is_wrong_usage():
    assert "compile" in fails("compil", code=2)


def test_without_typer():
    code = "import sys; sys.modules['typer'] = None; from effuse.cli import main; main()"
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert found.returncode == 1
    assert "pip install 'effuse[compiler]'" in found.stderr and "Traceback" not in found.stderr


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_leaves_nothing_behind(unet, tmp_path, number, code):
    (tmp_path / "tmp").mkdir()
    (tmp_path / "out").mkdir()
    goal = tmp_path / "out" / "a.effuse"
    process = subprocess.Popen(
        [*COMMAND, "compile", str(unet), "-c", "w8a8", "--steps", "50", "-o", str(goal)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "TMPDIR": str(tmp_path / "tmp"), "PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    assert process.stdout is not None
    assert "compiling" in process.stdout.readline()
    time.sleep(1.5)  # some of the network is captured, and the rest is not
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == code, said
    assert "Traceback" not in said
    assert list((tmp_path / "out").iterdir()) == []
    assert list((tmp_path / "tmp").glob("effuse-*")) == []
