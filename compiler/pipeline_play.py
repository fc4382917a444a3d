"""A pipeline's run from its recipe: what stands between the components is data. Needs numpy only.

A recipe, part of pipeline.json, says where each input of each component comes from. A *source* is a
base array and blocks laid over it, each a row of a value: of what a tokenizer read, or of what an
encoder gave, times a mask or not. Latents are the seed's noise, stepped by a sampler; in each step
it is one network's turn. Guidance is a weighted sum of blocks of the network's output; before and
after the decoder stands an affine map.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from effuse.errors import InputError
from effuse.sampler import Sampler

Array = np.ndarray[Any, Any]
Values = dict[str, Array]
Run = Callable[[str, Values], Sequence[Array]]  # a component's artifact, on its tensors by label


def play(
    recipe: Mapping[str, Any], constants: Mapping[str, Array], tokens: Values,
    noise: Sequence[Array], run: Run, guidance: float | None = None,
    on_step: Callable[[int, int], None] = lambda done, total: None,
) -> Array:  # fmt: skip
    """The picture, (…, height, width, channels) in [0, 1].

    Args:
        constants: arrays that the recipe names.
        tokens: what tokenizers gave, as `reading.0.input_ids`.
        noise: standard normal: the first latents', then that of each step that adds some.
        run: runs a component.
        guidance: in place of the scale that was watched.
    """
    values = dict(tokens)
    for number, each in enumerate(recipe["encoders"]):
        found = run(each["folder"], inputs_of(each, constants, values))
        values |= {f"encoder.{number}.{k}": value for k, value in enumerate(found)}
    latents = denoised(recipe, constants, values, noise, run, guidance, on_step)
    decoder = recipe["decoder"]
    if decoder is not None:
        given = mapped(decoder, constants, latents).reshape(decoder["shape"])
        rest = inputs_of(decoder, constants, values)
        latents = run(decoder["folder"], {decoder["label"]: given, **rest})[0]
    picture = np.moveaxis(latents, 1, -1) * recipe["picture"]["scale"] + recipe["picture"]["shift"]
    return np.asarray(np.clip(picture, 0, 1))


def denoised(
    recipe: Mapping[str, Any], constants: Mapping[str, Array], values: Values,
    noise: Sequence[Array], run: Run, guidance: float | None, on_step: Callable[[int, int], None],
) -> Array:  # fmt: skip
    """The latents after the last step.

    Raises:
        InputError: another scale is asked for, and the pipeline was compiled without guidance.
    """
    networks, fresh = recipe["networks"], iter(noise)
    if guidance is not None and any("free" not in each["guidance"] for each in networks):
        raise InputError("guidance: the pipeline was watched without guidance in this form")
    sampler = Sampler.from_json(recipe["sampler"])
    prompts = [[inputs_of(call, constants, values) for call in each["calls"]] for each in networks]
    x = ordered(next(fresh), recipe["latents"], constants) * np.float32(sampler.initial_scale)
    for index, (turn, times) in enumerate(zip(recipe["turns"], recipe["times"], strict=True)):
        shown = sampler.scale(index, x).astype(x.dtype)
        network, outputs = networks[turn], []
        for call, prompt in zip(network["calls"], prompts[turn], strict=True):
            label = call["timestep"]
            when = {} if label is None else {label["label"]: timed(label, times)}
            latent = {call["latent"]: np.concatenate([shown] * call["copies"])}
            outputs.append(run(network["folder"], {**prompt, **when, **latent})[0])
        guided = combined(network["guidance"], blocks_of(outputs, x), guidance)
        added = next(fresh) if sampler.noisy(index) else None
        x = sampler.step(index, x, guided, added).astype(x.dtype)
        on_step(index + 1, len(recipe["times"]))
    return x


def drawn(recipe: Mapping[str, Any], draw: Callable[[Sequence[int]], Array]) -> list[Array]:
    """The noise of a run: what `draw` gives, by shape, in the order in which pipelines draw it."""
    sampler = Sampler.from_json(recipe["sampler"])
    noisy = sum(map(sampler.noisy, range(len(recipe["times"]))))
    return [draw(recipe["latents"]["shape"]) for _ in range(1 + noisy)]


def timed(label: Mapping[str, Any], time: float) -> Array:
    """A timestep as the network is handed it."""
    return np.full(label["shape"], time, label["dtype"])


def inputs_of(
    told: Mapping[str, Any], constants: Mapping[str, Array], values: Values
) -> dict[str, Array]:
    """The inputs that have sources."""
    return {label: assembled(source, constants, values)
            for label, source in told["sources"].items()}  # fmt: skip


def assembled(source: Mapping[str, Any], constants: Mapping[str, Array], values: Values) -> Array:
    """An input put together."""
    found = np.array(constants[source["base"]])
    rows = found.reshape(source["rows"])  # a view: (rows, tokens, features)
    for block in source["blocks"]:
        value = value_of(block["from"], values)[block["row"]]
        piece = value.reshape(-1, value.shape[-1]) if value.ndim > 1 else value.reshape(1, -1)
        row, top, left = block["at"]
        height, width = piece.shape
        rows[row, top : top + height, left : left + width] = piece
    return found


def value_of(name: str, values: Mapping[str, Array]) -> Array:
    """A value by its name; `a*b` is a with the tokens left out that the mask b leaves out."""
    first, _, mask = name.partition("*")
    return values[first] * values[mask][..., None] if mask else values[first]


def blocks_of(outputs: Sequence[Array], like: Array) -> list[Array]:
    """The network's outputs cut to as many rows and channels as the latents have."""
    rows, channels = like.shape[:2]
    return [piece[:, :channels] if like.ndim != 3 else piece
            for each in outputs for piece in np.split(each, max(len(each) // rows, 1))]  # fmt: skip


def combined(told: Mapping[str, Any], blocks: Sequence[Array], scale: float | None) -> Array:
    """Guidance: free + scale (told - free), or the blocks' sum by weights."""
    if "free" in told:
        free, given = blocks[told["free"]], blocks[told["told"]]
        factor = told["scale"] if scale is None else scale
        return np.asarray(free + np.float32(factor) * (given - free))
    found = np.zeros_like(blocks[0])
    for weight, block in zip(told["weights"], blocks, strict=True):
        found += np.float32(weight) * block
    return found


def ordered(flat: Array, told: Mapping[str, Any], constants: Mapping[str, Array]) -> Array:
    """Numbers in the order and the shape that the recipe says."""
    found = flat.reshape(-1)
    order = told.get("order")
    return (found if order is None else found[constants[order]]).reshape(told["shape"])


def mapped(told: Mapping[str, Any], constants: Mapping[str, Array], latents: Array) -> Array:
    """The latents as the decoder takes them: in another order, scaled and shifted by channel."""
    found = ordered(latents, told, constants)
    shape = [1, -1] + [1] * (found.ndim - 2)
    scale, shift = (np.reshape(told[name], shape) for name in ("scale", "shift"))
    return np.asarray((found * scale + shift).astype(latents.dtype))
