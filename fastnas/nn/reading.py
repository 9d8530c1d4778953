"""What a module was read as, kept for as long as the module stays what it was."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, TypeVar, cast

import torch
from torch import nn

from fastnas.nn.facts import Facts, behaviour, guard_compiled, has_global_hooks
from fastnas.nn.final_norms import SumParts, passed_over
from fastnas.nn.recognise import (
    CellParts,
    MixedOpParts,
    candidate_modules,
    cell_parts,
    is_cell,
    mixed_op_parts,
)
from fastnas.reference import primitives

Parts = CellParts | MixedOpParts | SumParts
P = TypeVar("P", bound=Parts)

_KNOWN = tuple(
    behaviour(kind)
    for kind in (
        nn.ModuleList, nn.Sequential, nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.MaxPool2d,
        nn.AvgPool2d, nn.Identity, primitives.Identity, primitives.Zero, primitives.ReLUConvBN,
        primitives.DilConv, primitives.SepConv, primitives.FactorizedReduce,
    )
)  # fmt: skip
"""Of the classes known to do what the structure of their modules says, and to read no other setting
than those that `recognise` looks at."""

_OF_TORCH = {*vars(nn.Module()), "forward"}
"""Attributes of a module that are no settings of its class."""


def structure(module: nn.Module) -> CellParts | MixedOpParts | str:
    """The parts of a cell or of a mixed op, or why it is neither."""
    return cell_parts(module) if is_cell(module) else mixed_op_parts(module)


def parts_of(module: nn.Module, found: Parts | str) -> Iterator[nn.Module]:
    """The modules that were read: all but the foreign candidates, which run by themselves."""
    if isinstance(found, SumParts):
        yield module
        yield cast(nn.Module, module._ops)
        for k in found.norms:
            yield from passed_over(candidate_modules(module)[k])
        return
    foreign = found.foreign if isinstance(found, MixedOpParts) else {}
    ops = candidate_modules(module)
    skipped = {part for k in foreign for part in ops[k].modules()}
    yield from (part for part in module.modules() if part not in skipped)


def _outlines(module: nn.Module) -> Iterator[nn.Module]:
    """The mixed ops of a cell, or the one, with their lists of candidates, and the cell."""
    yield module
    yield cast(nn.Module, module._ops)
    for op in candidate_modules(module) if is_cell(module) else ():
        yield op
        yield from filter(None, [op._modules.get("_ops")])


def _frozen(value: object) -> Hashable:
    """A setting as a value, where it is plain; of other objects the name, or that of their type."""
    if value is None or isinstance(value, bool | int | float | str):
        return type(value), value
    if isinstance(value, list | tuple):
        return type(value), tuple(_frozen(item) for item in value)
    return getattr(value, "__qualname__", type(value).__qualname__)


def _settings(module: nn.Module) -> dict[str, Hashable]:
    return {name: _frozen(v) for name, v in vars(module).items() if name not in _OF_TORCH}


_Pickled = tuple[list[type[nn.Module]], list[tuple[type[nn.Module], dict[str, Hashable]]]]


class Checked:
    """The functions of classes, and the settings, with which a module was run and compared.

    Copies are the same object; pickled, the functions are those that the classes have on loading.
    """

    def __init__(self, parts: Iterable[nn.Module] = ()) -> None:
        own = [part for part in parts if behaviour(type(part)) not in _KNOWN]
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
        """Which of the parts has a forward, or settings, of which nothing is known."""
        for part in parts:
            kind = type(part)
            runs = behaviour(kind)
            if runs in _KNOWN:
                continue
            if self.behaviours.get(kind) != runs:
                return f"{kind.__name__} has a forward that was not compared with the fused ops"
            known = [settings for of, settings in self.settings if of is kind]
            new = min((_new(kind, _settings(part), settings) for settings in known), key=len)
            if new:
                return f"{kind.__name__} was compared with other settings: {', '.join(new)}"
        return None


def _new(
    kind: type[nn.Module], settings: dict[str, Hashable], known: dict[str, Hashable]
) -> list[str]:
    """Names of the settings that are not as they were known.

    Private ones that were not there are no settings, but for those in place of something of the
    class: torch and other libraries leave such marks.
    """
    names = [n for n in settings if n in known or not n.startswith("_") or hasattr(kind, n)]
    gone = [name for name in known if name not in settings]
    return gone + [name for name in names if name not in known or settings[name] != known[name]]


class _Seen(NamedTuple):
    found: Parts | str
    facts: Facts


@dataclass
class Reading(Generic[P]):
    """The parts of one module; copies and pickles without them, so a copy reads itself.

    Args:
        reader: reads the module, or says why it cannot.
        checked: what the module was compared with; None: it is a module of fastnas, whose
            settings are looked at on every call.
    """

    reader: Callable[[nn.Module], P | str]
    checked: Checked | None = None
    seen: dict[bool, _Seen] = field(default_factory=dict)
    """By mode, as a search changes between the two."""
    compiled: list[Facts] = field(default_factory=list)
    """Those with which compiled code was traced."""

    def __getstate__(self) -> dict[str, object]:
        return {"reader": self.reader, "checked": self.checked, "seen": {}, "compiled": []}

    def read(self, module: nn.Module) -> P | str:
        """The parts, read again where the module has changed; or why there are none."""
        reason = _look(self, module)
        return cast(P, self.seen[module.training].found) if reason is None else reason

    def _read(self, module: nn.Module) -> _Seen:
        found: Parts | str = self.reader(module)
        parts = list(parts_of(module, found))
        outlines = [] if self.checked is not None else list(_outlines(module))
        whole = [part for part in parts if part not in outlines]
        if not isinstance(found, str):
            reason = (self.checked or Checked()).why_not(whole) or _other_mode(module, found)
            found = found if reason is None else reason
        return _Seen(found, Facts(whole, outlines))


class HasReading:
    """Gives a module of fastnas its `Reading` at the moment it is made, or copied.

    torch.compile cannot follow the making of one while it traces.
    """

    _reading: Reading[CellParts | MixedOpParts]

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        made = super().__new__(cls)
        vars(made)["_reading"] = Reading(structure)
        return made


def _look(reading: Reading[Any], module: nn.Module) -> str | None:
    """Brings `seen` up to date; why the module cannot be fused, or None."""
    if has_global_hooks():
        return "hooks are registered for all modules"
    seen = reading.seen.get(module.training)
    if seen is None or not seen.facts.hold():
        seen = reading.seen[module.training] = reading._read(module)
    if torch.compiler.is_compiling():
        guard_compiled(seen.facts)
        reading.compiled.append(seen.facts)
    return seen.found if isinstance(seen.found, str) else None


# torch.compile does not follow it but takes the answer that it gives while a graph is traced.
_look._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _other_mode(module: nn.Module, found: Parts) -> str | None:
    norms = () if isinstance(found, SumParts) else found.norms
    if any(norm.training != module.training for norm in norms):
        return "its batch norms differ from it or from each other in mode"
    return None
