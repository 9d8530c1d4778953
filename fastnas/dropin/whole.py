"""Replaces the forwards of whole cells, and of mixed ops none of whose candidates is recognised."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

from torch import Tensor, nn

from fastnas.dropin.cells import cell_parts, is_cell
from fastnas.dropin.checked import Checked, Parts, Reader, SumParts, parts_of, sum_parts
from fastnas.dropin.equivalence import disagreement, faint, random_inputs, with_zeros
from fastnas.dropin.forwards import WholeSettings, cell_forward, sum_forward
from fastnas.dropin.groups import Trials
from fastnas.dropin.tally import Site, Tally
from fastnas.nn.parts import candidate_modules
from fastnas.nn.reading import Reading
from fastnas.nn.run import can_run


class _Way(NamedTuple):
    """Holds a forward for a module, what reads the parts that it fuses, and those."""

    forward: Callable[..., Tensor]
    reader: Callable[[nn.Module], Parts | str]
    parts: Parts
    what: str


def _way(module: nn.Module) -> _Way | str:
    """Returns the forward that may replace a module's own, or why there is none."""
    if not is_cell(module):
        sums, ops = sum_parts(module), candidate_modules(module)
        normed = len(sums.norms)
        what = f"mixed_norm_sum, {normed} of them with batch norm" if normed else "mixed_sum"
        return _Way(sum_forward, sum_parts, sums, f"{len(ops)} candidates: {what}")
    parts = cell_parts(module)
    if isinstance(parts, str):
        return parts
    size = f"{parts.nodes} nodes, {len(parts.edges)} edges"
    candidates = len(parts.edges[0].candidates)
    what = f"cell of {size}, {candidates} candidates: mixed_edges"
    return _Way(cell_forward, cell_parts, parts, what)


def replace_forward(
    module: nn.Module,
    site: Site,
    memory: str | None,
    backend: str | None,
    trials: Trials | None,
    outermost: bool,
) -> tuple[str | None, str]:
    """Returns what computes the module from now on (None: its own forward) and why not faster.

    Args:
        trials: tries it out; None: it is taken for what its structure says.
    """
    way = _way(module)
    if isinstance(way, str):
        return None, way
    checked = Checked(parts_of(module, way.parts))
    reading = Reading(Reader(way.reader, checked))
    settings = WholeSettings(site, memory, backend, reading, outermost=outermost)
    reason = _refusal(module, way, settings, trials)
    if reason is not None:
        return None, reason
    # A partial of a module-level function, unlike a closure, can be copied and pickled with the
    # network.
    module.forward = functools.partial(way.forward, module, settings)
    zeros = "; by its own forward where a weight is 0" if settings.skips_zeros else ""
    return way.what + zeros, ""


def _refusal(
    module: nn.Module, way: _Way, settings: WholeSettings, trials: Trials | None
) -> str | None:
    """Says why the module's own forward cannot be replaced by this one, or None."""
    inputs = random_inputs(module, way.parts)
    signature = inspect.signature(type(module).forward)
    try:
        # An own signature (extra arguments, another order) is refused before anything runs.
        signature.bind(module, *inputs)
    except TypeError:
        needed = "(s0, s1, weights)" if is_cell(module) else "(x, weights)"
        return f"its forward takes {signature}; {needed} is needed"
    if not isinstance(way.parts, SumParts):
        # inputs[-2] is s1.
        reason = can_run(way.parts, inputs[-2], True, settings.backend)
        if reason is not None:
            return reason
    if trials is None:
        return None

    def trial() -> _Found:
        return _difference(module, way, settings, inputs)

    # A mixed op that is summed has candidates of which nothing is known: each is tried out.
    found = trials.once(cell_parts, module, trial) if is_cell(module) else trial()
    settings.skips_zeros = found.skips_zeros
    return found.reason


class _Found(NamedTuple):
    """Says where two forwards differ, or None, and whether the own one skips weights of 0."""

    reason: str | None
    skips_zeros: bool


def _difference(
    module: nn.Module, way: _Way, settings: WholeSettings, inputs: Sequence[Tensor]
) -> _Found:
    """Compares the forwards, if need be with one that looks for weights of 0 in each call."""

    def forward(m: nn.Module, *x: Tensor) -> Tensor:
        # m is a copy: parts that were read before are those of the original.
        reading = replace(settings.reading, seen={})
        trial = replace(settings, reading=reading, strict=True, site=Site("", Tally()))
        return way.forward(m, trial, *x)

    *x, w = inputs
    # Some public forwards leave out candidates of weight 0, whose norms then stand still. If the
    # two agree only where no weight is 0, each call has to look for zeros.
    for skips_zeros in (False, True):
        settings.skips_zeros = skips_zeros
        trials = {"": inputs, " at weights near 0": (*x, faint(w, zeros=not skips_zeros))}
        if not skips_zeros and w.dim() == 1:
            # Nobody sees whether a candidate that gives zeros is left out: each has its turn.
            trials |= {f" at 0 from {k}": (*x, with_zeros(w, k)) for k in range(min(2, len(w)))}
        reason = disagreement(module, forward, trials)
        if reason is None:
            break
    return _Found(reason, settings.skips_zeros)
