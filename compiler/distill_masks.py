"""Which heads and hidden units a whole picture needs: gates learned over the trajectory (EcoDiff).

A gate multiplies groups of a value by s, hard-concrete of a learned λ and u ~ U(0, 1):

    s = clip(σ((ln(u + e) - ln(1 - u + e) + λ) / 0.83) · 1.2 - 0.1, 0, 1)      e = 0.5, λ = 3

and λ minimises ‖x - x*‖² + β · mean |λ|, means over elements, x and x* the last latents with and
without gates. u is drawn once for a trajectory, as what is removed is removed at every step.

The trajectory is not kept for the gradient: only its latents are. Backward, each step is run again,
and its vector-Jacobian product hands the gradient on to the latent before (METHODS 3.3). Memory is
that of one step, however many there are; the cost is one more forward pass. Source: Zhang et al.,
Effortless Efficiency, 2024; YaNgZhAnG-V5/EcoDiff.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from effuse.distill_data import Step, at_time, matching
from effuse.distill_network import Network
from effuse.errors import CalibrationError, ConfigError
from effuse.graph import value_of
from effuse.plan import Role

SHIFT, START, TEMPERATURE, STRETCH = 0.5, 3.0, 0.83, 0.1  # e, λ at first, and how far s overshoots

Progress = Callable[[int, int, float], None]  # done, total, loss


@dataclass(frozen=True)
class Gate:
    """Groups of a value along an axis that stay or go together: heads, hidden units.

    Args:
        node: of the default variant.
        axis: of its value.
        groups: how many.
        atoms: the group of each position, -1 where none gates it; empty: runs of equal length.
    """

    node: str
    axis: int
    groups: int
    atoms: tuple[int, ...] = ()


@dataclass(frozen=True)
class MaskRecipe:
    """How gates are learned; SDXL's figures in the paper: β 0.5, rate 0.1.

    Args:
        steps: updates of Adam.
        batch: trajectories in an update.
        rate: Adam's.
        beta: β, what a gate that is open costs.
        seed: of u.
    """

    steps: int = 100
    batch: int = 1
    rate: float = 0.1
    beta: float = 0.5
    seed: int = 0


def hard_concrete(logits: Tensor, u: Tensor) -> Tensor:
    """s of λ (`logits`) and u, both (groups,); 0 and 1 are taken for good."""
    noise = torch.log(u + SHIFT) - torch.log(1 - u + SHIFT)
    soft = torch.sigmoid((noise + logits) / TEMPERATURE)
    return (soft * (1 + 2 * STRETCH) - STRETCH).clamp(0, 1)


def settled(logits: Tensor) -> Tensor:
    """s without noise, at u = 1/2."""
    return hard_concrete(logits, torch.full_like(logits, 0.5))


# ---- the trajectory ------------------------------------------------------------------------------


class Trajectory:
    """A sampler's run through a network, with gates in it.

    Args:
        network: its default variant holds the gates' nodes.
        gates: what is multiplied; each node once along each axis.
        times: the schedule's timesteps.
        step: how a prediction moves the latent; differentiable, without state.

    Raises:
        ConfigError: a gate names no node, or its groups do not divide the axis.
    """

    def __init__(
        self, network: Network, gates: Sequence[Gate], times: Sequence[float], step: Step
    ) -> None:
        self.network, self.gates, self.times, self.step = network, tuple(gates), times, step
        self._latent = next(i.name for i in network.program.inputs if i.role is Role.LATENT)
        self._at: defaultdict[str, list[int]] = defaultdict(list)
        nodes = {node.name: node for node in network.full.graph.nodes}
        for index, gate in enumerate(self.gates):
            check_gate(gate, nodes.get(gate.node))
            self._at[gate.node].append(index)

    def move(
        self, values: Mapping[str, Tensor], latent: Tensor, scales: Sequence[Tensor], index: int
    ) -> Tensor:
        """The latent after step `index`."""
        given = {**values, self._latent: latent}
        given |= at_time(self.network.program, given, self.times[index])

        def gated(node: fx.Node, value: Any) -> Any:
            for place in self._at.get(node.name, ()):
                value = value * spread(scales[place], value, self.gates[place])
            return value

        prediction, *_ = self.network.run(given, None, gated)
        return self.step(latent, matching(prediction, latent), index)

    @torch.no_grad()
    def latents(
        self, values: Mapping[str, Tensor], scales: Sequence[Tensor] | None = None
    ) -> list[Tensor]:
        """The latents from noise on, one more than there are steps; None: all gates open."""
        open_gates = [torch.ones(gate.groups, device=self.network.device) for gate in self.gates]
        found = [values[self._latent].to(self.network.device)]
        for index in range(len(self.times)):
            found.append(self.move(values, found[-1], scales or open_gates, index))
        return found

    def gradients(
        self, values: Mapping[str, Tensor], scales: Sequence[Tensor], target: Tensor
    ) -> tuple[float, list[Tensor]]:
        """Mean squared error of the last latent, and its gradient in each of `scales`."""
        leaves = [each.detach().requires_grad_() for each in scales]
        kept = self.latents(values, leaves)
        difference = kept[-1] - target
        upstream = 2 * difference / difference.numel()
        sums = [torch.zeros_like(each) for each in leaves]
        for index in reversed(range(len(self.times))):
            before = kept[index].detach().requires_grad_()
            with torch.enable_grad():
                after = self.move(values, before, leaves, index)
            upstream, *found = torch.autograd.grad(
                after, [before, *leaves], upstream, allow_unused=True, materialize_grads=True
            )
            sums = [one + other for one, other in zip(sums, found, strict=True)]
        return float(difference.square().mean()), sums


def spread(scale: Tensor, value: Tensor, gate: Gate) -> Tensor:
    """One factor for each element along the axis, in a shape that broadcasts over the value."""
    size = value.shape[gate.axis]
    shape = [1] * value.dim()
    shape[gate.axis] = size
    scale = scale.to(value.dtype)
    if gate.atoms:
        factors = torch.cat([scale, scale.new_ones(1)])[list(gate.atoms)]  # -1 is the last
    else:
        factors = scale.repeat_interleave(size // len(scale))
    return factors.reshape(shape)


def check_gate(gate: Gate, node: fx.Node | None) -> None:
    """Refuse a gate that the graph has no place for.

    Raises:
        ConfigError: it names no node, no axis of it, or groups that do not divide the axis.
    """
    if node is None:
        raise ConfigError(f"gates: the graph has no node {gate.node!r}; name one of its calls")
    shape = tuple(value_of(node).shape)
    if not -len(shape) <= gate.axis < len(shape):
        raise ConfigError(f"gates: {gate.node} has no axis {gate.axis}; its shape is {shape}")
    if gate.atoms:
        if len(gate.atoms) != shape[gate.axis] or not set(gate.atoms) <= {*range(-1, gate.groups)}:
            raise ConfigError(
                f"gates: {gate.node}: atoms name one of {gate.groups} groups, or -1, for each of "
                f"{shape[gate.axis]} positions; came {len(gate.atoms)} from {min(gate.atoms)} to "
                f"{max(gate.atoms)}"
            )
        return
    if gate.groups < 1 or shape[gate.axis] % gate.groups:
        raise ConfigError(
            f"gates: {gate.node}: {gate.groups} groups do not divide axis {gate.axis} of size "
            f"{shape[gate.axis]}; take a divisor"
        )


# ---- learning ------------------------------------------------------------------------------------


def learn_masks(
    network: Network,
    gates: Sequence[Gate],
    samples: Sequence[Mapping[str, Tensor]],
    times: Sequence[float],
    step: Step,
    recipe: MaskRecipe | None = None,
    progress: Progress = lambda done, total, loss: None,
) -> dict[Gate, Tensor]:
    """λ (groups,) of each gate: the higher, the more the picture needs the group.

    Args:
        network: the whole network; its weights stay as they are.
        gates: attention heads before the output projection, hidden units behind the activation.
        samples: inputs of the first step by name: noise as the latent, and prompts.
        times: the schedule's timesteps.
        step: how a prediction moves the latent (`distill_data.sampler`).
        recipe: how; None: `MaskRecipe()`.
        progress: called with done, total, loss.

    Raises:
        ConfigError: a gate does not fit the graph.
        CalibrationError: there are no samples, or the latent became NaN or infinite.
    """
    recipe = recipe or MaskRecipe()
    if not samples or not gates:
        raise CalibrationError("gates, samples: expected at least one of each to learn masks from")
    run = Trajectory(network, gates, times, step)
    targets = [run.latents(values)[-1] for values in samples]
    logits = [torch.full((gate.groups,), START, device=network.device) for gate in gates]
    random = torch.Generator().manual_seed(recipe.seed)
    with torch.enable_grad():
        adam = torch.optim.Adam([each.requires_grad_() for each in logits], recipe.rate)
        for done in range(recipe.steps):
            adam.zero_grad()
            numbers = range(done * recipe.batch, (done + 1) * recipe.batch)
            chosen = [number % len(samples) for number in numbers]
            pairs = [(samples[index], targets[index]) for index in chosen]
            loss = accumulate(run, logits, pairs, recipe, random)
            adam.step()
            progress(done + 1, recipe.steps, loss)
    return {gate: each.detach().cpu() for gate, each in zip(gates, logits, strict=True)}


def accumulate(
    run: Trajectory,
    logits: Sequence[Tensor],
    pairs: Sequence[tuple[Mapping[str, Tensor], Tensor]],
    recipe: MaskRecipe,
    random: torch.Generator,
) -> float:
    """Leave the gradients of one batch in the logits; its loss.

    Raises:
        CalibrationError: it is not finite.
    """
    pull = torch.stack([each.abs().mean() for each in logits]).mean()
    torch.autograd.backward(recipe.beta * pull)
    total = recipe.beta * float(pull.detach())
    for values, target in pairs:
        drawn = [torch.rand(each.shape, generator=random).to(each.device) for each in logits]
        scales = [hard_concrete(each, u) for each, u in zip(logits, drawn, strict=True)]
        loss, gradients = run.gradients(values, scales, target)
        total += loss / len(pairs)
        torch.autograd.backward(scales, [each / len(pairs) for each in gradients])
    if not math.isfinite(total):
        raise CalibrationError(
            f"samples: expected a finite last latent, came a loss of {total}; check the noise, the "
            "prompts and the sampler"
        )
    return total
