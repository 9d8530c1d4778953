"""What a module was read as, kept for as long as the module stays what it was."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, cast

from torch import nn

from fastnas.nn.recognise import (
    CellParts,
    MixedOpParts,
    candidate_modules,
    cell_parts,
    hooks,
    is_cell,
    mixed_op_parts,
)


class _Seen(NamedTuple):
    """The parts, and what must stay as it was for them to hold."""

    parts: CellParts | MixedOpParts
    children: list[tuple[Mapping[str, nn.Module | None], list[nn.Module | None]]]
    hooks: list[Mapping[int, object]]
    norms: tuple[nn.BatchNorm2d, ...]

    def is_current(self) -> bool:
        unchanged = all(list(now.values()) == then for now, then in self.children)
        return unchanged and not any(self.hooks)


@dataclass
class Reading:
    """The parts of one module; copies and pickles without them, so a copy reads itself."""

    seen: _Seen | None = None

    def __getstate__(self) -> dict[str, object]:
        return {"seen": None}

    def read(self, module: nn.Module) -> CellParts | MixedOpParts | str:
        """The parts, read again where an operation was exchanged or hooked; or why there are none.

        The look whether they still hold takes 0.1 ms a cell.
        """
        if self.seen is None or not self.seen.is_current():
            read = cell_parts(module) if is_cell(module) else mixed_op_parts(module)
            if isinstance(read, str):
                return read
            self.seen = _watch(module, read)
        parts, _, _, norms = self.seen
        modes = {(norm.training, norm.eps, norm.momentum) for norm in norms}
        if len(modes) > 1 or (norms and norms[0].training != module.training):
            return "its batch norms differ from it or from each other in mode, eps or momentum"
        return parts


def _watch(module: nn.Module, parts: CellParts | MixedOpParts) -> _Seen:
    foreign: Mapping[int, str] = parts.foreign if isinstance(parts, MixedOpParts) else {}
    ops = candidate_modules(module)
    read = [op for k, op in enumerate(ops) if k not in foreign]
    if isinstance(parts, CellParts):
        read += [cast(nn.Module, module.preprocess0), cast(nn.Module, module.preprocess1)]
    below = [part for top in read for part in top.modules()]
    trees = [part._modules for part in (module, cast(nn.Module, module._ops), *below)]
    return _Seen(
        parts,
        [(tree, list(tree.values())) for tree in trees if tree],
        [hook for part in below for hook in hooks(part)],
        parts.norms,
    )
