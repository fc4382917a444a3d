"""The rows of the quantization benchmark, as data: methods on top of a format's plain rounding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, get_args, get_type_hints

from effuse.kernels.formats import parse
from effuse.passes import ORDER, LowRank, Pass, Quantize, Smooth, SplitShortcut, StartToken

STUDIED = ("w8a8", "w4a4", "w4a8")  # with every method
NVFP4 = "e2m1/group16/scale-e4m3"
LABELS = {f"{NVFP4}:{NVFP4}/dynamic": "nvfp4a4"}  # formats without a name of their own
BRANCHED = ("nvfp4", *LABELS)  # with smoothing and branches
PLAIN_ONLY = ("fp8", "mxfp4", "w4a16")
PLAIN, WINNERS = "plain", "all winners"
NO_BOUND = -99.0  # dB: no layer stays in float for its error, so rows quantize the same layers
LEAST_GAIN = 0.1  # dB of a winner
OPTIONS: Mapping[str, Mapping[str, Any]] = {  # of Quantize
    'weight_ranges="mse"': {"weight_ranges": "mse"},
    'ranges="mse"': {"ranges": "mse"},
    'activations="step"': {"activations": "step"},
    'rounding="gptq"': {"rounding": "gptq"},
    'rounding="reconstruct"': {"rounding": "reconstruct"},
    "correct_bias": {"correct_bias": True},
}
STEP_CONVOLUTIONS = "step, convolutions only"
SPLITS = {"SplitShortcut()": SplitShortcut(), "SplitShortcut, norms": SplitShortcut(True)}
GROUPS = (  # of which the winners take the best one
    tuple(SPLITS),
    ('rounding="gptq"', 'rounding="reconstruct"'),
    ('activations="step"', STEP_CONVOLUTIONS),
)
BEFORE_RUN_TIME = "linear layers too: one range a tensor and group of steps, not groups at run time"


@dataclass(frozen=True, eq=False)  # by identity: options are a dict
class Row:
    """A format with one method, or with several: passes before Quantize, and its options."""

    format: str
    method: str
    before: tuple[Pass, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    remark: str = ""

    @property
    def name(self) -> str:
        """The format, and what is added to it."""
        label = LABELS.get(self.format, self.format)
        return label if self.method == PLAIN else f"{label} + {self.method}"

    @property
    def quantize(self) -> Quantize:
        """The pass of this row."""
        return Quantize(**{"format": self.format, "min_sqnr_db": NO_BOUND, **self.options})

    @property
    def missing(self) -> str | None:
        """Which option this effuse does not have, or None."""
        known = get_type_hints(Quantize)
        for name, value in self.options.items():
            choices = get_args(known.get(name))
            if name not in known or (choices and value not in choices):
                return f"skipped: Quantize has no {name}={value!r}"
        return None


def rows(network: str) -> list[Row]:
    """A network's rows; those of all winners are empty until `winners` fills them."""
    found = [row for format in STUDIED for row in studied(network, format)]
    found += [row for format in BRANCHED for row in branched(format)]
    return [*found, *(Row(format, PLAIN) for format in PLAIN_ONLY)]


def studied(network: str, format: str) -> list[Row]:
    """Every method on one format."""
    at_run_time = ranges_of(format) == "dynamic"
    found = [Row(format, PLAIN)]
    for name, options in OPTIONS.items():
        remark = BEFORE_RUN_TIME if at_run_time and "activations" in options else ""
        found.append(Row(format, name, options=options, remark=remark))
        if remark and network == "unet":
            found.append(Row(format, STEP_CONVOLUTIONS, options={"format": step_text(format)}))
    splits = SPLITS if network == "unet" else {}
    before = {**splits, "Smooth()": Smooth(format=format), "StartToken()": StartToken()}
    found += [Row(format, name, (each,)) for name, each in before.items()]
    return [*found, Row(format, WINNERS), *branches(format)]


def branched(format: str) -> list[Row]:
    """What SVDQuant is made of, on one format."""
    gptq = {"rounding": "gptq"}
    return [Row(format, PLAIN), Row(format, 'rounding="gptq"', options=gptq),
            Row(format, "Smooth()", (Smooth(format=format),)), *branches(format)]  # fmt: skip


def branches(format: str) -> list[Row]:
    """With low-rank branches, in 4 bits; behind the winners, which they are no part of."""
    if parse(format).weight.grid.bits > 4:
        return []
    branch, gptq = LowRank(format=format), {"rounding": "gptq"}
    aware = Smooth(format=format, rank=branch.rank)
    return [
        Row(format, "LowRank(8)", (LowRank(rank=8, format=format),)),
        Row(format, "LowRank, one round", (LowRank(format=format, rounds=1, inputs=False),)),
        Row(format, "LowRank()", (branch,)),
        Row(format, "LowRank(), gptq", (branch,), gptq),
        Row(format, "Smooth(), LowRank(), gptq", (Smooth(format=format), branch), gptq),
        Row(format, "Smooth(rank=32), LowRank(), gptq", (aware, branch), gptq),
    ]


def ranges_of(format: str) -> str | None:
    """When the ranges of a linear layer's activations are found."""
    activation = parse(format).activation
    return None if activation is None else activation.ranges


def step_text(format: str) -> str:
    """The format with one range a group of steps for convolutions."""
    known = parse(format)
    conv = known.conv_activation
    return str(replace(known, conv_activation=conv and replace(conv, ranges="step")))


def winners(format: str, plain: Mapping[Row, float]) -> Row:
    """All methods that gain, together; of those that exclude each other the best.

    `plain` has each row's gain in the median step's SQNR over the format's plain row, dB.
    """
    gained = {row: gain for row, gain in plain.items() if gain >= LEAST_GAIN}
    best = sorted(gained, key=lambda row: -gained[row])
    chosen = [row for row in best if not beaten(row, best)]
    before = sorted(
        (each for row in chosen for each in row.before), key=lambda each: ORDER.index(type(each))
    )
    options = {name: value for row in chosen for name, value in row.options.items()}
    remark = ", ".join(row.method for row in chosen) or "no method gains"
    return Row(format, WINNERS, tuple(before), options, remark)


def beaten(row: Row, best: Sequence[Row]) -> bool:
    """Whether a row before this one is of the same group."""
    group = next((each for each in GROUPS if row.method in each), ())
    return any(other.method in group for other in best[: best.index(row)])
