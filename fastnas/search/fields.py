"""Brings settings from flags, files and Python into a config, and holds those of all runs."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypeVar

from fastnas.bounds import Bounds, whole
from fastnas.checks import check_type, short, typed
from fastnas.options import Made, Optioned, check_options, make, option, options_of, types_of
from fastnas.search.settings_file import read_settings_text

SEEDS = whole(0, 2**63 - 1)
"""So that a run may count on from its seed, for what torch takes as one."""


class ConfigError(ValueError):
    """Says in one line which setting is wrong, what was given and what is allowed."""


@dataclass(frozen=True)
class FolderConfig:
    """Holds the settings that all runs share.

    Attributes:
        options: those given of the method, or the evaluator, that the run chooses. Flags and files
            have them beside the other settings.
    """

    families: ClassVar[tuple[type[Optioned], ...]] = ()
    """What a run of this kind chooses by name."""

    out: str = option("runs/run", "folder of the run; everything it writes goes there")
    seed: int = option(0, "seed of everything random", SEEDS)
    options: Mapping[str, Any] = field(default_factory=dict)

    def validate(self) -> None:
        """Raises ConfigError for values that no run can have."""
        try:
            check_options(self)
        except (TypeError, ValueError) as error:
            raise ConfigError(str(error)) from error
        known = {name for family in self.families for name in _owners(family)}
        for name in self.options:
            if name not in known:
                raise ConfigError(f"{short(name)} is no option of a run of this kind")

    def settings(self) -> dict[str, Any]:
        """Returns all settings by the names that flags and files have for them."""
        own = {name: getattr(self, name) for name in options_of(type(self))}
        return {**own, **self.options}

    def made(self, family: type[Made], name: str, published: Mapping[str, Any]) -> Made:
        """Builds the method, or the evaluator, of that name with the options given.

        Args:
            published: options that take the place of its own defaults where none are given.
        """
        owners = _owners(family)
        given = {key: value for key, value in self.options.items() if key in owners}
        try:
            return make(family, name, {**published, **given})
        except (TypeError, ValueError) as error:
            raise ConfigError(str(error)) from error


class Setting(NamedTuple):
    """Describes a setting as flags and files have it.

    Attributes:
        types: of its values, the first of which is that of a flag.
        default: in words, empty where the help text tells.
    """

    text: str
    types: tuple[type, ...]
    bounds: Bounds | None
    choices: Sequence[str] | None
    default: str


def settings_of(kind: type[FolderConfig]) -> dict[str, Setting]:
    """Returns the settings of a kind of run, with the options of all that it may choose.

    Raises:
        TypeError: an option has the name of a setting, or one of another type.
    """
    types = types_of(kind)
    found = {
        name: Setting(
            f.metadata["help"], types[name], f.metadata["bounds"], f.metadata["choices"],
            "" if f.default in (None, "") else str(f.default),
        )
        for name, f in options_of(kind).items()
    }  # fmt: skip
    for family in kind.families:
        for name, owners in _owners(family).items():
            if name in found:
                raise TypeError(f"{name} of {family.what} {owners[0].name} is a setting of the run")
            found[name] = _shared_option(name, owners)
    return found


def _owners(family: type[Optioned]) -> dict[str, list[type[Optioned]]]:
    """Returns, for each option in a family, the members that have it."""
    found: dict[str, list[type[Optioned]]] = {}
    for _, member in sorted(family.table.items()):
        for name in options_of(member):
            found.setdefault(name, []).append(member)
    return found


def _shared_option(name: str, owners: Sequence[type[Optioned]]) -> Setting:
    """Returns the one setting that stands for the option of that name of all its owners."""
    first = owners[0]
    types, metadata = types_of(first)[name], options_of(first)[name].metadata
    for other in owners:
        # One flag stands for the options of all owners, and a flag has one type.
        if types_of(other)[name] != types:
            raise TypeError(f"{name} has other types in {first.name} and in {other.name}")
    defaults = {owner.name: options_of(owner)[name].default for owner in owners}
    told = {str(value) for value in defaults.values() if value is not None}
    each = ", ".join(f"{owner} {value}" for owner, value in defaults.items())
    return Setting(
        f"{', '.join(defaults)}: {metadata['help']}", types, metadata["bounds"],
        metadata["choices"], each if len(told) > 1 else "".join(told),
    )  # fmt: skip


Config = TypeVar("Config", bound=FolderConfig)


def make_config(kind: type[Config], settings: Mapping[str, Any]) -> Config:
    """Builds a checked config from plain settings, options of its method among them.

    Raises:
        ConfigError: naming what is unknown or wrong.
        TypeError: `kind` is no class of configs, or `settings` no mapping.
    """
    if not isinstance(kind, type) or not issubclass(kind, FolderConfig):
        raise TypeError(
            f"kind is {short(kind)}; SearchConfig, MobileConfig, StudyConfig or TrainConfig is"
            " needed"
        )
    check_type("settings", settings, Mapping)
    known, own = settings_of(kind), options_of(kind)
    values: dict[str, Any] = {}
    options: dict[str, Any] = {}
    for name, value in settings.items():
        if name not in known:
            close = difflib.get_close_matches(str(name), known, 1)
            hint = f"; did you mean {close[0]}?" if close else "."
            raise ConfigError(
                f"unknown setting {short(name)}{hint} Allowed: {', '.join(sorted(known))}"
            )
        # Larger integers are out of all bounds, and would not fit into a float. `type` is asked and
        # not isinstance, to which True is an int: it would become a rate of 1.0.
        is_whole = type(value) is int and abs(value) < 1 << 53
        given = float(value) if is_whole and float in known[name].types else value
        if name in own:
            values[name] = given
        elif given is not None:  # null in a file: left to the method
            options[name] = given
    config = kind(**values, options=options)
    config.validate()
    return config


@typed
def read_settings(path: Path) -> dict[str, Any]:
    """Reads the settings of a YAML or JSON file; ConfigError says why it holds none."""
    try:
        return read_settings_text(path)
    except ValueError as error:
        raise ConfigError(f"config file {error}") from error


@typed
def config_text(config: FolderConfig) -> str:
    """Returns a config as JSON, which `read_settings` reads."""
    return json.dumps(config.settings(), indent=2) + "\n"
