"""Whether a pipeline can be run without torch: a second watched run, and the recipe of both."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from effuse.errors import EffuseError, InputError
from effuse.pipeline_recipe import find as find_recipe
from effuse.pipeline_run import RECIPE_ARRAYS
from effuse.pipeline_sources import Pair
from effuse.pipeline_tokens import tokens_of
from effuse.pipeline_watch import Log, Reading, watch

PROMPT_ARGUMENTS = ("prompt", "prompts")
GUIDANCE_ARGUMENTS = ("guidance_scale", "guidance")
SEED = 0
OTHER, OTHER_NEGATIVE = "Quite another one", "no words"  # texts of the second watched run


def torch_free(
    pipe: Any, arguments: Mapping[str, Any], log: Log, described: Mapping[str, Any], folder: Path
) -> dict[str, Any]:
    """The recipe of a run without torch, its arrays written down; or why there is none."""
    folders = {(name, each["path"]): each["folder"] for name, told in described.items()
               for each in told.get("entries", ())}  # fmt: skip
    prompts = next((arguments[name] for name in PROMPT_ARGUMENTS if name in arguments), "")
    if isinstance(prompts, (list, tuple)) and len(prompts) > 1:
        return {"refused": f"it was watched with {len(prompts)} prompts at once; compile it with "
                "one, and hand run() a list"}  # fmt: skip
    first, reason = seeded(pipe, arguments), ""
    for negative in (True, False):
        second = other_texts(pipe, first, negative)
        try:
            pair = Pair(
                log, watch(pipe, second), folders, texts_of(first, second),
                guidance_of(pipe, first), seed_of(first),
            )  # fmt: skip
            recipe = find_recipe(pair)
            for each in recipe["readings"]:
                check_tokens(folder, each, [log.readings[each["number"]] for log in
                                            (pair.first, pair.second)])  # fmt: skip
        except (EffuseError, ValueError, TypeError) as error:
            reason = reason or str(error)
            continue
        with (folder / RECIPE_ARRAYS).open("wb") as file:
            np.savez(file, allow_pickle=False, **pair.constants)
        return {**recipe, "refused": None, "negative": negative}
    return {"refused": reason}


def check_tokens(folder: Path, told: Mapping[str, Any], readings: Sequence[Reading]) -> None:
    """See that the tokenizers library reads the watched texts as the pipeline's tokenizer did.

    Raises:
        InputError: it does not.
    """
    for each in readings:
        text = each.text if isinstance(each.text, str) else each.text[0]
        found = tokens_of(folder, told, text)
        for name, wanted in each.tokens.items():
            if name in ("input_ids", "attention_mask") and found[name].tolist() != wanted.tolist():
                raise InputError(f"{told['tokenizer']}: the tokenizers library gives other {name}")


def argument(pipe: Any, arguments: Mapping[str, Any], names: Sequence[str]) -> Any:
    """The first of these arguments that a call is given, or has by default."""
    known = inspect.signature(pipe.__call__).parameters
    found = next((name for name in names if name in known or name in arguments), None)
    if found is None:
        return None
    if found in arguments:
        return arguments[found]
    default = known[found].default
    return None if default is inspect.Parameter.empty else default


def seeded(pipe: Any, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call with a seed for its noise."""
    known = inspect.signature(pipe.__call__).parameters
    if "generator" in known:
        return {"generator": torch.Generator().manual_seed(SEED), **arguments}
    return {"seed": SEED, **arguments} if "seed" in known else dict(arguments)


def seed_of(arguments: Mapping[str, Any]) -> int:
    """The seed of a call's noise."""
    generator = arguments.get("generator")
    return int(arguments.get("seed", SEED) if generator is None else generator.initial_seed())


def guidance_of(pipe: Any, arguments: Mapping[str, Any]) -> float | None:
    """The scale of guidance that a call is given, or has by default."""
    found = argument(pipe, arguments, GUIDANCE_ARGUMENTS)
    return float(found) if isinstance(found, (int, float)) else None


def other_texts(pipe: Any, arguments: Mapping[str, Any], negative: bool) -> dict[str, Any]:
    """The arguments of a call with other texts in them, and noise from the same seed."""
    found = dict(arguments)
    if "generator" in found:
        found["generator"] = torch.Generator().manual_seed(seed_of(arguments))
    for name in PROMPT_ARGUMENTS:
        if name in found:
            found[name] = [OTHER] if isinstance(found[name], (list, tuple)) else OTHER
    if negative and "negative_prompt" in inspect.signature(pipe.__call__).parameters:
        found["negative_prompt"] = OTHER_NEGATIVE
    return found


def texts_of(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """The texts of two calls."""
    found = {}
    for name, keys in (("prompt", PROMPT_ARGUMENTS), ("negative", ("negative_prompt",))):
        texts = [next((each[key] for key in keys if each.get(key) is not None), "")
                 for each in (first, second)]  # fmt: skip
        plain = [text[0] if isinstance(text, (list, tuple)) else text for text in texts]
        found[name] = (str(plain[0]), str(plain[1]))
    return found
