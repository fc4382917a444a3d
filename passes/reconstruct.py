"""Reconstruction: learn the rounding of all weights of a unit together, against its outputs.

    minimise  L(V) / L(start)  +  λ · mean of (1 - |2h - 1|^β)        L = mean of Σ_dim 1 (y - ŷ)²

over V of AdaRound (METHODS 0.3). λ's term is off during the first fifth, then β falls from 20 to 2,
which pushes each value to one of its neighbours. A unit is a residual block, an attention block or
a single layer; its inputs come from the network quantized so far, its targets from the float
network. With float inputs too, each input value is one or the other at random (QDrop, as in EDA-DM,
METHODS 1.4). Source: Li et al., BRECQ, 2021; q-diffusion `qdiff/block_recon.py`.

Published is L + 0.01 · Σ (1 - |2h - 1|^β), rate 1e-3, 20 000 iterations. That depends on the unit's
scale and size: on small linear and convolution units at 4 bits, 2 000 iterations at rate 1e-2 left
0.16-0.24 of round to nearest's loss, but 0.54-0.92 once outputs were 100 times as large. Relative
to both, one λ serves all: 0.15-0.16 of the loss, whatever the scale. GPTQ, which is not bound to
a value's two neighbours, came as low there; going on from its rounding (`gptq.compensated`) lowered
its loss by up to a quarter, or kept it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from effuse.errors import CalibrationError
from effuse.passes.adaround import Rounding

Example = Mapping[str, Any]  # one call of the unit: its inputs by name, tensors but for sizes
Outputs = Tensor | tuple[Tensor, ...]
Unit = Callable[[Example, Mapping[str, Tensor]], Outputs]  # inputs, weights by name -> outputs


@dataclass(frozen=True)
class Recipe:
    """How rounding is learned.

    Args:
        iterations: steps of Adam.
        batch: examples (calls of the unit) in a step.
        rate: learning rate of V.
        pull: λ, the weight of the regulariser; too much costs less than too little.
        warmup: share of the iterations without it.
        beta: its exponent, from and to.
        mix: share of quantized values among the inputs, where float inputs are given.
        seed: of the draws.
    """

    iterations: int = 2000
    batch: int = 1
    rate: float = 0.03
    pull: float = 1000.0
    warmup: float = 0.2
    beta: tuple[float, float] = (20.0, 2.0)
    mix: float = 0.5
    seed: int = 0

    def beta_at(self, iteration: int) -> float | None:
        """The regulariser's exponent, or None while it is off."""
        start = self.warmup * self.iterations
        if iteration < start:
            return None
        share = (iteration - start) / max(1.0, self.iterations - start)
        return self.beta[0] + (self.beta[1] - self.beta[0]) * share


@dataclass(frozen=True)
class Reconstruction:
    """Weights on their grids by name, and the unit's mean loss with them.

    `before` is the loss of the roundings as they came (to nearest, or GPTQ's), `learned` of what
    training gave; `weights` are those of the lesser, so `after` = min(before, learned).
    """

    weights: dict[str, Tensor]
    before: float
    learned: float

    @property
    def after(self) -> float:
        """The loss of `weights`."""
        return min(self.before, self.learned)


def reconstruct(
    unit: Unit,
    inputs: Sequence[Example],
    targets: Sequence[Outputs],
    roundings: Mapping[str, Rounding],
    recipe: Recipe | None = None,
    float_inputs: Sequence[Example] | None = None,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> Reconstruction:
    """Learn `roundings` such that the unit's outputs come near their targets.

    Args:
        unit: differentiable in its weights; the names are those of `roundings`.
        inputs: examples as the unit will see them, its predecessors quantized.
        targets: the float network's outputs, one for each example.
        roundings: of every weight that is learned; trained in place, from where they are.
        recipe: how; None: `Recipe()`.
        float_inputs: the float network's inputs, to be mixed in.
        progress: called with what, done, total.

    Raises:
        CalibrationError: no examples, or not one target for each, or a loss that is not finite.
    """
    recipe = recipe or Recipe()
    _check(inputs, targets, float_inputs)
    plain = hard_weights(roundings)
    before = mean_loss(unit, inputs, targets, plain)
    if not math.isfinite(before):
        raise CalibrationError(
            f"inputs, targets: expected finite values, came a loss of {before}; calibrate in "
            "float32, or exclude the unit"
        )
    if before == 0:
        return Reconstruction(plain, before, before)
    _learn(unit, inputs, targets, roundings, recipe, before, float_inputs, progress)
    rounded = hard_weights(roundings)
    learned = mean_loss(unit, inputs, targets, rounded)
    return Reconstruction(rounded if learned < before else plain, before, learned)


def _check(
    inputs: Sequence[Example], targets: Sequence[Outputs], float_inputs: Sequence[Example] | None
) -> None:
    if not inputs:
        raise CalibrationError("inputs: expected examples of the unit, came none")
    for name, given in (("targets", targets), ("float_inputs", float_inputs)):
        if given is not None and len(given) != len(inputs):
            raise CalibrationError(
                f"{name}: expected one for each of {len(inputs)} examples, came {len(given)}"
            )


def _learn(
    unit: Unit,
    inputs: Sequence[Example],
    targets: Sequence[Outputs],
    roundings: Mapping[str, Rounding],
    recipe: Recipe,
    start: float,
    float_inputs: Sequence[Example] | None,
    progress: Callable[[str, int, int], None],
) -> None:
    random = torch.Generator().manual_seed(recipe.seed)
    adam = torch.optim.Adam([each.v for each in roundings.values()], recipe.rate)
    count = sum(each.v.numel() for each in roundings.values())
    for iteration in range(recipe.iterations):
        chosen = torch.randint(len(inputs), (recipe.batch,), generator=random).tolist()
        adam.zero_grad()
        for index in chosen:
            example = inputs[index]
            if float_inputs is not None:
                example = mixed(example, float_inputs[index], recipe.mix, random)
            weights = {name: each.soft() for name, each in roundings.items()}
            error = loss(unit(example, weights), targets[index])
            torch.autograd.backward(error / (start * recipe.batch))
        beta = recipe.beta_at(iteration)
        if beta is not None:
            total = torch.stack([each.regulariser(beta) for each in roundings.values()]).sum()
            torch.autograd.backward(total * (recipe.pull / count))
        adam.step()
        progress("reconstruct", iteration + 1, recipe.iterations)


def loss(outputs: Outputs, targets: Outputs) -> Tensor:
    """The squared error, summed over dimension 1, averaged over the others; summed over outputs."""
    pairs = zip(_several(outputs), _several(targets), strict=True)
    return torch.stack([_squared(mine, wanted) for mine, wanted in pairs]).sum()


def _squared(output: Tensor, target: Tensor) -> Tensor:
    square = (output.float() - target.float()).square()
    return square.mean() * (square.shape[1] if square.dim() > 1 else 1)


def _several(outputs: Outputs) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else outputs


@torch.no_grad()
def mean_loss(
    unit: Unit, inputs: Sequence[Example], targets: Sequence[Outputs], weights: Mapping[str, Tensor]
) -> float:
    """The mean of `loss` over all examples."""
    total = 0.0
    for example, target in zip(inputs, targets, strict=True):
        total += loss(unit(example, weights), target).item()
    return total / len(inputs)


def hard_weights(roundings: Mapping[str, Rounding]) -> dict[str, Tensor]:
    """The weights on their grids."""
    return {name: each.hard() for name, each in roundings.items()}


def mixed(
    quantized: Example, exact: Example, share: float, random: torch.Generator
) -> dict[str, Any]:
    """Each floating-point value from `quantized` with probability `share`, else from `exact`."""

    def mix(name: str, value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        drawn = torch.rand(value.shape, generator=random).to(value.device)
        return torch.where(drawn < share, value, exact[name])

    return {name: mix(name, value) for name, value in quantized.items()}
