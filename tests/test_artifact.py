"""Artifacts: equal bytes from equal input, checked at load, written whole or not at all."""

from __future__ import annotations

import contextlib
import getpass
import gzip
import hashlib
import json
import os
import pickletools
import shutil
import stat
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from safetensors.numpy import load_file
from torch import nn

import effuse
from effuse import artifact
from effuse.errors import ArtifactError, BackendError

TIMES = [900, 500, 100]


class Net(nn.Module):
    """A denoiser whose table is read at the prompt's rate and at the step's."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Linear(32, 32)
        self.enter = nn.Conv2d(3, 32, 3, padding=1)
        self.leave = nn.Conv2d(32, 3, 3, padding=1)

    def forward(self, sample, timestep, encoder_hidden_states):
        prompt = self.table(encoder_hidden_states).mean(1)[:, :, None, None]
        h = self.enter(sample) + torch.sin(timestep * 0.01) * prompt
        h = self.table(h.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.leave(torch.relu(h))


def example():
    generator = torch.Generator().manual_seed(0)
    return {
        "sample": torch.randn(1, 3, 8, 8, generator=generator),
        "timestep": torch.tensor(500),
        "encoder_hidden_states": torch.randn(1, 4, 32, generator=generator),
    }


def build(config="exact"):
    return effuse.compile(Net().eval(), config, inputs=example(), schedule=TIMES, progress=False)


@pytest.fixture(scope="module")
def compiled():
    return build()


@pytest.fixture
def folder(compiled, tmp_path):
    return compiled.save(tmp_path / "net.effuse")


@pytest.fixture
def zipped(compiled, tmp_path):
    return compiled.save(tmp_path / "net.zip")


def contents(path):
    return {each.name: each.read_bytes() for each in path.iterdir()}


def resum(folder):
    """Write SHA256SUMS anew, as somebody would who edits an artifact on purpose."""
    names = sorted(each.name for each in folder.iterdir() if each.name != "SHA256SUMS")
    lines = [f"{hashlib.sha256((folder / n).read_bytes()).hexdigest()}  {n}\n" for n in names]
    (folder / "SHA256SUMS").write_text("".join(lines))


def rewrite_zip(path, members):
    with zipfile.ZipFile(path, "w") as archive:
        for info, data in members:
            archive.writestr(info, data)


def members_of(folder):
    return [(each.name, each.read_bytes()) for each in sorted(folder.iterdir())]


@pytest.fixture(scope="module", autouse=True)
def own_temporary_folder(tmp_path_factory):
    """Compilations of other processes come and go in the system's."""
    system, tempfile.tempdir = tempfile.tempdir, str(tmp_path_factory.mktemp("temporary"))
    yield
    tempfile.tempdir = system


def temporary():
    return {each.name for each in Path(tempfile.gettempdir()).glob("effuse-*")}


def sorted_names(path):
    return sorted(each.name for each in path.iterdir())


# ---- what is in it -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["net.effuse", "net.zip"])
def test_saved_and_loaded_it_computes_the_same(compiled, tmp_path, name):
    path = compiled.save(tmp_path / name)
    assert path == tmp_path / name and path.is_dir() == (name == "net.effuse")
    loaded = effuse.load(path)
    for time in TIMES:
        given = {**example(), "timestep": torch.tensor(time)}
        assert torch.equal(loaded(**given), compiled(**given))
    assert loaded.plan == compiled.plan
    assert loaded.manifest == json.loads(json.dumps(compiled.manifest))
    assert contents(loaded.folder) == contents(compiled.folder)


def test_a_loaded_zip_lives_as_long_as_it_is_used(zipped):
    before = temporary()
    loaded = effuse.load(zipped)
    assert len(temporary() - before) == 1
    loaded(**example())
    loaded._keep._holder.cleanup()
    assert temporary() <= before


def test_anyone_may_read_a_saved_folder(folder):
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o777 & ~mask
    assert all(stat.S_IMODE(each.stat().st_mode) == 0o666 & ~mask for each in folder.iterdir())


def test_sha256sum_checks_it(folder):
    if not shutil.which("sha256sum"):
        pytest.skip("no sha256sum here")
    subprocess.run(["sha256sum", "--quiet", "-c", "SHA256SUMS"], cwd=folder, check=True)


def test_the_manifest_lists_every_file_with_size_and_hash(folder):
    files = json.loads((folder / "manifest.json").read_text())["files"]
    assert sorted([*files, "SHA256SUMS", "manifest.json"]) == sorted_names(folder)
    for name, entry in files.items():
        data = (folder / name).read_bytes()
        assert entry == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


@pytest.mark.parametrize("config", ["exact", {"passes": "exact", "backend": "reference"}])
def test_no_file_is_a_pickle(config, tmp_path):
    path = build(config).save(tmp_path / "net.effuse")
    for file in path.iterdir():
        data = file.read_bytes()
        assert not zipfile.is_zipfile(file), f"{file.name} may be torch.save's"
        assert data[:1] != b"\x80", file.name
        with contextlib.suppress(ValueError, UnicodeDecodeError, IndexError, KeyError):
            last = list(pickletools.genops(data))[-1][0].name
            assert last != "STOP", f"{file.name} is a pickle"


def test_every_model_is_valid_and_loads_in_plain_onnxruntime(folder):
    models = sorted(folder.glob("*.onnx"))
    assert [each.stem for each in models] == ["conditioning", "full", "prompt"]
    for path in models:
        onnx.checker.check_model(str(path), full_check=True)
        domains = {each.domain for each in onnx.load(path, load_external_data=False).opset_import}
        assert domains <= {"", "ai.onnx"}
        onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def test_a_weight_that_two_parts_read_is_stored_once(folder):
    stored = load_file(folder / "weights.safetensors")
    table = Net().table.weight.detach().numpy()
    same = [
        name
        for name, value in stored.items()
        if value.size == table.size
        and np.array_equal(np.sort(value.ravel()), np.sort(table.ravel()))
    ]
    places = {}
    for path in folder.glob("*.onnx"):
        for tensor in onnx.load(path, load_external_data=False).graph.initializer:
            info = {each.key: each.value for each in tensor.external_data}
            if info and list(tensor.dims) == [32, 32]:
                places[path.name] = (info["location"], info["offset"], info["length"])
    assert len(same) == 1, same
    assert set(places) == {"full.onnx", "prompt.onnx"}
    assert len(set(places.values())) == 1
    assert next(iter(places.values()))[0] == "weights.safetensors"
    assert int(next(iter(places.values()))[1]) % 64 == 0


def test_nothing_tells_where_and_by_whom_it_was_built(tmp_path, monkeypatch):
    from diffusers import UNet2DModel

    where = tmp_path / "a-very-private-folder"
    UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(4,),
        norm_num_groups=2, down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
        add_attention=False,
    ).save_pretrained(where)  # fmt: skip
    for config in ({"backend": "onnx"}, {"backend": "reference"}):
        path = effuse.compile(where, {"passes": "none", **config}, progress=False).save(
            tmp_path / "out"
        )
        words = [str(where), "a-very-private-folder", str(Path.cwd()), f"{Path.home()}/"]
        words += [
            f"{tempfile.gettempdir()}/",
            f"/{getpass.getuser()}/",
            "site-packages",
            sys.prefix,
        ]
        for file in path.iterdir():
            data = file.read_bytes()
            data = gzip.decompress(data) if file.suffix == ".gz" else data
            found = [word for word in words if word.encode() in data]
            assert not found, f"{file.name} holds {found}"


# ---- equal input, equal bytes --------------------------------------------------------------------


@pytest.mark.parametrize("config", ["exact", {"passes": "w8a8", "backend": "reference"}])
def test_equal_input_gives_equal_bytes(tmp_path, config):
    one, two = build(config), build(config)
    assert contents(one.folder) == contents(two.folder)
    assert one.save(tmp_path / "1.zip").read_bytes() == two.save(tmp_path / "2.zip").read_bytes()


def test_a_fresh_process_gives_equal_bytes(compiled, tmp_path):
    target = tmp_path / "other.effuse"
    code = (
        f"import importlib.util as u; s = u.spec_from_file_location('made', {__file__!r});"
        "m = u.module_from_spec(s); s.loader.exec_module(m);"
        f"m.build().save({str(target)!r})"
    )
    subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONHASHSEED": "123", "OMP_NUM_THREADS": "1"},
    )
    assert contents(target) == contents(compiled.folder)


def test_another_seed_or_config_is_recorded(compiled):
    other = build({"passes": "exact", "seed": 1})
    assert other.manifest["config"]["seed"] == 1
    assert contents(other.folder)["full.onnx"] == contents(compiled.folder)["full.onnx"]


# ---- damage --------------------------------------------------------------------------------------

FILES = ["full.onnx", "prompt.onnx", "weights.safetensors", "graphs.txt.gz", "manifest.json"]


@pytest.mark.parametrize("name", [name for name in FILES if name != "manifest.json"])
def test_a_truncated_file(folder, name):
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[:-1])
    with pytest.raises(ArtifactError, match=f"{name} is not as it was written.*copy the artifact"):
        effuse.load(folder)


@pytest.mark.parametrize("name", FILES)
def test_one_changed_bit(folder, name):
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / name).write_bytes(data)
    with pytest.raises(ArtifactError, match=f"{name} is (not as it was written|damaged)"):
        effuse.load(folder)


@pytest.mark.parametrize("name", [*FILES[:-1], "SHA256SUMS"])
def test_a_missing_file(folder, name):
    (folder / name).unlink()
    with pytest.raises(ArtifactError, match=f"{name} is missing; copy the artifact again"):
        effuse.load(folder)


def test_no_manifest(folder, tmp_path):
    (folder / "manifest.json").unlink()
    with pytest.raises(ArtifactError, match=r"no manifest\.json in it, so this is no effuse"):
        effuse.load(folder)
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(ArtifactError, match=r"no manifest\.json"):
        effuse.load(tmp_path / "other.zip")


def test_no_such_path(tmp_path):
    with pytest.raises(ArtifactError, match="no such artifact"):
        effuse.load(tmp_path / "nothing.effuse")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"format": "x"}', "{}", "\xff"])
def test_a_manifest_that_is_none(folder, text):
    (folder / "manifest.json").write_bytes(text.encode("latin-1"))
    resum(folder)
    with pytest.raises(ArtifactError, match=r"manifest\.json is damaged"):
        effuse.load(folder)


def test_a_manifest_that_describes_no_program(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    for program in ({}, [], {**manifest["program"], "bounds": [1]}):
        (folder / "manifest.json").write_text(json.dumps({**manifest, "program": program}))
        resum(folder)
        with pytest.raises(ArtifactError, match="does not describe a program"):
            effuse.load(folder)


def test_a_backend_that_is_unknown_here(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "backend": "quantum"}))
    resum(folder)
    with pytest.raises(ArtifactError, match="built for 'quantum', which this effuse does not run"):
        effuse.load(folder)


@pytest.mark.parametrize("keep", [0, 1, 3])
def test_sums_that_do_not_cover_everything(folder, keep):
    sums = folder / "SHA256SUMS"
    sums.write_text("".join(sums.read_text().splitlines(keepends=True)[:keep]))
    with pytest.raises(ArtifactError, match="SHA256SUMS does not cover"):
        effuse.load(folder)


def test_sums_that_leave_the_artifact_or_are_no_text(folder):
    sums = folder / "SHA256SUMS"
    text = sums.read_text()
    sums.write_text(f"{text}{'0' * 64}  ../../etc/passwd\n")
    with pytest.raises(ArtifactError, match="which leaves the artifact"):
        effuse.load(folder)
    sums.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ArtifactError, match="SHA256SUMS is damaged"):
        effuse.load(folder)


def test_a_newer_format(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    newer = {"format": artifact.FORMAT + 1, "effuse": "9.9", "whatever": manifest}
    (folder / "manifest.json").write_text(json.dumps(newer))
    resum(folder)
    with pytest.raises(ArtifactError) as caught:
        effuse.load(folder)
    for word in ("effuse 9.9", f"format {artifact.FORMAT + 1}", "pip install -U effuse"):
        assert word in str(caught.value)


def test_a_model_that_onnxruntime_cannot_read(folder):
    (folder / "full.onnx").write_bytes(b"no model")
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "files": {}}))
    resum(folder)
    with pytest.raises(ArtifactError, match=r"full\.onnx: onnxruntime cannot load it"):
        effuse.load(folder)


# ---- zips ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_a_truncated_zip(zipped, share):
    data = zipped.read_bytes()
    zipped.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(ArtifactError, match="neither a folder nor a complete zip; copy"):
        effuse.load(zipped)


def test_a_zip_with_changed_bytes(zipped):
    data = zipped.read_bytes()
    before = temporary()
    for place in range(40, len(data), max(1, len(data) // 60)):
        zipped.write_bytes(data[:place] + bytes([data[place] ^ 0x55]) + data[place + 1 :])
        with contextlib.suppress(ArtifactError):
            opened = artifact.Opened(zipped)  # a byte that nothing reads, such as a date
            assert opened.manifest["format"] == 1
            opened._holder.cleanup()
    assert len(temporary() - before) <= 1


@pytest.mark.parametrize(
    "name", ["/tmp/effuse-evil", "../evil", "a/../../evil", "sub/full.onnx", "..", ".hidden",
             "C:\\evil", "full.onnx/"],
)  # fmt: skip
def test_a_zip_with_paths_that_leave_it(folder, tmp_path, name):
    evil = tmp_path / "deep" / "evil.zip"
    evil.parent.mkdir()
    rewrite_zip(evil, [*members_of(folder), (name, b"evil")])
    before = sorted_names(tmp_path), temporary()
    with pytest.raises(ArtifactError, match="a path that leaves the artifact"):
        effuse.load(evil)
    assert not Path("/tmp/effuse-evil").exists()
    assert (sorted_names(tmp_path), temporary()) == before


def test_a_zip_with_a_symbolic_link(folder, tmp_path):
    link = zipfile.ZipInfo("link.onnx")
    link.create_system, link.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
    rewrite_zip(tmp_path / "evil.zip", [*members_of(folder), (link, b"/etc/passwd")])
    with pytest.raises(ArtifactError, match=r"'link\.onnx', a symbolic link"):
        effuse.load(tmp_path / "evil.zip")


def test_what_is_no_zip(tmp_path):
    (tmp_path / "net.zip").write_bytes(b"hello")
    with pytest.raises(ArtifactError, match="neither a folder nor a complete zip"):
        effuse.load(tmp_path / "net.zip")


# ---- writing -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["net.effuse", "net.zip"])
def test_an_artifact_is_replaced(compiled, tmp_path, name):
    path = compiled.save(tmp_path / name)
    other = build({"passes": "none"}).save(path)
    assert effuse.load(other).manifest["config"]["passes"] == []
    assert sorted_names(tmp_path) == [name]


def test_a_folder_replaces_a_zip_and_an_empty_folder(compiled, tmp_path):
    for name in ("zip", "empty"):
        goal = tmp_path / name
        if name == "zip":
            shutil.copy(compiled.save(tmp_path / "net.zip"), goal)
        else:
            goal.mkdir()
        compiled.save(goal)
        assert goal.is_dir()
        effuse.load(goal)


def test_saving_over_the_folder_that_it_was_loaded_from(folder):
    loaded = effuse.load(folder)
    before = loaded(**example())
    loaded.save(folder)
    assert torch.equal(effuse.load(folder)(**example()), before)


def test_what_is_no_artifact_is_left_alone(compiled, tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "manifest.json").write_text("{}")  # a browser's extension has one, too
    (tmp_path / "letter.txt").write_text("dear")
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        archive.writestr("manifest.json", "photo")
    os.mkfifo(tmp_path / "pipe")
    before = sorted_names(tmp_path)
    for name, kind in [("home", "folder"), ("letter.txt", "file"), ("photos.zip", "file"),
                       ("pipe", "file")]:  # fmt: skip
        with pytest.raises(ArtifactError, match=f"a {kind} that is no artifact is there"):
            compiled.save(tmp_path / name)
    assert sorted_names(tmp_path) == before
    assert (tmp_path / "letter.txt").read_text() == "dear"


def test_a_folder_that_is_missing(compiled, tmp_path):
    with pytest.raises(ArtifactError, match=r"the folder '.*nowhere' does not exist; create it"):
        compiled.save(tmp_path / "nowhere" / "net.effuse")


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a folder that root cannot write")
@pytest.mark.parametrize("name", ["net.effuse", "net.zip"])
def test_a_path_that_cannot_be_written(compiled, name):
    with pytest.raises(ArtifactError, match=r"cannot write the artifact|no permission to write"):
        compiled.save(f"/proc/self/{name}")


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("name", ["net.effuse", "net.zip"])
@pytest.mark.parametrize("there", [False, True])
def test_a_failure_in_the_middle_leaves_what_was_there(
    compiled, tmp_path, monkeypatch, error, name, there
):
    path = tmp_path / name
    if there:
        compiled.save(path)
    before = contents(path) if path.is_dir() else path.read_bytes() if there else None

    def fail(*args, **kwargs):
        if calls.append(args) or len(calls) == 3:
            raise error
        return real(*args, **kwargs)

    calls = []
    function = "copyfile" if name == "net.effuse" else "copyfileobj"
    real = getattr(shutil, function)
    monkeypatch.setattr(shutil, function, fail)
    kind = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else ArtifactError
    with pytest.raises(kind) as caught:
        compiled.save(path)
    if kind is ArtifactError:
        assert "No space left on device" in str(caught.value)
    assert len(calls) >= 3
    assert sorted_names(tmp_path) == ([name] if there else [])
    if there:
        assert before == (contents(path) if path.is_dir() else path.read_bytes())


@pytest.mark.parametrize("error", [OSError("disk"), KeyboardInterrupt()])
def test_a_failure_while_swapping_brings_the_old_one_back(compiled, tmp_path, monkeypatch, error):
    path = compiled.save(tmp_path / "net.effuse")
    before = contents(path)
    real = Path.rename

    def rename(self, target):
        if self.name == "new":
            raise error
        return real(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises((ArtifactError, KeyboardInterrupt)):
        compiled.save(path)
    assert sorted_names(tmp_path) == ["net.effuse"]
    assert contents(path) == before


@pytest.mark.parametrize("error", [BackendError("broken"), KeyboardInterrupt()])
def test_a_failed_compilation_leaves_nothing(monkeypatch, error):
    from effuse import build as phases

    def fail(*args):
        raise error

    before = temporary()
    monkeypatch.setattr(phases, "check_parity", fail)
    with pytest.raises(type(error)) as caught:
        build()
    assert caught.value is error  # and while somebody still holds it:
    assert temporary() == before
