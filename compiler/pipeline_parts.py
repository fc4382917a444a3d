"""What stands in a pipeline for a compiled component (imports no torch).

It answers what the pipeline was seen to ask of the network: calls run the component's artifacts,
reads and contexts come from the manifest.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn

from effuse.api import Compiled, ModelConfig
from effuse.errors import InputError, nearest
from effuse.pipeline_calls import labelled, rebuild, restored, shapes_of
from effuse.runtime import first_of
from effuse.sampler import nested

NETWORK = "network"  # an entry that is called as the network itself; others take tensors by number


class Entry:
    """One compiled call of a component: by these shapes, with these plain arguments."""

    def __init__(self, described: Mapping[str, Any], compiled: Compiled) -> None:
        self.described, self.compiled = described, compiled
        self.labels: list[str] = described["tensors"]

    def __call__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Run the call, with the results as the component itself hands them back."""
        if self.described["kind"] == NETWORK:
            return self.compiled(*args, **kwargs)
        tensors, _ = labelled(self.named(args, kwargs))
        return rebuild(self.described["result"], self.flat(tensors))

    def flat(self, tensors: Mapping[str, Any]) -> Sequence[Any]:
        """The tensors of the result, from tensors by label."""
        if self.described["kind"] == NETWORK:
            found = self.compiled(**nested(self.compiled.session.spec, tensors))
            return [first_of(found)]
        given = {f"input_{n}": tensors[label] for n, label in enumerate(self.labels)}
        return self.compiled(**given)  # type: ignore[no-any-return]

    def named(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of a call by name."""
        return {**dict(zip(self.described["parameters"], args, strict=False)), **kwargs}

    def refusal(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str | None:
        """Why this is not the entry for a call, or None."""
        if self.described["kind"] == NETWORK:
            return None
        tensors, plain = labelled(self.named(args, kwargs))
        defaults = self.described["defaults"]
        wanted = {**defaults, **self.described["plain"]}
        given = {**defaults, **plain}
        for label in sorted({*wanted, *given}):
            if wanted.get(label) != given.get(label):
                return f"{label}: compiled with {wanted.get(label)!r}, got {given.get(label)!r}"
        if set(tensors) != set(self.labels):
            return f"compiled for {', '.join(self.labels)}, got {', '.join(tensors) or 'none'}"
        return self._other_shape(tensors)

    def _other_shape(self, tensors: Mapping[str, Any]) -> str | None:
        for label, (shape, _) in shapes_of(tensors).items():
            known = self.compiled.session.spec.inputs[self.labels.index(label)].shape
            if len(known) != len(shape) or any(
                isinstance(want, int) and want != got
                for want, got in zip(known, shape, strict=True)
            ):
                return f"{label}: compiled for shape {tuple(known)}, got {tuple(shape)}"
        return None


class Component:
    """Stands in for a network in a pipeline."""

    def __init__(self, name: str, described: Mapping[str, Any], entries: list[Entry]) -> None:
        self._name, self._described, self.entries = name, described, entries
        self._place = ""
        self._kind: type = Component
        self.config = ModelConfig(described["config"])

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """The network's: pipelines ask isinstance(controlnet, ControlNetModel)."""
        return self._kind

    def instead_of(self, kind: type) -> Component:
        """Itself, taken for an instance of the network's class by those that ask."""
        self._kind = kind
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the network's forward."""
        return self._run(self._place, args, kwargs)

    def _run(self, path: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        refused = []
        for entry in self.entries:
            if entry.described["path"] != path:
                continue
            reason = entry.refusal(args, kwargs)
            if reason is None:
                try:
                    return entry(args, kwargs)
                except InputError as error:  # of a network, which checks what it is given itself
                    reason = str(error)
            refused.append(reason)
        called = ".".join(filter(None, (self._name, path)))
        raise InputError(
            f"{called}: {'; or '.join(refused) or 'not compiled'}; compile the pipeline again with "
            "the arguments that it is to be called with: compile_pipeline(…, call={…}), "
            "prompts=([…, …],) for several prompts at once"
        )

    @property
    def compiled(self) -> Compiled:
        """The first of its artifacts."""
        return self.entries[0].compiled

    @property
    def dtype(self) -> Any:
        """The network's dtype."""
        return self.compiled.dtype

    @property
    def device(self) -> Any:
        """Where it computes."""
        return self.compiled.device

    def to(self, *args: Any, **kwargs: Any) -> Component:
        """Itself: what is compiled stays where it was compiled for."""
        return self

    def eval(self) -> Component:
        """Itself; it is never in train mode."""
        return self

    def modules(self) -> Iterator[Any]:
        """None: nothing in it is a module."""
        return iter(())

    children = modules

    def save_pretrained(self, *_: Any, **__: Any) -> NoReturn:
        """Nothing that its library could write.

        Raises:
            InputError: always.
        """
        raise InputError(
            f"{self._name} is compiled, and no folder of weights; save the compiled pipeline: "
            "effuse.compile_pipeline(…).save(path)"
        )

    def parameters(self) -> Iterator[Any]:
        """One empty tensor, of which pipelines read the dtype and the device."""
        import torch

        return iter((torch.empty(0, dtype=self.dtype),))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        path = f"{self._place}.{name}".lstrip(".")
        described = self._described
        if path in described["reads"]:
            return restored(described["reads"][path])
        if path in described["contexts"]:
            return lambda *args, **kwargs: contextlib.nullcontext()
        paths = {entry.described["path"] for entry in self.entries}
        if path in paths or any(
            known.startswith(f"{path}.") for known in (*paths, *described["reads"])
        ):
            return self._inner(path)
        raise AttributeError(
            f"{self._name} has no {path!r}: it is compiled, and the pipeline did not read that "
            f"when it was watched{nearest(path, (*described['reads'], *paths))}"
        )

    def _inner(self, path: str) -> Component:
        """The module or method at that path."""
        found = Component(self._name, self._described, self.entries)
        found._place = path
        return found

    def __repr__(self) -> str:
        return f"<effuse.Component {self._name}: {self.compiled!r}>"


def open_component(
    name: str, described: Mapping[str, Any], opened: Mapping[str, Compiled]
) -> Component:
    """A component over its entries' artifacts, by the folders that they lie in."""
    entries = [Entry(each, opened[each["folder"]]) for each in described["entries"]]
    return Component(name, described, entries)


def entry_folder(component: str, path: str, number: int) -> str:
    """Where an entry's artifact lies: `unet`, `vae.decode`, `text_encoder-1`."""
    name = ".".join(filter(None, (component, path)))
    return f"{name}-{number}" if number else name
