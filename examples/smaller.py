"""A smaller network: prune a trained one, train what is left, and look at the pictures.

Compiles an example network to ONNX as it is, pruned, and pruned and recovered by training; samples
the same prompts from the same noise with each, and writes one HTML report: the pictures, what went
and how important it was, times and sizes.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from emoji import names
from study import CONSOLE, NETWORKS, Study, chosen, show

import effuse
from effuse.errors import EffuseError
from effuse.passes import Distill, Hoist, Prune
from effuse.report import rich_table, write_html
from effuse.report_prune import prune_lines, pruned_table

BACKEND = "onnx"
RATES = {"dit": 5e-4, "unet": 5e-5}  # of AdamW; at more, the UNet's steps improve, not its pictures
ROUNDS = 2  # of calibration, each with prompts and noise of its own: the training's data
MOST = len(names()) // 2  # prompts; the others are the training's


def main() -> None:
    """Read the arguments and run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--out", type=Path, default=Path("out/smaller"), help="folder to write into")
    add("--network", choices=tuple(NETWORKS), default="dit", help="default: dit")
    add("--share", type=float, default=0.2, help="of the parameters to remove (default: 0.2)")
    add("--by", default="loss", help="loss, latent, magnitude or random (default: loss)")
    add("--updates", type=int, default=400, help="of the training (default: 400)")
    add("--steps", type=int, default=20, help="DDIM steps (default: 20)")
    add("--prompts", type=int, default=8, help="number of prompts (default: 8)")
    arguments = parser.parse_args()
    if arguments.steps < 1:
        parser.error(f"--steps: expected 1 or more, came {arguments.steps}")
    if not 1 <= arguments.prompts <= MOST:
        parser.error(f"--prompts: expected 1 to {MOST}, came {arguments.prompts}")
    try:
        run(arguments)
    except EffuseError as error:
        parser.error(str(error))


def run(arguments: argparse.Namespace) -> None:
    """Compile three times, sample with each, report."""
    wanted = configs(arguments)  # refused here, before any work
    arguments.out.mkdir(parents=True, exist_ok=True)
    prompts = chosen(arguments.prompts)
    study = Study.open(arguments.network, arguments.steps, prompts, rounds(prompts))
    CONSOLE.print(intention(arguments), highlight=False)
    built = {name: study.build(arguments.out / f"{name}.effuse", config)
             for name, config in wanted.items()}  # fmt: skip
    evaluation = study.compare({name: (each, each.size / 1e6) for name, each in built.items()})
    reports = {name: built[name].report for name in ("pruned", "recovered")}
    page = write_html(arguments.out / "report.html", reports, evaluation)
    manifest = built["recovered"].manifest
    CONSOLE.print(rich_table(pruned_table(manifest)))
    CONSOLE.print("\n".join(filter(None, prune_lines(manifest))), highlight=False)
    show(evaluation)
    CONSOLE.print(f"report     {page}")


def configs(arguments: argparse.Namespace) -> dict[str, effuse.Config]:
    """The three builds; scores are kept in the folder, and so measured once.

    Raises:
        ConfigError: an argument is out of range.
    """
    kept = str(arguments.out / "scores")
    prune = Prune(parameters=arguments.share, by=arguments.by, resume=kept)
    recover = Distill(steps=arguments.updates, rate=RATES[arguments.network])
    passes: dict[str, tuple[Any, ...]] = {
        "original": (Hoist(),),
        "pruned": (prune, Hoist()),
        "recovered": (prune, recover, Hoist()),
    }
    return {name: effuse.Config(passes=each, backend=BACKEND) for name, each in passes.items()}


def rounds(prompts: list[str]) -> list[list[str]]:
    """Prompts that are in no picture, as many in each round, spread over all."""
    others = [name for name in names() if name not in prompts]
    stride = len(others) // len(prompts)
    return [others[number::stride][: len(prompts)] for number in range(min(stride, ROUNDS))]


def intention(arguments: argparse.Namespace) -> str:
    """What is going to happen."""
    pictures = f"{arguments.prompts} picture{'' if arguments.prompts == 1 else 's'}"
    return (
        f"Compiling the example network {arguments.network!r} three times, then sampling "
        f"{pictures} in {arguments.steps} steps with each:\n"
        "  original   exactly as it is\n"
        f"  pruned     without {arguments.share:.0%} of its parameters, chosen by "
        f"{arguments.by}\n"
        f"  recovered  pruned, then {arguments.updates} updates of training against the original\n"
        "With the defaults this takes about 4 minutes of processor time, with 'unet' about 13."
    )


if __name__ == "__main__":
    main()
