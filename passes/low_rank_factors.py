"""A weight as a low-rank branch and a remainder that a few bits hold well (SVDQuant).

    W  ≈  U D + Q(W - U D),        U (out, r), D (r, in)

    L_0 = SVD_r(W),   L_k = SVD_r(W - Q(W - L_{k-1}))   while the error falls (METHODS 1.12)

The error is that of the layer's output, ‖(W - L - Q(W - L)) C‖ with C Cᵀ = E[x xᵀ] of its inputs
where they are known, else of the weight (C = 1). SVD_r of a matrix M under C is that of
M C, times C⁻¹. It takes away most of the output's error, the plain one most of the range, which the
step of the remainder depends on: neither always wins. Where inputs are known, the rounds run under
the plain one, under C, and under C after a plain first round; the least error counts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

OVERSAMPLE, POWER_ITERATIONS = 10, 4
DAMP = 0.01  # of the mean square of the inputs, that C may be inverted


@dataclass(frozen=True)
class Factors:
    """U (out, r) and D (r, in) in float32, and the relative output error (0 to 1) by round."""

    up: Tensor
    down: Tensor
    errors: tuple[float, ...]

    @property
    def product(self) -> Tensor:
        """U D, (out, in)."""
        return self.up @ self.down


def decompose(
    weight: Tensor,
    rank: int,
    rounded: Callable[[Tensor], Tensor],
    *,
    metric: Tensor | None = None,
    rounds: int = 8,
    exact: bool = False,
    seed: int = 0,
) -> Factors:
    """The branch of `weight` (out, in) beside what `rounded` makes of the remainder.

    Args:
        rank: at most this many; min(out, in) gives the weight itself.
        rounded: a remainder (out, in) as the low-bit layer will hold it.
        metric: C (in, in), lower triangular; `metric_of` gives it.
        rounds: at most this many decompositions, 1 or more; it stops at the first that errs more.
        exact: LAPACK's decomposition in float64, else a randomised one, by `seed`.
    """
    whole = weight.float()
    rank = min(rank, *whole.shape)
    split = partial(low_rank, rank=rank, exact=exact, seed=seed)
    ways = [(None, None)] if metric is None else [(None, None), (metric, metric), (None, metric)]
    found = [alternate(whole, way, split, rounded, metric, rounds) for way in ways]
    return min(found, key=lambda each: min(each.errors))


def alternate(
    whole: Tensor, way: tuple[Tensor | None, Tensor | None],
    split: Callable[..., tuple[Tensor, Tensor]], rounded: Callable[[Tensor], Tensor],
    metric: Tensor | None, rounds: int,
) -> Factors:  # fmt: skip
    """Decomposition and rounding by turns, under `way[0]` first and then under `way[1]`."""
    scale = _norm(whole, metric) or 1.0
    target, errors = whole, []
    best: Factors | None = None
    for number in range(rounds):
        up, down = split(target, metric=way[min(number, 1)])
        rest = whole - up @ down
        held = rounded(rest)
        errors.append(_norm(rest - held, metric) / scale)
        if best is not None and errors[-1] >= errors[-2]:
            break
        best, target = Factors(up, down, ()), whole - held
    assert best is not None
    return Factors(best.up, best.down, tuple(errors))


def low_rank(
    matrix: Tensor, rank: int, metric: Tensor | None = None, *, exact: bool = False, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """U (out, r) and D (r, in) nearest to `matrix`; each takes the root of the singular values."""
    weighed = matrix if metric is None else matrix @ metric
    if exact or rank + OVERSAMPLE >= min(matrix.shape):
        left, values, right = torch.linalg.svd(weighed.double(), full_matrices=False)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            left, values, rows = torch.svd_lowrank(
                weighed, q=rank + OVERSAMPLE, niter=POWER_ITERATIONS
            )
        right = rows.mT
    root = values[:rank].sqrt()
    up, down = left[:, :rank] * root, root[:, None] * right[:rank]
    if metric is not None:
        down = torch.linalg.solve_triangular(metric.to(down.dtype), down, upper=False, left=False)
    return up.float(), down.float()


def metric_of(second_moment: Tensor) -> Tensor:
    """C with C Cᵀ = E[x xᵀ] + damping, lower triangular, from E[x xᵀ] (in, in); float32.

    Damping doubles until the factorisation succeeds.
    """
    moment = second_moment.double()
    level = moment.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny)
    damp = DAMP
    while True:
        raised = moment + damp * level * torch.eye(len(moment))
        lower, failed = torch.linalg.cholesky_ex(raised)
        if not failed:
            found: Tensor = lower.float()
            return found
        damp *= 2


def _norm(matrix: Tensor, metric: Tensor | None) -> float:
    return float((matrix if metric is None else matrix @ metric).norm())
