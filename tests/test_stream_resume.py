"""Streamed builds that were interrupted: what is finished stays, and the result is the same."""

from __future__ import annotations

import errno
import os
import random
import resource
import shutil
import signal
import time

import pytest
import torch
from diffusers import UNet2DModel

import effuse
from effuse.errors import ArtifactError, ConfigError
from effuse.passes import Hoist, Quantize
from effuse.resume import Journal, Workspace, finished, part_of, room_for
from effuse.tensor_file import Stored, open_tensors, write_tensors

TIMES = [900.0, 500.0, 100.0]
SEED = 5
WEIGHTS = "weights.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    place = tmp_path_factory.mktemp("network")
    UNet2DModel(
        sample_size=8,
        block_out_channels=(64, 64),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=8,
        add_attention=False,
    ).save_pretrained(place)
    return place


def compiled(folder, resume=None, format="w4a16", shapes=(), **options):
    passes = (Hoist(), Quantize(format, min_sqnr_db=-99.0))
    config = effuse.Config(passes=passes, backend="reference", stream=True, shapes=shapes)
    given = {"schedule": TIMES, "progress": False, **options}
    return effuse.compile(folder, config, resume=resume, **given)


@pytest.fixture(scope="module")
def uninterrupted(folder, tmp_path_factory):
    return compiled(folder).save(tmp_path_factory.mktemp("whole") / "x")


def same(one, other):
    names = sorted(path.name for path in one.iterdir())
    return names == sorted(path.name for path in other.iterdir()) and all(
        (one / name).read_bytes() == (other / name).read_bytes() for name in names
    )


def noted(part):
    path = part / "journal"
    return path.read_bytes().count(b"\n") - 1 if path.exists() else -1


def noting_at_most(count):
    """A journal's `note` that never comes back from the tensor of that number."""
    real = Journal.note

    def note(journal, *given):
        real(journal, *given)
        while len(journal) >= count:
            signal.pause()

    return note


def killed(folder, part, least, most, rest, **options):
    """Compile in another process until `least` tensors are noted and `rest` seconds more.

    However long this process is kept waiting, the other notes no more than `most`.
    """
    child = os.fork()
    if not child:
        torch.set_num_threads(1)  # threads do not live through a fork
        Journal.note = noting_at_most(most)
        compiled(folder, part, **options)
        os._exit(0)
    while noted(part) < least and os.waitpid(child, os.WNOHANG) == (0, 0):
        time.sleep(1e-4)
    time.sleep(rest)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return finished(part)


def test_a_build_killed_at_random_moments_ends_as_an_uninterrupted_one(
    folder, uninterrupted, tmp_path
):
    goal = tmp_path / "x"
    draw, part = random.Random(SEED), part_of(goal)
    for least, most, rest in ((-1, 2, 1), (2, 10, 2e-3), (draw.randrange(12, 18), 20, 2e-3)):
        left = killed(folder, part, least, most, draw.uniform(0, rest))
        assert max(least, 0) <= left <= most
    compiled(folder, part).save(goal)
    assert same(goal, uninterrupted)
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_killed_build_of_several_sizes_goes_on(folder, tmp_path):
    sizes = {"shapes": [{"height": 8, "width": 8}, {"height": 16, "width": 16}]}
    whole = compiled(folder, **sizes).save(tmp_path / "whole")
    part = part_of(tmp_path / "x")
    assert 4 <= killed(folder, part, 4, 9, 2e-3, **sizes) <= 9
    assert same(compiled(folder, part, **sizes).save(tmp_path / "x"), whole)


def test_finished_tensors_are_not_computed_again(folder, uninterrupted, tmp_path, monkeypatch):
    part = tmp_path / "x.part"
    compiled(folder, part)
    from effuse.passes import quantize_writer

    def refuse(*_, **__):
        raise AssertionError("computed again")

    real = quantize_writer.pack_weight
    monkeypatch.setattr(  # shapes are asked for on the meta device
        quantize_writer, "pack_weight",
        lambda weight, *rest: real(weight, *rest) if weight.is_meta else refuse(),
    )  # fmt: skip
    assert same(compiled(folder, part).save(tmp_path / "x"), uninterrupted)


def damage(part):
    path = part / "artifact" / WEIGHTS
    entry = max(open_tensors(path).entries.values(), key=lambda each: each.stop)
    with path.open("r+b") as file:
        file.seek(entry.start)
        file.write(b"\xff\x00" * 8)


def cut_off(part):
    path = part / "artifact" / WEIGHTS
    os.truncate(path, path.stat().st_size // 2)


def half_a_line(part):
    path = part / "journal"
    path.write_bytes(path.read_bytes()[:-20])


def of_another_version(part):
    path = part / "journal"
    path.write_bytes(b"0" + path.read_bytes()[1:])


def no_journal(part):
    (part / "journal").write_bytes(b"\xff\xfe nothing of ours")


@pytest.mark.parametrize("harm", [damage, cut_off, half_a_line, of_another_version, no_journal])
def test_what_was_half_written_is_found_and_done_again(folder, uninterrupted, tmp_path, harm):
    part = tmp_path / "x.part"
    compiled(folder, part)
    harm(part)
    assert same(compiled(folder, part).save(tmp_path / "x"), uninterrupted)


def test_other_weights_or_another_format_use_nothing_of_before(folder, tmp_path):
    part = tmp_path / "x.part"
    compiled(folder, part)
    eight = compiled(folder, part, format="w8a16").save(tmp_path / "eight")
    assert same(eight, compiled(folder, format="w8a16").save(tmp_path / "anew"))


def test_an_artifact_that_was_there_is_replaced(folder, uninterrupted, tmp_path):
    goal = tmp_path / "x"
    compiled(folder, format="w8a16").save(goal)
    compiled(folder, part_of(goal)).save(goal)
    assert same(goal, uninterrupted)


def test_a_zip_can_be_used_after_it_was_saved(folder, tmp_path):
    build = compiled(folder, tmp_path / "x.zip.part")
    build.save(tmp_path / "x.zip")
    assert build.size and effuse.load(tmp_path / "x.zip").plan == build.plan
    del build
    assert [path.name for path in tmp_path.iterdir()] == ["x.zip"]


# ---- bad input -----------------------------------------------------------------------------------


def test_a_build_in_memory_has_nothing_to_go_on_with(folder, tmp_path):
    with pytest.raises(ConfigError, match=r"resume: goes with stream=True"):
        effuse.compile(folder, "none", resume=tmp_path / "x")


def test_a_folder_of_something_else_is_left_alone(folder, tmp_path):
    (tmp_path / "mine").write_text("hello")
    with pytest.raises(ConfigError, match="was not written by an interrupted build"):
        compiled(folder, tmp_path)
    assert (tmp_path / "mine").read_text() == "hello"


def test_two_builds_do_not_share_a_folder(folder, tmp_path):
    first = Workspace(tmp_path / "x.part")
    with pytest.raises(ConfigError, match="another build is at work"):
        compiled(folder, tmp_path / "x.part")
    first.cleanup()
    Workspace(tmp_path / "x.part").cleanup()


def test_a_disk_that_gets_full_is_told_and_the_build_goes_on(
    folder, uninterrupted, tmp_path, monkeypatch
):
    goal = tmp_path / "x"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    size = (uninterrupted / WEIGHTS).stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, hard))
    try:
        with pytest.raises(ArtifactError, match=rf"File too large\): {size} bytes are needed"):
            compiled(folder, part_of(goal))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not goal.exists() and finished(part_of(goal)) > 1
    compiled(folder, part_of(goal)).save(goal)
    assert same(goal, uninterrupted)


def test_a_file_that_does_not_fit_is_not_begun(tmp_path):
    free = shutil.disk_usage(tmp_path).free
    with (
        pytest.raises(ArtifactError, match=r"are needed, .* free; make room"),
        room_for(tmp_path / "x", 10 * free),
    ):
        raise AssertionError("begun")


# ---- the file ------------------------------------------------------------------------------------


def stored(name, text):
    return Stored(name, "U8", (len(text),), len(text), f"key-{text.decode()}", lambda: text)


def test_a_file_is_written_as_safetensors_are(tmp_path):
    places = write_tensors(tmp_path / "x", [stored("b", b"one"), stored("a", b"three")])
    found = open_tensors(tmp_path / "x").entries
    data = (tmp_path / "x").read_bytes()
    assert {name: (each.start, each.stop - each.start) for name, each in found.items()} == places
    assert [data[at : at + size] for at, size in places.values()] == [b"one", b"three"]


def test_the_journal_keeps_what_has_the_same_key_at_the_same_place(tmp_path):
    journal = Journal(tmp_path / "journal")
    write_tensors(tmp_path / "x", [stored("a", b"one"), stored("b", b"two")], journal)
    asked = []

    def read():
        asked.append(1)
        return b"new"

    again = [stored("a", b"one"), Stored("b", "U8", (3,), 3, "key-new", read)]
    write_tensors(tmp_path / "x", again, Journal(tmp_path / "journal"))
    assert asked and (tmp_path / "x").read_bytes().endswith(b"onenew")


def test_a_write_that_fails_says_how_much_is_needed(tmp_path):
    def full():
        raise OSError(errno.ENOSPC, "No space left on device")

    broken = Stored("b", "U8", (3,), 3, "", full)
    with pytest.raises(ArtifactError, match=r"No space left on device\): \d+ bytes are needed"):
        write_tensors(tmp_path / "x", [stored("a", b"one"), broken])
