"""What to build: passes, back end, target; from Python, a preset, a mapping or a TOML file."""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from effuse.buckets import check_asked
from effuse.devices import check_formats, check_sizes
from effuse.errors import ConfigError, nearest, require
from effuse.plan import to_json
from effuse.targets import check_backend, check_target

try:
    from pydantic import (
        BaseModel,
        ConfigDict,
        TypeAdapter,
        ValidationError,
        ValidationInfo,
        field_validator,
    )

    from effuse.capture_inputs import SYMBOLS
    from effuse.draw import DRAWS
    from effuse.passes import BY_NAME, ORDER, PRESETS, AutoBits, Pass, Quantize
except ModuleNotFoundError as missing:
    require(str(missing.name))  # says what installs it
    raise

BACKENDS = ("auto", "reference", "onnx", "openvino", "tensorrt", "triton")


class Config(BaseModel):
    """A build's configuration.

    Args:
        passes: what to rewrite, in any order; canonicalization always runs first.
        backend: `reference`, `onnx`, `openvino`, `tensorrt`, `triton`, or
            `auto` (the fastest that is there).
        target: what to build for, present or not, e.g. `cpu-avx512vnni` or `sm_90`; None: this
            machine.
        seed: of everything random (calibration noise).
        roles: overrides, input's label -> latent, timestep, prompt or static.
        dynamic: sizes left open with bounds, e.g. {"batch": (1, 8)}.
        shapes: sizes to build, each a static program over one set of weights, e.g.
            [{"height": 64, "width": 64}, {"height": 96, "width": 64}]; a size that one does not
            name is the example's. None: one program, for the example's sizes or those within the
            bounds of `dynamic`.
        step_groups: groups of timesteps that calibration keeps statistics for.
        calibration_steps: which of its calls calibration records: `all`, `uniform` over the
            schedule (Q-Diffusion), `normal`, more of the clean end (PTQ4DM), or by `density` and
            variety of the network's middle feature (EDA-DM), which samples once more.
        stream: compile a folder's weights layer by layer, a network larger than memory: nothing
            calibrates, and the result is not compared with eager.
        calibration_calls: how many calls a draw records in all, a guided step in two calls being
            two; None: as many as the schedule has steps.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    passes: tuple[Any, ...] = ()
    backend: str = "onnx"
    target: str | None = None
    seed: int = 0
    roles: dict[str, str] = {}
    dynamic: dict[str, tuple[int, int]] = {}
    shapes: tuple[dict[str, int], ...] = ()
    step_groups: int = 10
    calibration_steps: str = "all"
    calibration_calls: int | None = None
    stream: bool = False

    def __init__(self, **values: Any) -> None:
        for name in values:
            if name not in type(self).model_fields:
                raise ConfigError(
                    f"config: no option {name!r}{nearest(name, type(self).model_fields)}"
                )
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise own_error(error) or ConfigError(f"config: {first_problem(error)}") from None
        check_backend(self.target, self.backend)
        check_asked(self.shapes, self.dynamic, SYMBOLS)
        if self.backend in ("auto", "onnx"):
            check_formats(self.target, *formats_asked(self.passes))
            check_sizes(self.target, [] if self.shapes else list(self.dynamic))

    @field_validator("passes", mode="before")
    @classmethod
    def _passes(cls, value: Any) -> tuple[Pass, ...]:
        if isinstance(value, str):
            return preset(value)
        if isinstance(value, (Pass, Mapping)):
            value = (value,)
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"passes: expected a sequence of passes, got {value!r}")
        return legal_order([make_pass(item) for item in value])

    @field_validator("backend")
    @classmethod
    def _backend(cls, value: str) -> str:
        if value not in BACKENDS:
            raise ConfigError(
                f"backend: {value!r} is not in this version{nearest(value, BACKENDS)}"
            )
        return value

    @field_validator("target")
    @classmethod
    def _target(cls, value: str | None) -> str | None:
        if value is not None:
            check_target(value)
        return value

    @field_validator("dynamic")
    @classmethod
    def _dynamic(cls, value: dict[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
        for name, (low, high) in value.items():
            if not 1 <= low <= high:
                raise ConfigError(
                    f"dynamic: {name!r} needs bounds 1 <= low <= high, got ({low}, {high})"
                )
        return value

    @field_validator("step_groups")
    @classmethod
    def _step_groups(cls, value: int) -> int:
        if value < 1:
            raise ConfigError(f"step_groups: at least 1, got {value}")
        return value

    @field_validator("calibration_steps")
    @classmethod
    def _calibration_steps(cls, value: str) -> str:
        if value not in DRAWS:
            raise ConfigError(f"calibration_steps: {value!r} is unknown{nearest(value, DRAWS)}")
        return value

    @field_validator("calibration_calls")
    @classmethod
    def _calibration_calls(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value is not None and value < 1:
            raise ConfigError(f"calibration_calls: at least 1, or None, got {value}")
        if value is not None and info.data.get("calibration_steps") == "all":
            raise ConfigError(
                f"calibration_calls: {value} calls are drawn by calibration_steps='uniform', "
                "'normal' or 'density'; 'all' records every call"
            )
        return value

    def data(self) -> dict[str, Any]:
        """The resolved configuration as JSON-able data, for the manifest."""
        passes = [{"name": each.name, **to_json(each.options())} for each in self.passes]
        rest = {name: to_json(getattr(self, name)) for name in type(self).model_fields}
        return {**rest, "passes": passes}


def own_error(error: ValidationError) -> ConfigError | None:
    """The ConfigError that one of our validators raised, if it is what pydantic reports."""
    cause = error.errors()[0].get("ctx", {}).get("error")
    return cause if isinstance(cause, ConfigError) else None


def first_problem(error: ValidationError) -> str:
    """pydantic's first complaint in one sentence."""
    problem = error.errors()[0]
    where = ".".join(str(part) for part in problem["loc"])
    given = problem.get("input")
    message = problem["msg"].removeprefix("Value error, ")
    return f"{where}: {message} (got {given!r})" if where else message


def preset(name: str) -> tuple[Pass, ...]:
    """The passes of a preset."""
    if name not in PRESETS:
        raise ConfigError(f"preset: {name!r} is unknown{nearest(name, PRESETS)}")
    return PRESETS[name]


def make_pass(value: Any) -> Pass:
    """A pass from itself, its name, or a mapping {"name": …, option: …}; its options checked."""
    if isinstance(value, Pass):
        own = {each.name: getattr(value, each.name) for each in dataclasses.fields(value)}
        value = {"name": value.name, **own}
    elif not isinstance(value, (str, Mapping)):
        raise ConfigError(f"passes: expected a pass, its name or a mapping, got {value!r}")
    options = {"name": value} if isinstance(value, str) else dict(value)
    name = str(options.pop("name", ""))
    if name not in BY_NAME:
        raise ConfigError(f"passes: no pass is called {name!r}{nearest(name, BY_NAME)}")
    kind = BY_NAME[name]
    known = {field.name for field in dataclasses.fields(kind)}
    for option in options:
        if option not in known:
            raise ConfigError(f"passes: {name} has no option {option!r}{nearest(option, known)}")
    try:
        return TypeAdapter(kind).validate_python(options)
    except ValidationError as error:
        raise ConfigError(f"passes: {name}: {first_problem(error)}") from None


def formats_asked(passes: Sequence[Pass]) -> tuple[list[str], list[str]]:
    """The formats that passes quantize in, and when they find ranges of activations."""
    whole = [each for each in passes if isinstance(each, Quantize)]
    mixed = [name for each in passes if isinstance(each, AutoBits) for name in each.formats]
    single = [name for each in whole for name in (each.format, *dict(each.layers).values())]
    return single + mixed, [each.activations for each in whole]


def legal_order(passes: Sequence[Pass]) -> tuple[Pass, ...]:
    """The passes in the order of `passes.ORDER`; the same pass twice is refused."""
    names = [each.name for each in passes]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"passes: {name} is given twice")
    return tuple(sorted(passes, key=lambda each: ORDER.index(type(each))))


def resolve(value: Config | str | Path | Mapping[str, Any]) -> Config:
    """A Config from itself, a preset's name, a mapping, or the path of a TOML file.

    Raises:
        ConfigError: unknown preset, pass or option, with the nearest name.
    """
    if isinstance(value, Config):
        return value
    if isinstance(value, Mapping):
        return Config(**value)
    if str(value).endswith(".toml"):
        return Config(**read_toml(Path(value)))
    return Config(passes=preset(str(value)))


def read_toml(path: Path) -> dict[str, Any]:
    """The mapping in a TOML file."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        reason = "no such config file" if isinstance(error, FileNotFoundError) else error.strerror
        raise ConfigError(f"{path}: {reason}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None
