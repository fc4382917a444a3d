"""The public API: `compile` on one page, `load`, and the object that both return (DESIGN 9)."""

from __future__ import annotations

import importlib
import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from effuse import artifact
from effuse.buckets import BucketSession
from effuse.errors import ArtifactError, require
from effuse.lora import Loaded, Loras
from effuse.plan import Plan, ProgramSpec, spec_from_json
from effuse.resume import Workspace, workspace
from effuse.runtime import Session

if TYPE_CHECKING:
    from torch import nn

    from effuse.config import Config
    from effuse.report import Report

ON_GPU = ("tensorrt", "triton")  # back ends of which nothing runs on a CPU


class ModelConfig(dict[str, Any]):
    """The original network's config: by key, and by attribute as diffusers' pipelines read it."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"the network's config has no {name!r}") from None


class Compiled:
    """A compiled network: call it as the network it replaces, save it, read its plan and report."""

    def __init__(
        self,
        session: Session | None,
        manifest: Mapping[str, Any],
        folder: Path,
        seconds: Mapping[str, float] | None = None,
        keep: Any = None,
    ) -> None:
        self._session = session
        self.manifest = manifest
        self.folder = folder
        self.seconds = dict(seconds or {})
        self._keep = keep  # holds the temporary folder, if the files live in one
        self.config = ModelConfig(manifest["model"].get("config", {}))
        self._loras: Loras | None = None  # of the session, once one is loaded

    @property
    def session(self) -> Session:
        """What runs the program; of a streamed build, and of one for a GPU that is not here, it is
        opened when it is first asked for.
        """
        if self._session is None:
            self._session = _open(self.manifest, self.folder)
        return self._session

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run one step; takes and returns what the network's forward does.

        Raises:
            InputError: an input is missing, unknown, of the wrong shape or dtype, or the schedule
                does not have the timestep.
        """
        return self.session(*args, **kwargs)

    def load_lora(
        self, path: str | os.PathLike[str], scale: float = 1.0, name: str | None = None
    ) -> str:
        """Add scale · up @ down of a LoRA file to the layers' weights; returns its name.

        Several may be loaded at once. They belong to this object: `save` writes the artifact as it
        was built.

        Args:
            path: a .safetensors file as peft, diffusers, kohya or cloneofsimo write it.
            scale: a factor for the whole of it.
            name: to unload it by; None: the file's name without its suffix.

        Raises:
            InputError: the file, or one of its layers, does not fit; nothing was loaded.
        """
        changed = self._known_loras.plus(Path(path), scale, name)
        self._swap(changed)
        return changed.loaded[-1].name

    def unload_lora(self, name: str | None = None) -> None:
        """Take the LoRA of that name away, as if it had never been loaded; None: all of them.

        Raises:
            InputError: no LoRA of that name is loaded.
        """
        self._swap(self._known_loras.minus(name))

    @property
    def loras(self) -> tuple[Loaded, ...]:
        """The LoRAs that are loaded, in that order: `name`, `scale`, and `ranks` by layer."""
        return self._known_loras.loaded

    @property
    def _known_loras(self) -> Loras:
        return self._loras or Loras(self.session.spec, self.folder)

    def _swap(self, changed: Loras) -> None:
        """Let the session run with these LoRAs: with all of them, or as before."""
        array = self.session.arrays.array
        factors = changed.factors().items()
        self.session.swap({name: array(each.value, each.dtype) for name, each in factors})
        self._loras = changed

    @property
    def plan(self) -> str:
        """The plan, one line a step: variant, slots filled and read."""
        spec = spec_from_json(self.manifest["program"])
        return "\n".join(Plan.lines(spec.plan, spec.timesteps or ()))

    @property
    def report(self) -> Report:
        """What was built, measured and left alone, as data, for the terminal and as HTML."""
        from effuse.report import Report

        return Report(self.manifest, self.seconds, None)

    @property
    def size(self) -> int:
        """All the artifact's files together, in bytes."""
        return sum(path.stat().st_size for path in self.folder.iterdir())

    @property
    def dtype(self) -> Any:
        """The network's dtype: torch's where torch is installed, else numpy's."""
        name = self.manifest["model"]["dtype"]
        try:
            import torch
        except ModuleNotFoundError:
            import numpy

            return numpy.dtype(name)
        return getattr(torch, name)

    @property
    def device(self) -> Any:
        """Where it computes: the CPU, or the GPU that it was compiled for."""
        name = "cuda" if self.manifest["backend"] in ON_GPU else "cpu"
        try:
            import torch
        except ModuleNotFoundError:
            return name
        return torch.device(name if torch.cuda.is_available() else "cpu")

    def to(self, *args: Any, **kwargs: Any) -> Compiled:
        """Itself: a compiled network stays where it was compiled for; pipelines call this."""
        return self

    def eval(self) -> Compiled:
        """Itself; it is never in train mode."""
        return self

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the artifact to `path`: a zip if the name ends in .zip, else a folder.

        Raises:
            ArtifactError: the path cannot be written, or holds something that is no artifact.
        """
        if isinstance(self._keep, Workspace):
            self.folder = self._keep.deliver(Path(path))
            return Path(path)
        return artifact.save(self.folder, path)

    def __repr__(self) -> str:
        model, backend = self.manifest["model"], self.manifest["backend"]
        return (
            f"<effuse.Compiled {model.get('class', '?')} for {backend}, {self.size / 1e6:.1f} MB>"
        )


def compile(
    model: nn.Module | str | os.PathLike[str],
    config: Config | str | Path | Mapping[str, Any] = "exact",
    *,
    inputs: Mapping[str, Any] | None = None,
    schedule: Any = None,
    calibration: Any = None,
    progress: bool = True,
    resume: str | os.PathLike[str] | None = None,
) -> Compiled:
    """Compile a denoiser ahead of time.

    Args:
        model: a torch.nn.Module in eval mode, one of its methods (an autoencoder's `decode`), or a
            folder written by save_pretrained.
        config: an effuse.Config, a preset's name, a mapping, or the path of a TOML file.
        inputs: example inputs by forward's names; None: derived from the model's own config.
        schedule: a diffusers scheduler with its timesteps set, or the timesteps; None: any.
        calibration: run(model) -> None that samples with the model it is handed, or an iterable of
            input mappings; None: inputs from noise over the schedule.
        progress: whether to show bars when standard error is a terminal.
        resume: with stream=True, a folder that keeps what is finished: the same call goes on where
            it was interrupted. Saving moves the artifact out of it, and removes it.

    Raises:
        EffuseError: what exactly went wrong, and the way out; nothing is left behind.
    """
    for library in ("torch", "pydantic", "rich"):
        require(library)
    from effuse import build
    from effuse.config import resolve
    from effuse.progress import phases

    settings = resolve(config)
    kept = workspace(resume, settings.stream)
    holder = kept or tempfile.TemporaryDirectory(prefix="effuse-")
    folder = Path(holder.name)
    try:
        with phases(progress) as show:
            with show.phase("capture"):
                program = build.capture_program(model, inputs, schedule, settings, show)
            going = settings if kept is None else kept.watching(program, settings)
            with show.phase("rewrite"):
                program = build.rewrite(program, going, calibration, show, schedule)
            with show.phase("lower"):
                session, manifest = build.lower(program, settings, folder, show)
    except BaseException:
        holder.cleanup()
        raise
    return Compiled(session, manifest, folder, show.seconds, holder)


def load(
    path: str | os.PathLike[str], *, threads: int = 0, providers: Iterable[str] = ()
) -> Compiled:
    """Load an artifact; an ONNX one needs numpy and onnxruntime only.

    A pipeline's gives the CompiledPipeline that was saved.

    One for a device that is not here loads too, for its report and plan; a call then says what is
    missing.

    Args:
        path: the folder or zip.
        threads: for one operator in onnxruntime; 0 lets it choose.
        providers: onnxruntime's execution providers in order of preference; by default those of
            the target that it was compiled for, else the CPU.

    Raises:
        ArtifactError: the artifact is damaged, unsafe, or newer than this effuse.
    """
    found = artifact.Opened(path)
    if found.manifest.get("kind") == "pipeline":
        from effuse import pipeline_run

        whole: Any = pipeline_run.opened(found, str(path), threads, tuple(providers))
        return whole  # type: ignore[no-any-return]
    return opened(found.manifest, found.folder, threads, tuple(providers), str(path), found)


def opened(
    manifest: Mapping[str, Any], folder: Path, threads: int, providers: tuple[str, ...],
    path: str, keep: Any = None,
) -> Compiled:  # fmt: skip
    """The network of a checked artifact's files; `path` is what errors call it."""
    here = not _elsewhere(manifest, providers)
    session = _open(manifest, folder, threads, providers, path) if here else None
    return Compiled(session, manifest, folder, keep=keep)


def _elsewhere(manifest: Mapping[str, Any], providers: tuple[str, ...]) -> bool:
    """Whether it is built for a device that is not here: then it can be read, but not run."""
    if manifest.get("backend") == "onnx":
        from effuse.devices import device_of, missing

        return not providers and missing(device_of(manifest.get("target"))) is not None
    if manifest.get("backend") not in ON_GPU:
        return False
    require("torch")
    backend = importlib.import_module(f"effuse.backends.{manifest['backend']}")
    return backend.absent(manifest.get("target")) is not None


def _open(
    manifest: Mapping[str, Any], folder: Path, threads: int = 0, providers: tuple[str, ...] = (),
    path: str = "",
) -> Session:  # fmt: skip
    """A session over the files of an artifact."""
    name = path or str(folder)
    try:
        spec: ProgramSpec = spec_from_json(manifest["program"])
        specs = [spec_from_json(each["program"]) for each in manifest.get("buckets", ())]
        backend = manifest["backend"]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ArtifactError(
            f"{name}: {artifact.MANIFEST} does not describe a program: {error}"
        ) from None

    def opening(chosen: ProgramSpec) -> Session:
        return _open_spec(chosen, backend, manifest, folder, threads, providers, name)

    return BucketSession(spec, specs, opening) if specs else opening(spec)


def _open_spec(
    spec: ProgramSpec, backend: str, manifest: Mapping[str, Any], folder: Path, threads: int,
    providers: tuple[str, ...], name: str,
) -> Session:  # fmt: skip
    """The back end's session over the files of a program."""
    if backend == "onnx":
        from effuse.ort import open_session

        target = manifest.get("target")
        return open_session(spec, folder, threads=threads, providers=providers, target=target)
    if backend == "openvino":
        from effuse import openvino_run

        return openvino_run.open_session(spec, folder, threads=threads, providers=providers)
    if backend == "reference":
        require("torch")
        from effuse.backends.reference import load_session

        return load_session(spec, folder)
    if backend == "executorch":
        require("torch")
        from effuse import export_pte

        return export_pte.open_session(spec, folder)
    if backend in ON_GPU:
        require("torch")
        module = importlib.import_module(f"effuse.backends.{backend}")
        return module.load_session(spec, folder)  # type: ignore[no-any-return]
    raise ArtifactError(f"{name}: built for {backend!r}, which this effuse does not run")
