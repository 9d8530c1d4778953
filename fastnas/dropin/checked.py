"""Reads the modules of a foreign network, and holds them to what they were compared with."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass
from typing import cast

from torch import nn

from fastnas.nn.built import KNOWN
from fastnas.nn.facts import Facts, behaviour
from fastnas.nn.final_norms import Norms, final_norm, passed_over
from fastnas.nn.parts import Candidate, CellParts, Preprocess, candidate_modules

OF_TORCH = {*vars(nn.Module()), "forward"}
"""Attributes of a module that are no settings of its class."""


@dataclass(frozen=True)
class SumParts:
    """Holds the batch norms that candidates of a mixed op end in."""

    norms: Norms


def sum_parts(module: nn.Module) -> SumParts:
    """Reads a mixed op whose candidates that end in a batch norm run their layers in order."""
    # Whether they do run in order is not read but tried out: `accelerate` runs and compares.
    found = {k: final_norm(op) for k, op in enumerate(candidate_modules(module))}
    return SumParts({k: norm for k, norm in found.items() if norm is not None})


Parts = CellParts | SumParts
Read = Parts | Candidate | Preprocess
"""What there are readers of."""


def parts_of(module: nn.Module, found: Read | str) -> Iterator[nn.Module]:
    """Yields the modules that were read: of a sum, not what its candidates run by themselves."""
    if isinstance(found, SumParts):
        yield module
        yield cast(nn.Module, module._ops)
        for k in found.norms:
            yield from passed_over(candidate_modules(module)[k])
        return
    yield from module.modules()


def is_setting(value: object) -> bool:
    """Tells whether a value can be compared with what it was: plain, or a list of such."""
    if isinstance(value, list | tuple):
        return all(map(is_setting, value))
    plain = value is None or isinstance(value, bool | int | float | str | type)
    return plain or callable(value)


def _frozen(value: object) -> Hashable:
    """Returns a plain setting as a value; of other objects the name, or that of their type."""
    if value is None or isinstance(value, bool | int | float | str):
        return type(value), value
    if isinstance(value, list | tuple):
        return type(value), tuple(_frozen(item) for item in value)
    # Objects are compared by the name of their type: they may be made anew in each epoch, and their
    # == may be anything.
    return getattr(value, "__qualname__", type(value).__qualname__)


def _settings(module: nn.Module) -> dict[str, Hashable]:
    return {name: _frozen(v) for name, v in vars(module).items() if name not in OF_TORCH}


def frozen_settings(module: nn.Module) -> frozenset[tuple[str, Hashable]]:
    """Returns all settings of a module as values that can be compared and hashed."""
    return frozenset(_settings(module).items())


_Pickled = tuple[list[type[nn.Module]], list[tuple[type[nn.Module], dict[str, Hashable]]]]


class Checked:
    """Keeps the functions of classes, and the settings, with which a module was compared.

    Copies are the same object; pickled, the functions are those that the classes have on loading.
    """

    def __init__(self, parts: Iterable[nn.Module] = ()) -> None:
        # The layers tell everything of classes of torch and of fastnas; the user's may hide a scale
        # or a branch in an attribute.
        own = [part for part in parts if behaviour(type(part)) not in KNOWN]
        self.behaviours = {type(part): behaviour(type(part)) for part in own}
        self.settings = [(type(part), _settings(part)) for part in own]

    def __deepcopy__(self, _: object) -> Checked:
        return self

    def __getstate__(self) -> _Pickled:
        return list(self.behaviours), self.settings

    def __setstate__(self, state: _Pickled) -> None:
        kinds, self.settings = state
        self.behaviours = {kind: behaviour(kind) for kind in kinds}

    def why_not(self, parts: Iterable[nn.Module]) -> str | None:
        """Says which of the parts has a forward, or settings, of which nothing is known."""
        for part in parts:
            kind = type(part)
            runs = behaviour(kind)
            if runs in KNOWN:
                continue
            if self.behaviours.get(kind) != runs:
                return f"{kind.__name__} has a forward that was not compared with the fused ops"
            # The module need not be the one that was compared: any of its class with such settings
            # will do.
            known = [settings for of, settings in self.settings if of is kind]
            new = min((_new(kind, _settings(part), settings) for settings in known), key=len)
            if new:
                return f"{kind.__name__} was compared with other settings: {', '.join(new)}"
        return None


def _new(
    kind: type[nn.Module], settings: dict[str, Hashable], known: dict[str, Hashable]
) -> list[str]:
    """Returns the names of the settings that are not as they were known.

    Private ones that were not there are no settings, but for those in place of something of the
    class: torch and other libraries leave such marks.
    """
    names = [n for n in settings if n in known or not n.startswith("_") or hasattr(kind, n)]
    gone = [name for name in known if name not in settings]
    return gone + [name for name in names if name not in known or settings[name] != known[name]]


@dataclass(frozen=True)
class Reader:
    """Reads a module, unless it, or a class of its parts, is not what was compared.

    Args:
        structure: reads its parts, or says why it cannot.
        checked: what the module was compared with.
    """

    structure: Callable[[nn.Module], Read | str]
    checked: Checked

    def __call__(self, module: nn.Module) -> tuple[Read | str, Facts]:
        found = self.structure(module)
        parts = list(parts_of(module, found))
        if not isinstance(found, str):
            # The facts hold of the refusal as well: as long as nothing changes it is not looked at
            # again.
            found = self.checked.why_not(parts) or _other_mode(module, found) or found
        return found, Facts(parts)


def _other_mode(module: nn.Module, found: Read) -> str | None:
    norms = () if isinstance(found, SumParts) else found.norms
    modes = {norm.training for norm in norms}
    # All may be frozen, in a module that is in training.
    if len(modes) > 1 or (True in modes and not module.training):
        return "its batch norms differ from it or from each other in mode"
    return None
