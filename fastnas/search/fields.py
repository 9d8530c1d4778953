"""The fields of a config: what each may hold, checked in one place for flags, files and Python."""

from __future__ import annotations

import difflib
import json
import typing
from collections.abc import Mapping, Sequence
from dataclasses import Field, asdict, dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from fastnas.bounds import Bounds, whole
from fastnas.checks import check_type, short, typed
from fastnas.search.settings_file import read_settings_text
from fastnas.strategies import STRATEGIES

SEEDS = whole(0, 2**63 - 1)
"""So that a run may count on from its seed, for what torch takes as one."""


class ConfigError(ValueError):
    """A setting is wrong; one line says which, what was given and what is allowed."""


def option(
    default: Any,
    text: str,
    bounds: Bounds | None = None,
    choices: Sequence[str] | None = None,
) -> Any:
    """A field with its help text and, as its type asks for them, its bounds or its choices."""
    metadata = {"help": text, "bounds": bounds, "choices": choices}
    return field(default=default, metadata=metadata)


def bounds_of(f: Field[Any]) -> Bounds | None:
    """The bounds of a number; those of an option of methods are what these methods say."""
    own: Bounds | None = f.metadata["bounds"]
    return own or _method_bounds().get(f.name)


@cache
def _method_bounds() -> dict[str, Bounds]:
    methods = STRATEGIES.values()
    return {name: bounds for method in methods for name, bounds in method.all_bounds().items()}


@dataclass(frozen=True)
class FolderConfig:
    """What all runs share."""

    out: str = option("runs/run", "folder of the run; everything it writes goes there")
    seed: int = option(0, "seed of everything random", SEEDS)

    def validate(self) -> None:
        """ConfigError for values that no run can have."""
        hints = hints_of(type(self))
        for f in fields(self):
            _check(f, hints[f.name], getattr(self, f.name))


def hints_of(kind: type[FolderConfig]) -> dict[str, tuple[type, ...]]:
    """Field to the types that its values have."""
    hints = typing.get_type_hints(kind)
    return {name: typing.get_args(hint) or (hint,) for name, hint in hints.items()}


def _check(f: Field[Any], types: Sequence[type], value: Any) -> None:
    """ConfigError where a field cannot have that value, of another type or out of bounds."""
    if value is None and type(None) in types:
        return
    bounds, choices = bounds_of(f), f.metadata["choices"]
    if bounds is not None:
        try:
            bounds.check(f.name, value)
        except ValueError as error:
            raise ConfigError(str(error)) from error
    elif type(value) not in types:
        needed = "true or false" if bool in types else "text"
        raise ConfigError(f"{f.name} is {short(value)}; {needed} is needed")
    elif choices is not None and value not in choices:
        raise ConfigError(f"{f.name} is {short(value)}; allowed: {', '.join(choices)}")
    elif isinstance(value, str) and "\0" in value:
        raise ConfigError(f"{f.name} is {short(value)}; a NUL is in no name or text")


Config = TypeVar("Config", bound=FolderConfig)


def make_config(kind: type[Config], settings: Mapping[str, Any]) -> Config:
    """A checked config from plain settings; ConfigError names what is unknown or wrong.

    Raises:
        TypeError: `kind` is no class of configs, or `settings` no mapping.
    """
    if not isinstance(kind, type) or not issubclass(kind, FolderConfig):
        raise TypeError(
            f"kind is {short(kind)}; SearchConfig, StudyConfig or TrainConfig is needed"
        )
    check_type("settings", settings, Mapping)
    hints, known = hints_of(kind), {f.name for f in fields(kind)}
    values: dict[str, Any] = {}
    for name, value in settings.items():
        if name not in known:
            close = difflib.get_close_matches(str(name), known, 1)
            hint = f"; did you mean {close[0]}?" if close else "."
            raise ConfigError(
                f"unknown setting {short(name)}{hint} Allowed: {', '.join(sorted(known))}"
            )
        # Larger integers are out of all bounds, and would not fit into a float.
        is_whole = type(value) is int and abs(value) < 1 << 53
        values[name] = float(value) if is_whole and float in hints[name] else value
    config = kind(**values)
    config.validate()
    return config


@typed
def read_settings(path: Path) -> dict[str, Any]:
    """The settings of a YAML or JSON file; ConfigError says why it holds none."""
    try:
        return read_settings_text(path)
    except ValueError as error:
        raise ConfigError(f"config file {error}") from error


@typed
def config_text(config: FolderConfig) -> str:
    return json.dumps(asdict(config), indent=2) + "\n"
