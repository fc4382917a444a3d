"""A compiled pipeline: the object that `compile_pipeline` and `load` return (imports no torch)."""

from __future__ import annotations

import copy
import importlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from effuse import api, artifact
from effuse.errors import ArtifactError, InputError, require
from effuse.noise import normal
from effuse.pipeline_parts import Component, open_component
from effuse.pipeline_play import play
from effuse.pipeline_tokens import Text, tokens_of

RECIPE_ARRAYS = "recipe.npz"


class CompiledPipeline:
    """A compiled pipeline: call it as the pipeline, save it, put its components into another."""

    def __init__(
        self, components: Mapping[str, Component], manifest: Mapping[str, Any], folder: Path,
        *, keep: Any = None, pipe: Any = None,
    ) -> None:  # fmt: skip
        self.components = dict(components)
        self.manifest = manifest
        self.folder = folder
        self._keep = keep  # holds the temporary folder, if the files live in one
        self._pipe = None if pipe is None else self.into(copy.copy(pipe))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the pipeline's call, with the number of steps that it was compiled for by default."""
        given = {**self._steps(), **kwargs}
        return self.pipeline()(*args, **given)

    def _steps(self) -> dict[str, Any]:
        arguments = self.manifest["pipeline"]["arguments"]
        names = [name for name in ("num_inference_steps", "steps") if name in arguments]
        return {name: arguments[name] for name in names}

    def pipeline(self) -> Any:
        """The pipeline as an object of its own class, with the compiled components in it.

        Raises:
            ArtifactError: a component that is needed was not saved, or the class is not diffusers'.
        """
        if self._pipe is None:
            self._pipe = self._built()
        return self._pipe

    def _built(self) -> Any:
        require("diffusers", "diffusers")
        from effuse.pipeline_artifact import open_other

        told = self.manifest["pipeline"]
        home, _, kind = told["class"].rpartition(".")
        if not home.startswith("diffusers."):
            raise ArtifactError(
                f"{told['class']} is no class of diffusers; open it yourself and hand it to .into()"
            )
        found = {name: open_other(self.folder, name, each)
                 for name, each in self.manifest["others"].items()}  # fmt: skip
        made = getattr(importlib.import_module(home), kind)
        named = {name: None for name in made._get_signature_keys(made)[0]}
        return made(**{**named, **found, **self.components, **told["settings"]})

    def run(
        self, prompt: Text = "", negative: Text | None = None, *, seed: int = 0,
        guidance: float | None = None, noise: Any = None,
        on_step: Callable[[int, int], None] = lambda done, total: None,
    ) -> Any:  # fmt: skip
        """A picture without torch, as an array (…, height, width, channels) in [0, 1].

        What the pipeline does between its components is data in the artifact; it was found by
        watching, and checked. With the same seed it is the pipeline's picture.

        Args:
            prompt: a text, or its token ids.
            negative: what to lead away from, where the pipeline was watched with that.
            seed: of the noise, as of torch's CPU generator.
            guidance: in place of the scale that was watched.
            noise: standard normal, in place of the seed's.
            on_step: is told how many steps are done, of how many.

        Raises:
            InputError: the artifact has no run without torch, and why.
        """
        recipe = self.recipe
        if negative is not None and not recipe["negative"]:
            raise InputError("negative: the pipeline treats an empty one apart; leave it out")
        texts = {"prompt": prompt, "negative": "" if negative is None else negative}
        tokens: dict[str, Any] = {}
        for each in recipe["readings"]:
            read = tokens_of(self.folder, each, texts[each["text"]])
            tokens |= {f"reading.{each['number']}.{name}": value for name, value in read.items()}
        with np.load(self.folder / RECIPE_ARRAYS, allow_pickle=False) as file:
            constants = dict(file)
        drawn = normal(seed, recipe["latents"]["shape"]) if noise is None else noise
        entries = {entry.described["folder"]: entry for each in self.components.values()
                   for entry in each.entries}  # fmt: skip
        return play(
            recipe, constants, tokens, drawn, lambda name, given: entries[name].flat(given),
            guidance, on_step,
        )  # fmt: skip

    @property
    def recipe(self) -> Mapping[str, Any]:
        """What a run without torch does between the components.

        Raises:
            InputError: there is none, and why.
        """
        told: Mapping[str, Any] = self.manifest["torch_free"]
        if told["refused"] is not None:
            raise InputError(f"torch-free: no, because {told['refused']}; call it with torch")
        return told

    def into(self, pipe: Any) -> Any:
        """Put the compiled components into a pipeline that has their places; returns it."""
        for name, component in self.components.items():
            setattr(pipe, name, component)
        return pipe

    @property
    def session(self) -> NoReturn:
        """None of its own.

        Raises:
            InputError: always; what has sessions are its components.
        """
        names = ", ".join(each["folder"] for told in self.manifest["components"].values()
                          for each in told.get("entries", ()))  # fmt: skip
        raise InputError(f"this is a pipeline's artifact; open one of its folders: {names}")

    @property
    def report(self) -> list[str]:
        """One line a component: what it is, what was done with it, and why."""
        refused = self.manifest["torch_free"]["refused"]
        free = "yes" if refused is None else f"no, because {refused}"
        return [f"torch-free: {free}", *(line_of(name, told, self.components.get(name))
                for name, told in sorted(self.manifest["components"].items()))]  # fmt: skip

    @property
    def size(self) -> int:
        """All the artifact's files together, in bytes."""
        return sum((self.folder / name).stat().st_size for name in artifact.members(self.folder))

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the artifact to `path`: a zip if the name ends in .zip, else a folder.

        Raises:
            ArtifactError: the path cannot be written, or holds something that is no artifact.
        """
        return artifact.save(self.folder, path)

    def __repr__(self) -> str:
        kind = self.manifest["pipeline"]["class"].rpartition(".")[2]
        names = ", ".join(self.components) or "nothing"
        return f"<effuse.CompiledPipeline {kind}: {names} compiled, {self.size / 1e6:.1f} MB>"


def line_of(name: str, told: Mapping[str, Any], component: Component | None) -> str:
    """What was done with a component, for people."""
    if component is None:
        return f"{name}: left as it is: {told['reason']}"
    parity = component.compiled.manifest["parity"]["sqnr_db"]
    close = "" if parity is None else f", {parity:g} dB from eager"
    size = component.compiled.size / 1e6
    return (
        f"{name}: compiled ({told['role']}, {told['calls']} calls, {100 * told['share']:.3g} % of "
        f"the time), {size:.1f} MB{close}"
    )


def opened(found: artifact.Opened, path: str, threads: int, providers: tuple[str, ...]) -> Any:
    """The pipeline of a checked artifact."""
    manifest, folder = found.manifest, found.folder
    components = {}
    for name, told in manifest["components"].items():
        if told["reason"] is not None:
            continue
        parts = {each["folder"]: _part(folder / each["folder"], path, threads, providers)
                 for each in told["entries"]}  # fmt: skip
        components[name] = open_component(name, told, parts)
    return CompiledPipeline(components, manifest, folder, keep=found)


def _part(folder: Path, path: str, threads: int, providers: tuple[str, ...]) -> api.Compiled:
    """A component's artifact; its files were checked with the pipeline's."""
    try:
        manifest = json.loads((folder / artifact.MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path}: {folder.name} is no artifact: {error}") from None
    return api.opened(manifest, folder, threads, providers, path)
