"""Keeps what a module was read as, for as long as the module stays what it was."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, TypeVar, cast

import torch
from torch import nn

from fastnas.nn.facts import Facts, guard_compiled, has_global_hooks

P = TypeVar("P")
"""What a reader finds in a module."""
Reader = Callable[[nn.Module], tuple[P | str, Facts]]
"""Reads a module: its parts, or why there are none, and the facts for which that holds."""


class Seen(NamedTuple):
    """Holds what was read, and under which facts."""

    found: object
    facts: Facts


@dataclass
class Reading(Generic[P]):
    """Keeps the parts of one module; copies and pickles come without, so a copy reads itself."""

    reader: Reader[P]
    seen: dict[bool, Seen] = field(default_factory=dict)
    """By mode, as a search changes between the two."""
    compiled: list[Facts] = field(default_factory=list)
    """Those with which compiled code was traced."""

    def __getstate__(self) -> dict[str, object]:
        return {"reader": self.reader, "seen": {}, "compiled": []}

    def read(self, module: nn.Module) -> P | str:
        """Returns the parts, read again where the module has changed; or why there are none."""
        reason = _look(self, module)
        return cast(P, self.seen[module.training].found) if reason is None else reason


def _look(reading: Reading[P], module: nn.Module) -> str | None:
    """Brings `seen` up to date; why the module cannot be fused, or None."""
    if has_global_hooks():
        return "hooks are registered for all modules"
    seen = reading.seen.get(module.training)
    # Facts are compared in every call, and the module is read again only where one fails.
    if seen is None or not seen.facts.hold():
        seen = reading.seen[module.training] = Seen(*reading.reader(module))
    if torch.compiler.is_compiling():
        guard_compiled(seen.facts)
        # The guard holds its facts weakly. Here they live as long as the module does.
        reading.compiled.append(seen.facts)
    return seen.found if isinstance(seen.found, str) else None


# torch.compile does not follow it but takes the answer that it gives while a graph is traced.
_look._dynamo_marked_constant = True  # type: ignore[attr-defined]
