"""An artifact's own sampler: pictures by Python and by `effuse run` where no torch is."""

import json
import subprocess
import sys

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import effuse
from effuse import artifact
from effuse.errors import InputError
from effuse.sampler import Sampler
from effuse.sampler_probe import stored

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # numpy 2 in diffusers

STEPS = 6
WITHOUT = """
import sys
for name in ("torch", "diffusers", "onnx"):
    sys.modules[name] = None  # importing it fails
"""
SAMPLE = (
    WITHOUT
    + """
import json
import numpy as np, effuse
from effuse.sampler import Sampler
net = effuse.load(sys.argv[1], threads=1)
given, made = dict(np.load(sys.argv[2])), {}
told, free = ({"encoder_hidden_states": given[key]} for key in ("told", "free"))
made["own"] = effuse.sample(net, given["noise"], told, free, guidance=3.0)
free_of_schedule = effuse.load(sys.argv[3], threads=1)
for name, data in json.load(open(sys.argv[4])).items():
    solver = Sampler.from_json(data)
    made[name] = effuse.sample(free_of_schedule, given["noise"], told, free, guidance=3.0,
                               sampler=solver)
np.savez(sys.argv[5], **made)
"""
)
RUN = WITHOUT + "from effuse.cli import main\nmain()\n"
KEY = "encoder_hidden_states"
SCHEDULERS = {
    "ddim": (diffusers.DDIMScheduler, {"beta_schedule": "squaredcos_cap_v2"}),
    "euler": (diffusers.EulerDiscreteScheduler, {"timestep_spacing": "trailing"}),
    "dpm": (diffusers.DPMSolverMultistepScheduler, {"use_karras_sigmas": True}),
    "heun": (diffusers.HeunDiscreteScheduler, {}),
    "flow": (diffusers.FlowMatchEulerDiscreteScheduler, {"shift": 3.0}),
}


class Net(nn.Module):
    """A denoiser with a prompt, which also predicts a variance."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 6, 3, padding=1)
        self.prompt = nn.Linear(4, 8)

    def forward(self, sample, timestep, encoder_hidden_states, return_dict=True):
        h = self.first(sample) + torch.sin(timestep * 0.01)
        h = h + 5 * self.prompt(encoder_hidden_states).mean(1)[:, :, None, None]
        y = self.last(torch.tanh(h))
        return {"sample": y} if return_dict else (y,)


def scheduler_of(name):
    kind, options = SCHEDULERS[name]
    made = kind(**options)
    made.set_timesteps(STEPS)
    return made


def built(path, schedule, **options):
    given = {
        "sample": torch.ones(2, 3, 8, 8), "timestep": torch.tensor(500.0),
        KEY: torch.ones(2, 2, 4), "return_dict": False,
    }  # fmt: skip
    config = effuse.Config(passes="exact", backend="onnx", **options)
    compiled = effuse.compile(Net().eval(), config, inputs=given, schedule=schedule, progress=False)
    return compiled.save(path)


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """An artifact with a sampler, of any batch."""
    path = tmp_path_factory.mktemp("kept") / "net.effuse"
    return built(path, scheduler_of("dpm"), dynamic={"batch": (1, 8)})


@pytest.fixture(scope="module")
def free(tmp_path_factory):
    """An artifact without one, for any timestep, of batch 2."""
    return built(tmp_path_factory.mktemp("free") / "net.effuse", None)


def arrays(pictures=1):
    generator = np.random.default_rng(3)
    shapes = {"noise": (pictures, 3, 8, 8), "told": (pictures, 2, 4), "free": (pictures, 2, 4)}
    return {k: generator.standard_normal(v).astype(np.float32) for k, v in shapes.items()}


def expected(name, given, guidance=3.0):
    """The loop of a diffusers pipeline with the network itself."""
    scheduler, net = scheduler_of(name), Net().eval()
    noise, told, free = (torch.from_numpy(given[key]) for key in ("noise", "told", "free"))
    x = noise * getattr(scheduler, "init_noise_sigma", 1.0)
    with torch.no_grad():
        for time in scheduler.timesteps:
            shown = x
            if hasattr(scheduler, "scale_model_input"):
                shown = scheduler.scale_model_input(x, time)
            without, output = (net(shown, time, each)["sample"][:, :3] for each in (free, told))
            output = without + guidance * (output - without)
            x = scheduler.step(output, time, x, return_dict=False)[0]
    return x.numpy()


def python(code, *words):
    command = [sys.executable, "-P", "-c", code, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True)


def close(found, wanted):
    return np.abs(found - wanted).max() <= 1e-4 * np.abs(wanted).max()


def test_the_pictures_of_the_diffusers_loop_without_torch_and_diffusers(kept, free, tmp_path):
    given = arrays()
    np.savez(tmp_path / "given.npz", **given)
    solvers = {name: stored(scheduler_of(name)) for name in SCHEDULERS}
    (tmp_path / "solvers.json").write_text(json.dumps(solvers))
    words = (kept, tmp_path / "given.npz", free, tmp_path / "solvers.json", tmp_path / "made.npz")
    done = python(SAMPLE, *words)
    assert done.returncode == 0, done.stderr
    made = np.load(tmp_path / "made.npz")
    assert close(made["own"], expected("dpm", given))
    assert not close(made["own"], expected("dpm", {**given, "told": given["free"]}))
    for name in SCHEDULERS:
        assert close(made[name], expected(name, given))


def test_one_call_of_two_halves_or_two_calls(kept, free):
    own, solver = effuse.load(kept), Sampler.from_json(stored(scheduler_of("dpm")))
    for compiled, pictures, calls in (own, 1, 1), (own, 2, 1), (effuse.load(free), 2, 2):
        compiled.session.steps.clear()
        given = arrays(pictures)
        prompts = {KEY: given["told"]}, {KEY: given["free"]}
        made = effuse.sample(compiled, given["noise"], *prompts, guidance=3.0, sampler=solver)
        assert close(made, expected("dpm", given))
        assert sum(compiled.session.steps.values()) == calls * STEPS
    alone = effuse.sample(own, given["noise"], prompts[0])
    assert close(alone, expected("dpm", given, guidance=1.0))


def test_run_makes_a_picture_without_torch_and_diffusers(kept, tmp_path):
    given = arrays(2)
    for name in ("told", "free"):
        np.savez(tmp_path / f"{name}.npz", **{KEY: given[name]})
    words = ("run", kept, "--seed", 7, "--guidance", 3, "--inputs", tmp_path / "told.npz",
             "--uncond", tmp_path / "free.npz", "-o")  # fmt: skip
    done = python(RUN, *words, tmp_path / "a.png")
    assert done.returncode == 0, done.stderr
    assert f"2 pictures, {STEPS} steps" in " ".join(done.stdout.split())
    noise = np.random.default_rng(7).standard_normal((2, 3, 8, 8), np.float32)
    wanted = np.clip(expected("dpm", {**given, "noise": noise}), -1, 1)
    wanted = np.concatenate(list((wanted + 1) * 127.5), axis=2).transpose(1, 2, 0)
    pixels = np.asarray(Image.open(tmp_path / "a.png"))[::16, ::16].astype(float)
    assert pixels.shape == wanted.shape and np.abs(pixels - wanted).max() <= 1
    other = python(RUN, *words, tmp_path / "b.png", "--steps", 9)
    assert other.returncode == 1 and "Traceback" not in other.stderr
    assert "other steps were asked for than it has" in other.stderr
    assert "effuse[diffusers]" in other.stderr


def test_what_the_manifest_keeps(kept, free):
    own = effuse.load(kept).manifest["sampler"]
    assert own == stored(scheduler_of("dpm"))
    assert own["name"] == "DPMSolverMultistepScheduler"
    assert Sampler.from_json(own).timesteps.tolist() == scheduler_of("dpm").timesteps.tolist()
    without = effuse.load(free)
    assert without.manifest["sampler"] is None and stored([900, 500, 100]) is None
    with pytest.raises(InputError, match="no sampler: it was compiled without a scheduler"):
        effuse.sample(without, arrays(2)["noise"])


def test_a_scheduler_that_is_refused_leaves_the_reason():
    odd = diffusers.DDIMScheduler(thresholding=True, sample_max_value=9.0)
    odd.set_timesteps(STEPS)
    told = stored(odd)
    assert "looks at more than a pixel" in told["refused"]
    with pytest.raises(InputError, match="no sampler: DDIMScheduler: its step"):
        Sampler.from_json(told)


def test_artifacts_from_before_have_no_sampler_and_still_load(kept, tmp_path):
    path = effuse.load(kept).save(tmp_path / "old.effuse")
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["sampler"]
    artifact.finish(path, manifest)
    old, given = effuse.load(path), arrays(2)
    with pytest.raises(InputError, match="has no sampler: it was compiled without a scheduler"):
        effuse.sample(old, given["noise"], {KEY: given["told"]})
    solver = Sampler.from_json(stored(scheduler_of("dpm")))
    made = effuse.sample(old, given["noise"], {KEY: given["told"]}, sampler=solver)
    assert close(made, expected("dpm", given, guidance=1.0))


def test_a_missing_prompt_is_named(kept):
    with pytest.raises(InputError, match="encoder_hidden_states: missing"):
        effuse.sample(effuse.load(kept), arrays(2)["noise"])
