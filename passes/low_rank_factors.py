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

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

OVERSAMPLE, POWER_ITERATIONS = 10, 4
BLOCK = 1 << 18  # numbers of rows that are rounded at once
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
    by_rows: bool = False,
) -> Factors:
    """The branch of `weight` (out, in) beside what `rounded` makes of the remainder.

    Args:
        rank: at most this many; min(out, in) gives the weight itself.
        rounded: a remainder (out, in) as the low-bit layer will hold it.
        metric: C (in, in), lower triangular; `metric_of` gives it.
        rounds: at most this many decompositions, 1 or more; it stops at the first that errs more.
        exact: LAPACK's decomposition in float64, else a randomised one, by `seed`.
        by_rows: whether `rounded` may be handed some of the rows, which then stay in the cache.
    """
    whole = weight.float()
    rank = min(rank, *whole.shape)
    split = partial(low_rank, rank=rank, exact=exact, seed=seed)
    block = max(1, BLOCK // whole.shape[1]) if by_rows else len(whole)
    turn = partial(_turn, whole, rounded=rounded, metric=metric, block=block)
    ways = [(None, None)] if metric is None else [(None, None), (metric, metric), (None, metric)]
    scale = math.sqrt(_power(whole, metric)) or 1.0
    found = [alternate(whole, way, split, turn, rounds, scale) for way in ways]
    return min(found, key=lambda each: min(each.errors))


def alternate(
    whole: Tensor, way: tuple[Tensor | None, Tensor | None],
    split: Callable[..., tuple[Tensor, Tensor, Tensor | None]],
    turn: Callable[[Tensor, Tensor], tuple[Tensor, float]], rounds: int, scale: float,
) -> Factors:  # fmt: skip
    """Decomposition and rounding by turns, under `way[0]` first and then under `way[1]`.

    `scale` is what errors are relative to.
    """
    target, errors = whole, []
    best: Factors | None = None
    basis: Tensor | None = None
    for number in range(rounds):
        under = way[min(number, 1)]
        if number == 1 and way[0] is not way[1]:
            basis = None
        up, down, basis = split(target, metric=under, basis=basis)
        target, error = turn(up, down)
        errors.append(error / scale)
        if best is not None and errors[-1] >= errors[-2]:
            break
        best = Factors(up, down, ())
    assert best is not None
    return Factors(best.up, best.down, tuple(errors))


def _turn(
    whole: Tensor, up: Tensor, down: Tensor, rounded: Callable[[Tensor], Tensor],
    metric: Tensor | None, block: int,
) -> tuple[Tensor, float]:  # fmt: skip
    """What the rounded remainder leaves to the branch, W - Q(W - U D), and the output's error."""
    left, noise = torch.empty_like(whole), 0.0
    for first in range(0, len(whole), block):
        rows = slice(first, first + block)
        rest = whole[rows] - up[rows] @ down
        held = rounded(rest)
        noise += _power(rest - held, metric)
        left[rows] = whole[rows] - held
    return left, math.sqrt(noise)


def low_rank(
    matrix: Tensor, rank: int, metric: Tensor | None = None, *, exact: bool = False, seed: int = 0,
    basis: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """U (out, r) and D (r, in) nearest to `matrix`; each takes the root of the singular values.

    The third is a basis (in, r + oversample) of the leading rows. Handed back with a matrix that
    has changed little, it saves most of the work: one step of subspace iteration from there.
    """
    if exact or rank + OVERSAMPLE >= min(matrix.shape):
        weighed = matrix if metric is None else matrix @ metric
        left, values, right = torch.linalg.svd(weighed.double(), full_matrices=False)
    elif basis is not None:
        left, values, right = _refined(matrix, metric, basis)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            weighed = matrix if metric is None else matrix @ metric
            left, values, rows = torch.svd_lowrank(
                weighed, q=rank + OVERSAMPLE, niter=POWER_ITERATIONS
            )
        right = rows.mT
    root = values[:rank].sqrt()
    up, down = left[:, :rank] * root, root[:, None] * right[:rank]
    if metric is not None:
        down = torch.linalg.solve_triangular(metric.to(down.dtype), down, upper=False, left=False)
    return up.float(), down.float(), None if exact else right.mT.float()


def _refined(matrix: Tensor, metric: Tensor | None, basis: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The leading singular vectors and values of M C, from a basis (in, q) that is nearly theirs.

    M C is never formed: only thin matrices are multiplied.
    """
    ahead = matrix @ (basis if metric is None else metric @ basis)
    left = torch.linalg.qr(ahead).Q
    rows = left.mT @ matrix
    inner, values, right = torch.linalg.svd(rows if metric is None else rows @ metric, False)
    return left @ inner, values, right


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


def _power(matrix: Tensor, metric: Tensor | None) -> float:
    return float((matrix if metric is None else matrix @ metric).square().sum(dtype=torch.float64))
