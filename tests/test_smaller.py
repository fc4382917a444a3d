"""The example that prunes and recovers: its prompts, its arguments, and a whole run of it."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def example(name):
    sys.path.insert(0, str(EXAMPLES))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(EXAMPLES))


emoji_dit, study, smaller = example("emoji_dit"), example("study"), example("smaller")


class TinyPipeline(emoji_dit.EmojiDitPipeline):
    """The class-conditional transformer with two untrained blocks."""

    @classmethod
    def open(cls, folder=emoji_dit.FOLDER):
        torch.manual_seed(0)
        model = example("train_emoji_dit").network(len(emoji_dit.names()), layers=2).eval()
        for parameter in model.parameters():  # training starts from gates at zero
            torch.nn.init.normal_(parameter, std=0.1)
        return cls(model, DDIMScheduler.from_pretrained(folder / "scheduler"))


def started(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["smaller.py", *map(str, arguments)])
    smaller.main()


@pytest.mark.parametrize("count", [1, 8, 60, smaller.MOST])
def test_no_prompt_is_in_a_picture_and_in_the_training(count):
    prompts = study.chosen(count)
    rounds = smaller.rounds(prompts)
    trained = [name for each in rounds for name in each]
    assert len(prompts) == count and 1 <= len(rounds) <= smaller.ROUNDS
    assert {len(each) for each in rounds} == {count}
    assert len({*prompts, *trained}) == len(prompts) + len(trained)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--share", 1.5), "parameters=1.5: expected a share to remove between 0 and 1"),
        (("--updates", 0), "steps=0: at least 1"),
        (("--by", "los"), "did you mean 'loss'"),
        (("--prompts", 0), "--prompts: expected 1 to 85, came 0"),
        (("--prompts", 86), "--prompts: expected 1 to 85, came 86"),
        (("--steps", 0), "--steps: expected 1 or more, came 0"),
    ],
)
def test_arguments_out_of_range_are_refused_before_any_work(
    arguments, words, tmp_path, monkeypatch, capsys
):
    with pytest.raises(SystemExit, match="2"):
        started(monkeypatch, "--out", tmp_path / "out", *arguments)
    assert words in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


def test_a_whole_run_writes_three_networks_and_one_page(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(study.NETWORKS, "dit", (TinyPipeline, "transformer", 1.2))
    monkeypatch.setattr(smaller, "BACKEND", "reference")  # a tenth of the time of ONNX exports
    few = ("--prompts", 1, "--steps", 3, "--updates", 2, "--share", 0.1)
    started(monkeypatch, "--network", "dit", "--out", tmp_path, *few)
    told = " ".join(capsys.readouterr().out.split())
    assert "three times, then sampling 1 picture in 3 steps" in told
    assert "Pruned" in told and "2 updates took" in told
    sizes = {name: sum(path.stat().st_size for path in (tmp_path / f"{name}.effuse").iterdir())
             for name in ("original", "pruned", "recovered")}  # fmt: skip
    assert sizes["pruned"] < 0.95 * sizes["original"] > sizes["recovered"]
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.count("<img") == 5  # the original, twice a picture and its difference
    for words in ("What was built: pruned", "What was built: recovered", "Recovery by training",
                  "Do single losses add up?"):  # fmt: skip
        assert words in page
    assert "What was built: original" not in page
