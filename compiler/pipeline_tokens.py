"""Texts to tokens without transformers, by the tokenizers library alone (imports no torch)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from effuse.errors import InputError, MissingExtra, require

Text = str | Sequence[int]
CLEANERS: Mapping[str, Callable[[str], str]] = {
    "": str, "lower": lambda text: text.lower().strip(), "strip": str.strip,
}  # fmt: skip


def tokens_of(folder: Path, told: Mapping[str, Any], text: Text) -> dict[str, np.ndarray[Any, Any]]:
    """`input_ids` and `attention_mask` of one text, filled up to the length that was watched.

    Args:
        folder: of the pipeline's artifact.
        told: a reading of the recipe: the tokenizer, the length, how the text is cleaned.
        text: a text, or the ids of its tokens with the special ones.

    Raises:
        InputError: the tokenizer's file is missing, or there are too many ids.
        MissingExtra: the library is missing, and a text is given.
    """
    length = told["length"]
    if isinstance(text, str):
        ids = encoded(folder / told["tokenizer"], CLEANERS[told["cleaned"]](text), told)
    else:
        ids = [int(each) for each in text]
    if len(ids) > length:
        raise InputError(f"prompt: {len(ids)} token ids, and the pipeline takes {length}")
    fill = length - len(ids)
    return {
        "input_ids": np.array([[*ids, *[told["pad"]] * fill]], np.int64),
        "attention_mask": np.array([[*[1] * len(ids), *[0] * fill]], np.int64),
    }


def encoded(folder: Path, text: str, told: Mapping[str, Any]) -> list[int]:
    """The ids of a text's tokens, cut to length."""
    try:
        library = require("tokenizers", "text")
    except MissingExtra as error:
        raise MissingExtra(f"prompt: to read a text, {error}; or give token ids") from error
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise InputError(
            f"prompt: the artifact has no {folder.name}/tokenizer.json, which the tokenizers "
            "library reads; give token ids"
        )
    tokenizer = library.Tokenizer.from_file(str(file))
    tokenizer.no_padding()
    tokenizer.enable_truncation(told["length"])
    return list(tokenizer.encode(text, add_special_tokens=told["special"]).ids)
