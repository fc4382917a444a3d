"""A compiled pipeline: the object that `compile_pipeline` and `load` return (imports no torch)."""

from __future__ import annotations

import copy
import importlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from effuse import api, artifact
from effuse.errors import ArtifactError, InputError, require
from effuse.noise import draws
from effuse.pipeline_calls import class_of
from effuse.pipeline_parts import Component, open_component
from effuse.pipeline_play import drawn, play
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
        for name, component in self.components.items():
            component.instead_of(self._class_of(name))
        return made(**{**named, **found, **self.components, **told["settings"]})

    def run(
        self, prompt: Text | Sequence[Text] = "", negative: Text | Sequence[Text] | None = None, *,
        images: int | None = None, seed: int | Sequence[int] = 0, guidance: float | None = None,
        noise: Any = None, on_step: Callable[[int, int], None] = lambda done, total: None,
    ) -> Any:  # fmt: skip
        """Pictures without torch, as an array (…, height, width, channels) in [0, 1].

        What the pipeline does between its components is data in the artifact; it was found by
        watching, and checked. With the same seed they are the pipeline's pictures. Several are made
        one after another, each in all its steps.

        Args:
            prompt: a text, or its token ids; or several of them.
            negative: what to lead away from, where the pipeline was watched with that; one, or one
                for each prompt.
            images: of each prompt; None: as many as when it was watched.
            seed: of the noise, as of torch's CPU generator; or one for each picture, as of a list
                of generators.
            guidance: in place of the scale that was watched.
            noise: standard normal, in place of the seed's; of the first latents, for what steps of
                some schedulers add is the seed's.
            on_step: is told how many steps are done, of how many.

        Raises:
            InputError: the artifact has no run without torch, and why; or there are not as many
                seeds, negative prompts or noise as pictures.
        """
        recipe = self.recipe
        if negative is not None and not recipe["negative"]:
            raise InputError("negative: the pipeline treats an empty one apart; leave it out")
        texts = repeated(prompt, negative, images, recipe["latents"]["shape"][0])
        noises = noise_for(recipe, len(texts), seed, noise)
        steps = len(recipe["times"])
        count = Count(on_step, steps * len(texts))
        pictures = []
        for number, (pair, each) in enumerate(zip(texts, noises, strict=True)):
            count.before = number * steps
            pictures.append(self._picture(*pair, each, guidance, count))
        return np.concatenate(pictures)

    def _picture(
        self, prompt: Text, negative: Text, noise: Sequence[Any], guidance: float | None,
        on_step: Callable[[int, int], None],
    ) -> Any:  # fmt: skip
        """What one run of the recipe gives."""
        recipe, texts = self.recipe, {"prompt": prompt, "negative": negative}
        tokens: dict[str, Any] = {}
        for each in recipe["readings"]:
            read = tokens_of(self.folder, each, texts[each["text"]])
            tokens |= {f"reading.{each['number']}.{name}": value for name, value in read.items()}
        with np.load(self.folder / RECIPE_ARRAYS, allow_pickle=False) as file:
            constants = dict(file)
        entries = {entry.described["folder"]: entry for each in self.components.values()
                   for entry in each.entries}  # fmt: skip
        return play(
            recipe, constants, tokens, noise, lambda name, given: entries[name].flat(given),
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
            before = getattr(pipe, name, None)
            kind = self._class_of(name) if before is None else before.__class__
            setattr(pipe, name, component.instead_of(kind))
        return pipe

    def _class_of(self, name: str) -> type:
        """The class of a component before it was compiled, if it is of a known library."""
        return class_of(self.manifest["components"][name]["class"], Component)

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

    def to_html(self, path: str | os.PathLike[str]) -> Path:
        """Write the report as one page: the pipeline, and what was done with each of its parts.

        Raises:
            ArtifactError: the page cannot be written there.
            MissingExtra: jinja2 or matplotlib is not installed.
        """
        from effuse.pipeline_report import to_html

        return to_html(self.folder, self.manifest, path)

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


@dataclass
class Count:
    """Tells the steps of one run as those of all runs."""

    on_step: Callable[[int, int], None]
    total: int
    before: int = 0  # steps of earlier runs

    def __call__(self, done: int, _: int) -> None:
        """A step of the run is done."""
        self.on_step(self.before + done, self.total)


def repeated(
    prompt: Text | Sequence[Text], negative: Text | Sequence[Text] | None, images: int | None,
    batch: int,
) -> list[tuple[Text, Text]]:  # fmt: skip
    """Prompt and negative prompt of every run of a recipe that makes `batch` pictures.

    Raises:
        InputError: the numbers of prompts and pictures do not fit.
    """
    prompts = several(prompt) or [prompt]
    others = [""] if negative is None else several(negative) or [negative]
    count = batch if images is None else images
    if len(others) not in (1, len(prompts)):
        raise InputError(f"negative: {len(others)} texts for {len(prompts)} prompts; give one each")
    if count < 1 or count % batch:
        raise InputError(
            f"images: the pipeline was watched making {batch} of a prompt, and makes multiples of "
            f"that; came {count}"
        )
    others = others * (len(prompts) // len(others))
    pairs: list[Any] = list(zip(prompts, others, strict=True))
    return [pair for pair in pairs for _ in range(count // batch)]


def several(given: Any) -> list[Any] | None:
    """The texts, where it is not one alone: one may be its token ids."""
    if isinstance(given, str) or not len(given) or isinstance(given[0], (int, np.integer)):
        return None
    return list(given)


def noise_for(
    recipe: Mapping[str, Any], runs: int, seed: int | Sequence[int], given: Any
) -> list[tuple[Any, ...]]:
    """The noise of each run; one seed draws it for all of them at once, as torch does.

    Raises:
        InputError: there is not as much as they take.
    """
    shape = recipe["latents"]["shape"]
    whole = (runs * shape[0], *shape[1:])
    seeds = [int(seed)] if isinstance(seed, (int, np.integer)) else list(seed)
    if np.ndim(seed) and len(seeds) != whole[0]:
        raise InputError(f"seed: {len(seeds)} seeds for {whole[0]} pictures; give one each")
    if given is not None and np.size(given) != np.prod(whole):
        raise InputError(f"noise: expected the shape {whole}, got {np.shape(given)}")
    sources = [draws(each) for each in seeds]
    each_shape = (whole[0] // len(seeds), *shape[1:])
    first = [] if given is None else [given]

    def draw(_: Sequence[int]) -> Any:
        return first.pop() if first else np.concatenate([take(each_shape) for take in sources])

    return list(zip(*(np.reshape(each, (runs, *shape)) for each in drawn(recipe, draw)),
                    strict=True))  # fmt: skip


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
