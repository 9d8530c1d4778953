"""Finds the candidates of a network, wherever they sit, and gives them their forwards."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fastnas.dropin.around import Around, around_forward
from fastnas.dropin.candidates import (
    Settings,
    candidate_forward,
    norm_forward,
    preprocess_forward,
)
from fastnas.dropin.checked import Checked, Reader, frozen_settings
from fastnas.dropin.equivalence import device_of, disagreement, dtype_of
from fastnas.dropin.plans import Plans
from fastnas.dropin.recognise import nested_candidate, pool_norm, preprocess
from fastnas.dropin.replacements import has_foreign_forward
from fastnas.dropin.tally import Site, Tally
from fastnas.dropin.waiting import real
from fastnas.nn.dag import Dag
from fastnas.nn.facts import behaviour
from fastnas.nn.mixed_op import MixedOp
from fastnas.nn.parts import Candidate, Preprocess
from fastnas.nn.reading import Reading

_CONTAINERS = (nn.ModuleList, nn.ModuleDict)
"""They have no forward: what lies in them belongs to the module around them."""
R = TypeVar("R")
Structure = Callable[[nn.Module], Any]
"""Reads a module: a `Candidate` or `Preprocess`, or why it is none."""


@dataclass
class Group:
    """Holds the candidates that lie in one module.

    Args:
        holder: the module in whose forward they are called.
        name: its name in the network.
        found: name of each candidate in the holder, to the module.
        foreign: name of each module beside them, to why it is none.
    """

    holder: nn.Module
    name: str
    found: dict[str, nn.Module] = field(default_factory=dict)
    foreign: dict[str, str] = field(default_factory=dict)

    @property
    def is_fused(self) -> bool:
        """Tells whether there is a batch norm to fuse."""
        return any(map(_has_norm, self.found.values()))

    @property
    def what(self) -> str:
        count = len(self.found) + len(self.foreign)
        rest = "; ".join(f"{name.split('.')[-1]}: {why}" for name, why in self.foreign.items())
        if not rest:
            return f"{count} candidates: mixed_edges"
        return f"{len(self.found)} of {count} candidates: mixed_edges; by its module {rest}"


class Trials:
    """Runs modules by their own and by the fused forward, once for all of a kind and settings."""

    def __init__(self) -> None:
        self.results: dict[Hashable, Any] = {}

    def __deepcopy__(self, _: object) -> Trials:
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {"results": {}}  # functions that were tried need not be those that are loaded

    def why_not(
        self, module: nn.Module, structure: Structure, forward: Callable[..., Any]
    ) -> str | None:
        """Says where the two forwards of a module differ, or None."""
        return self.once(structure, module, lambda: _difference(module, structure, forward))

    def once(self, kind: Hashable, module: nn.Module, trial: Callable[[], R]) -> R:
        """Returns what a trial of the module, or of one like it, has found."""
        key = (kind, *_likeness(module))
        if key not in self.results:
            self.results[key] = trial()
        result: R = self.results[key]
        return result


def _likeness(module: nn.Module) -> Iterator[Hashable]:
    """Yields all that may make a module's forward another one's: classes, functions, settings."""
    for name, part in module.named_modules():
        tensors = tuple(
            (n, t is None) for n, t in (*part._parameters.items(), *part._buffers.items())
        )
        yield name, type(part), behaviour(type(part)), tensors, frozen_settings(part)
    first = next(module.parameters(), None)
    yield None if first is None else (first.device, first.dtype)


def _difference(module: nn.Module, structure: Structure, forward: Callable[..., Any]) -> str | None:
    channels = next(
        (
            m.in_channels if isinstance(m, nn.Conv2d) else m.num_features
            for m in module.modules()
            if isinstance(m, nn.Conv2d | nn.BatchNorm2d)
        ),
        8,
    )
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, channels, 8, 8, generator=generator, dtype=torch.float64, device="cpu")
    x = x.to(device_of(module), dtype_of(module))
    checked = Checked(module.modules())

    def fused(m: nn.Module, x: Tensor) -> Tensor:
        reading = Reading(Reader(structure, checked))
        settings = Settings(Site("", Tally()), "lean", None, reading, strict=True)
        y: Tensor = real(forward(m, settings, x))
        return y

    # None stands for arguments without a default, as in calls.
    parameters = list(inspect.signature(type(module).forward).parameters.values())[2:]
    further = sum(p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters)
    return disagreement(module, fused, {"": (x,)}, further)


def find_groups(model: nn.Module, trials: Trials | None) -> list[Group]:
    """Finds modules that have candidates in them, or a list of what may be such.

    Args:
        trials: tries each out; None: it is taken for what its structure says.
    """
    groups: dict[nn.Module, Group] = {}
    _walk(model, "", model, "", trials, groups)
    return list(groups.values())


def _walk(
    module: nn.Module,
    name: str,
    holder: nn.Module,
    holder_name: str,
    trials: Trials | None,
    groups: dict[nn.Module, Group],
) -> None:
    # Those of fastnas are fused already.
    if isinstance(module, Dag | MixedOp):
        return
    if not isinstance(module, _CONTAINERS):
        holder, holder_name = module, name
    every = dict(module.named_children())
    children = {k: child for k, child in every.items() if not isinstance(child, _CONTAINERS)}
    read = {k: _read(child, trials) for k, child in children.items()}
    found = [k for k, reason in read.items() if reason is None]
    # One alone, beside no list, is no choice. Nor are those that prepare the inputs of a cell.
    choices = [k for k in found if isinstance(preprocess(children[k]), str)]
    alone = not isinstance(module, _CONTAINERS) and (len(found) < 2 or not choices)
    if found and alone and not _lists_candidates(module, trials):
        found = []
    if found or (isinstance(module, _CONTAINERS) and children):
        group = groups.setdefault(holder, Group(holder, holder_name))
        group.found |= {f"{name}.{k}": children[k] for k in found}
        # Beside candidates in a list, what is none is a foreign candidate. Beside those that lie in
        # their holder itself it may be anything.
        if isinstance(module, _CONTAINERS):
            group.foreign |= {f"{name}.{k}": str(r) for k, r in read.items() if r is not None}
    for k, child in every.items():
        if k not in found:
            _walk(child, f"{name}.{k}".lstrip("."), holder, holder_name, trials, groups)


def _lists_candidates(module: nn.Module, trials: Trials | None) -> bool:
    """Tells whether a child of the module is a list with a candidate in it."""
    lists = [child for child in module.children() if isinstance(child, _CONTAINERS)]
    return any(_read(part, trials) is None for held in lists for part in held.children())


def _read(module: nn.Module, trials: Trials | None) -> str | None:
    """Says why a module is no candidate, or None."""
    found = nested_candidate(module)
    if isinstance(found, str):
        return found
    if "forward" in vars(module):
        return "its instance has a forward of its own"
    if trials is None:
        return None
    reasons = (trials.why_not(m, nested_candidate, candidate_forward) for m in _both_modes(module))
    return next((reason for reason in reasons if reason is not None), None)


def _both_modes(module: nn.Module) -> list[nn.Module]:
    """Returns the module, and a copy in the other mode if that changes more than the mode."""
    if all(type(part).train is nn.Module.train for part in module.modules()):
        return [module]
    return [module, copy.deepcopy(module).train(not module.training)]


def fuse_groups(
    model: nn.Module,
    groups: list[Group],
    memory: str | None,
    backend: str | None,
    tally: Tally,
    trials: Trials | None,
) -> None:
    """Gives candidates, what prepares their cells' inputs, and the modules around, their forwards.

    Args:
        trials: as in `find_groups`.
    """
    names = {module: name for name, module in model.named_modules()}

    def give(module: nn.Module, forward: Callable[..., Any], structure: Structure) -> None:
        compared = [part for m in _both_modes(module) for part in m.modules()]
        reading = Reading(Reader(structure, Checked(compared)))
        settings = Settings(Site(names[module], tally), memory, backend, reading)
        module.forward = functools.partial(forward, module, settings)

    around: set[nn.Module] = set()
    holders: set[nn.Module] = set()
    for group in groups:
        if not group.is_fused or has_foreign_forward(group.holder):
            continue
        holders.add(group.holder)
        for module in group.found.values():
            give(module, candidate_forward, nested_candidate)
        parts = group.name.split(".") if group.name else []
        around |= {model.get_submodule(".".join(parts[:i])) for i in range(len(parts) + 1)}
        read = [nested_candidate(module) for module in group.found.values()]
        if any(isinstance(found, Candidate) and found.is_open for found in read):
            for norm in group.holder.children():
                if isinstance(norm, nn.BatchNorm2d) and "forward" not in vars(norm):
                    give(norm, norm_forward, pool_norm)
    for module in around:
        for child in module.children():
            if "forward" in vars(child) or not isinstance(preprocess(child), Preprocess):
                continue
            if trials is None or trials.why_not(child, preprocess, preprocess_forward) is None:
                give(child, preprocess_forward, preprocess)
        has_forward = type(module).forward is not nn.Module.forward
        if "forward" not in vars(module) and has_forward:
            # Without a trial every call runs the module's own forward.
            plans = Plans() if module in holders and trials is not None else None
            around_it = Around(module is model, plans)
            module.forward = functools.partial(around_forward, module, around_it)


def _has_norm(module: nn.Module) -> bool:
    return any(isinstance(part, nn.BatchNorm2d) for part in module.modules())


def nearest_miss(model: nn.Module) -> str:
    """Names what looks most like candidates, for an error that found none; "" if nothing does."""
    best, count = "", 1
    for name, module in model.named_modules():
        if isinstance(module, _CONTAINERS):
            alike = [child for child in module.children() if _has_norm(child)]
            if len(alike) > count:
                reason = nested_candidate(alike[0])
                best, count = f"; {name} looks like candidates, but the first: {reason}", len(alike)
    return best
