"""How a pipeline may be run without torch: found in two watched runs, and checked against them.

The runs differ in prompt, and in nothing else. What is equal in both is a constant; all else has to
be explained by what tokenizers read and encoders gave. Then the recipe is played with the networks'
recorded results in their place: every input and the picture have to come out as they were.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from effuse.errors import InputError, require
from effuse.metrics import sqnr_db
from effuse.noise import draws, normal
from effuse.pipeline_calls import labelled, outline
from effuse.pipeline_play import blocks_of, combined, drawn, play, value_of
from effuse.pipeline_sources import Pair, arrays, explain_all, names_in
from effuse.pipeline_tokens import CLEANERS
from effuse.pipeline_watch import Call, observed_roles
from effuse.sampler_probe import probe

Array = np.ndarray[Any, Any]
CLOSE_DB = 60.0  # of every network's inputs, and of the picture
CLOSE = 1e-4  # relative: of what is fitted


def find(pair: Pair) -> dict[str, Any]:
    """The recipe.

    Raises:
        InputError: something that the pipeline does is not of this kind; what.
    """
    check_pair(pair)
    readings = read_texts(pair)
    encoders, networks, decoder = split_calls(pair)
    told_encoders = [encoded(pair, *calls, number) for number, calls in enumerate(encoders)]
    pair.let_in(len(pair.first.calls))
    sampler = probe(pair.first.scheduler)
    turns = turns_of(pair, networks)
    told_networks = [denoising(pair, calls) for calls in networks]
    picture_from = pair.first.steps[-1].result
    told_decoder = None
    if decoder:
        told_decoder = decoding(pair, *decoder)
        picture_from = outline(decoder[0].result)[1][0]
    told_calls = [call for each in told_networks for call in each["calls"]]
    used = names_in([*told_encoders, *told_calls, told_decoder or {}])
    recipe: dict[str, Any] = {
        "readings": [each for each in readings if each["number"] in used],
        "encoders": told_encoders,
        "networks": told_networks,
        **turns,
        "sampler": sampler.to_json(),
        "latents": noise_of(pair, sampler.initial_scale),
        "decoder": told_decoder,
        "picture": shown(picture_from.numpy(), picture_of(pair.first.result)),
        "seed": pair.seed,
    }
    recipe["agreement_db"] = check(pair, recipe)
    return recipe


def check_pair(pair: Pair) -> None:
    """Refuse runs that cannot be compared, or that need what is not compiled."""
    keys = [call.key for call in pair.first.calls]
    for key in keys:
        if key not in pair.folders:
            raise InputError(f"{'.'.join(filter(None, key))} is not compiled")
    if keys != [call.key for call in pair.second.calls]:
        raise InputError("with another prompt its components are called in another order")
    if not pair.first.steps:
        raise InputError("no scheduler of diffusers makes its steps")


def split_calls(pair: Pair) -> tuple[list[tuple[Call, Call]], list[list[Call]], tuple[Call, ...]]:
    """Encoders' calls in both runs, the denoisers' in the first, the decoder's in both."""
    log = pair.first
    roles = {key: log.role(key) for key in log.keys}
    both = list(zip(log.calls, pair.second.calls, strict=True))
    encoders = [calls for calls in both if roles[calls[0].key] == "encoder"]
    decoders = [calls for calls in both if roles[calls[0].key] == "decoder"]
    networks = [key for key, role in roles.items() if role == "denoiser"]
    if not networks or len(decoders) > 1:
        raise InputError(f"it has {len(networks)} denoisers and calls {len(decoders)} decoders")
    return encoders, [log.of(key) for key in networks], decoders[0] if decoders else ()


def read_texts(pair: Pair) -> list[dict[str, Any]]:
    """What tokenizers read: which text, how it was cleaned, and how long the tokens are."""
    found = []
    runs = pair.first.readings, pair.second.readings
    if len(runs[0]) != len(runs[1]):
        raise InputError("with another prompt its tokenizers are called in another order")
    for number, (one, other) in enumerate(zip(*runs, strict=True)):
        texts = [each.text[0] if isinstance(each.text, (list, tuple)) and len(each.text) == 1
                 else each.text for each in (one, other)]  # fmt: skip
        told = next(({"text": name, "cleaned": how} for how, clean in CLEANERS.items()
                     for name, given in pair.texts.items()
                     if texts == [clean(each) for each in given]), None)  # fmt: skip
        shapes = [{k: v.shape for k, v in each.tokens.items()} for each in (one, other)]
        if told is None or shapes[0] != shapes[1] or "input_ids" not in one.tokens:
            continue  # a constant, then, or not explained
        for name in one.tokens:
            first, second = arrays((one.tokens[name], other.tokens[name]))
            pair.read.append((one.calls, f"reading.{number}.{name}", first, second))
        special = bool(one.options.get("add_special_tokens", True))
        length = int(one.tokens["input_ids"].shape[-1])
        found.append({"number": number, "tokenizer": one.component, "length": length,
                      "special": special, "pad": one.pad, **told})  # fmt: skip
    return found


def encoded(pair: Pair, one: Call, other: Call, number: int) -> dict[str, Any]:
    """Where an encoder's inputs come from; what it gives may be read from here on."""
    pair.let_in(next(n for n, call in enumerate(pair.first.calls) if call is one))
    sources = explain_all(pair, one, other)
    masks = [each for each in pair.values if each[0].endswith("mask")]
    for k, values in enumerate(zip(outline(one.result)[1], outline(other.result)[1], strict=True)):
        name = f"encoder.{number}.{k}"
        first, second = arrays(values)
        pair.values.append((name, first, second))
        for mask, *of in masks:
            if values[0].dim() == 3 and of[0].shape == tuple(values[0].shape[:2]):
                both = [value_of("a*b", {"a": a, "b": b})
                        for a, b in zip(arrays(values), of, strict=True)]  # fmt: skip
                pair.values.append((f"{name}*{mask}", both[0], both[1]))
    return {"folder": pair.folders[one.key], "sources": sources}


def denoising(pair: Pair, calls: Sequence[Call]) -> dict[str, Any]:
    """What the denoiser is called with in each step, and what is made of its outputs."""
    log = pair.first
    roles = observed_roles(calls)
    steps = sorted({call.step for call in calls})
    often = len(calls) // len(steps)
    if often * len(steps) != len(calls) or not roles:
        raise InputError("its denoiser is not called equally often in all steps")
    others = pair.second.of(calls[0].key)
    latent = [label for label, role in roles.items() if role == "latent"]
    times = [label for label, role in roles.items() if role == "timestep"]
    if len(latent) != 1 or len(times) > 1:
        raise InputError(f"what changes at every step are {', '.join([*latent, *times])}")
    told = []
    for number in range(often):
        given = labelled(calls[number].arguments)[0]
        copies = given[latent[0]].shape[0] // log.steps[steps[0]].sample.shape[0]
        time = time_of(times[0], given[times[0]]) if times else None
        told.append({"sources": explain_all(pair, calls[number], others[number], latent + times),
                     "latent": latent[0], "copies": copies, "timestep": time})  # fmt: skip
    return {
        "folder": pair.folders[calls[0].key],
        "calls": told,
        "guidance": guided(pair, calls[:often]),
    }


def turns_of(pair: Pair, networks: Sequence[Sequence[Call]]) -> dict[str, list[Any]]:
    """Which network's turn each step is, and the time that it is told.

    Raises:
        InputError: several are called in one step, or none.
    """
    found: dict[int, tuple[int, float]] = {}
    for number, calls in enumerate(networks):
        time = next((label for label, role in observed_roles(calls).items() if role == "timestep"),
                    None)  # fmt: skip
        for call in calls:
            value = 0.0 if time is None else float(labelled(call.arguments)[0][time].flatten()[0])
            if found.setdefault(call.step, (number, value))[0] != number:
                raise InputError(f"it calls {len(networks)} denoisers in one step")
    steps = range(len(pair.first.steps))
    if sorted(found) != list(steps):
        raise InputError("its denoiser is not called in every step")
    return {"turns": [found[n][0] for n in steps], "times": [found[n][1] for n in steps]}


def time_of(label: str, value: torch.Tensor) -> dict[str, Any]:
    """How a timestep is handed over."""
    dtype = str(value.dtype).removeprefix("torch.")
    return {"label": label, "shape": list(value.shape), "dtype": dtype}


def guided(pair: Pair, calls: Sequence[Call]) -> dict[str, Any]:
    """What the scheduler is handed, of the network's outputs in these calls of one step.

    Raises:
        InputError: it is no weighted sum of them.
    """
    step = pair.first.steps[calls[0].step]
    outputs = [arrays(outline(call.result)[1])[0] for call in calls]
    blocks, wanted = blocks_of(outputs, step.sample.numpy()), step.output.numpy()
    if any(block.shape != wanted.shape for block in blocks):
        raise InputError("its denoiser's output has another shape than the latents")
    scales = [] if pair.guidance is None else [pair.guidance]
    tries: list[dict[str, Any]] = [
        {"free": free, "told": 1 - free, "scale": scale} for scale in scales for free in (0, 1)
    ] if len(blocks) == 2 else []  # fmt: skip
    flat = np.stack([block.ravel() for block in blocks], axis=1).astype(np.float64)
    weights = np.linalg.lstsq(flat, wanted.ravel().astype(np.float64), rcond=None)[0]
    for told in [*tries, {"weights": [float(each) for each in weights]}]:
        if sqnr_db(wanted, combined(told, blocks, None)) > CLOSE_DB:
            return told
    raise InputError("what it makes of its denoiser's outputs is no weighted sum (guidance)")


def noise_of(pair: Pair, scale: float) -> dict[str, Any]:
    """How the first latents follow from the seed's noise: in which order.

    Raises:
        InputError: they do not.
    """
    start = pair.first.steps[0].sample.numpy()
    noise = normal(pair.seed, (start.size,)) * np.float32(scale)
    shape = list(start.shape)
    if np.allclose(noise, start.ravel(), rtol=CLOSE, atol=CLOSE):
        return {"shape": shape}
    order = np.empty(start.size, np.int64)
    order[np.argsort(start.ravel())] = np.argsort(noise)
    if not np.allclose(noise[order], start.ravel(), rtol=CLOSE, atol=CLOSE):
        raise InputError("its first latents are not the seed's noise in any order")
    return {"shape": shape, "order": pair.keep("order", order)}


def decoding(pair: Pair, one: Call, other: Call) -> dict[str, Any]:
    """How the decoder's input follows from the last latents: order, scale and shift by channel.

    Raises:
        InputError: it does not.
    """
    given = labelled(one.arguments)[0]
    label = next(iter(given))
    wanted = arrays((given[label], labelled(other.arguments)[0][label]))
    latents = [log.steps[-1].result.numpy() for log in (pair.first, pair.second)]
    told: dict[str, Any] = {
        "folder": pair.folders[one.key], "label": label, "shape": list(wanted[0].shape),
        "sources": explain_all(pair, one, other, [label]),
    }  # fmt: skip
    if latents[0].size != wanted[0].size:
        raise InputError("its decoder takes another number of values than the latents have")
    if latents[0].shape != wanted[0].shape:
        order = same_numbers(latents, wanted)
        told["order"] = pair.keep("order", order)
        latents = [each.ravel()[order].reshape(wanted[0].shape) for each in latents]
    fits = [np.polyfit(latents[0][:, c].ravel().astype(np.float64), wanted[0][:, c].ravel(), 1)
            for c in range(wanted[0].shape[1])]  # fmt: skip
    return told | {"scale": [float(a) for a, _ in fits], "shift": [float(b) for _, b in fits]}


def same_numbers(latents: Sequence[Array], wanted: Sequence[Array]) -> Array:
    """In which order the latents are the decoder's input, scaled and shifted.

    Both runs together tell each value: it is a point of two coordinates.
    """
    scale, shift = as_sorted(latents[0], wanted[0])
    x, y = (np.stack([each.ravel() for each in both], axis=1).astype(np.float64)
            for both in ([each * scale + shift for each in latents], wanted))  # fmt: skip
    distance, order = require("scipy.spatial").cKDTree(x).query(y)
    if distance.max() > CLOSE * np.abs(y).max() or len(set(order.tolist())) != len(order):
        raise InputError("its decoder's input is not the latents in any order, scaled and shifted")
    return np.asarray(order, dtype=np.int64)


def as_sorted(latents: Array, wanted: Array) -> Array:
    """Scale and shift by which the latents, sorted, are the decoder's input, sorted: of each
    channel, where tokens (pictures, tokens, channels) have as many as the decoder takes, else of
    all.
    """
    apart = latents.ndim == 3 and latents.shape[-1] == wanted.shape[1]
    pairs = zip(latents.reshape(-1, latents.shape[-1]).T, np.moveaxis(wanted, 1, 0), strict=False)
    fits = [np.polyfit(np.sort(x.ravel().astype(np.float64)), np.sort(y.ravel()), 1)
            for x, y in (pairs if apart else [(latents, wanted)])]  # fmt: skip
    return np.stack(fits, axis=1)


def picture_of(result: Any) -> Array:
    """The pictures in what a pipeline returns, in [0, 1]."""
    found = getattr(result, "images", None)
    found = result[0] if found is None and isinstance(result, (tuple, Mapping)) else found
    array = np.asarray(result if found is None else found)
    if array.dtype == np.uint8:
        return array.astype(np.float32) / 255
    if array.dtype.kind != "f":
        raise InputError("what it returns is no array of pictures")
    return array


def shown(given: Array, picture: Array) -> dict[str, float]:
    """Scale and shift from the last values to the picture, where that is not clipped."""
    last = np.moveaxis(given, 1, -1)
    if last.shape != picture.shape:
        raise InputError(f"its picture has the shape {picture.shape}, of values {last.shape}")
    inside = (picture > 0) & (picture < 1)
    if inside.sum() < 2:
        raise InputError("its picture is clipped everywhere")
    scale, shift = np.polyfit(last[inside].astype(np.float64), picture[inside], 1)
    return {"scale": float(scale), "shift": float(shift)}


def check(pair: Pair, recipe: Mapping[str, Any]) -> float:
    """Play the recipe with the networks' recorded results; the worst agreement in dB.

    Raises:
        InputError: an input or the picture comes out otherwise.
    """
    worst = np.inf
    for number, log in enumerate((pair.first, pair.second)):
        calls = iter(log.calls)
        agreed: list[float] = []

        def answer(folder: str, given: Mapping[str, Array], calls: Any = calls,
                   agreed: list[float] = agreed) -> list[Array]:  # fmt: skip
            call = next(calls)
            for label, tensor in labelled(call.arguments)[0].items():
                found = agreement(arrays([tensor])[0], given[label])
                if found < CLOSE_DB:
                    raise InputError(f"{folder}: {label} comes out otherwise ({found:.0f} dB)")
                agreed.append(found)
            return arrays(outline(call.result)[1])

        tokens = {name: values[number] for name, *values in pair.values if name.count(".") == 2
                  and name.startswith("reading.")}  # fmt: skip
        noise = drawn(recipe, draws(pair.seed))
        picture = play(recipe, pair.constants, tokens, noise, answer)
        agreed.append(agreement(picture_of(log.result), picture))
        worst = min(worst, *agreed)
    if worst < CLOSE_DB:
        raise InputError(f"its picture comes out otherwise ({worst:.0f} dB)")
    return round(float(worst), 1)


def agreement(wanted: Array, found: Array) -> float:
    """SQNR in dB; of zeros, and of equal arrays, as much as there is."""
    if wanted.shape != found.shape:
        return 0.0
    return 200.0 if np.array_equal(wanted, found) else sqnr_db(wanted, found)
