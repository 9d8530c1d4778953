"""Lets the fused ops compute the cells and mixed ops of an existing network, in place."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastnas.backends import MEMORY
from fastnas.checks import typed
from fastnas.dropin.checked import Checked, Parts, Reader, SumParts, parts_of, sum_parts
from fastnas.dropin.equivalence import device_of, disagreement, dtype_of, faint, random_inputs
from fastnas.dropin.forwards import FORWARDS, Settings, cell_forward, edge_forward, sum_forward
from fastnas.dropin.recognise import cell_parts, is_cell, mixed_op_parts
from fastnas.nn.dag import Dag
from fastnas.nn.mixed_op import MixedOp
from fastnas.nn.parts import candidate_modules
from fastnas.nn.reading import Reading
from fastnas.nn.run import can_run
from fastnas.ops import mixed_sum


@dataclass(frozen=True)
class Report:
    """Tells what `accelerate` did; printed, it is a table.

    Args:
        replaced: name of each module with a new forward, and what computes it now.
        left: name of each module that keeps its own forward, and why. The mixed ops of a cell
            that was left are in either list for themselves.
    """

    replaced: list[tuple[str, str]] = field(default_factory=list)
    left: list[tuple[str, str]] = field(default_factory=list)

    def __str__(self) -> str:
        return "\n".join(
            line
            for title, rows in (("replaced", self.replaced), ("left", self.left))
            for line in (f"{title} ({len(rows)})", *_grouped(rows))
        )


def _grouped(rows: Sequence[tuple[str, str]]) -> Iterator[str]:
    """Yields a line for each text, with the first and last of the names that share it."""
    names: dict[str, list[str]] = {}
    for name, text in rows:
        # Names come in the order of the network, so the first and the last tell the range.
        names.setdefault(text, []).append(name)
    labels = {
        text: group[0] if len(group) == 1 else f"{group[0]} .. {group[-1]} ({len(group)})"
        for text, group in names.items()
    }
    width = max(map(len, labels.values()), default=0)
    return (f"  {label:<{width}}  {text}" for text, label in labels.items())


class _Way(NamedTuple):
    """Holds a forward for a module, what reads the parts that it fuses, and those."""

    forward: Callable[..., Tensor]
    reader: Callable[[nn.Module], Parts | str]
    parts: Parts
    what: str


def _ways(module: nn.Module) -> Iterator[_Way | str]:
    """Yields the forwards that may replace a module's own, fastest first, or why there is none."""
    if is_cell(module):
        parts = cell_parts(module)
        if isinstance(parts, str):
            yield parts
            return
        size = f"{parts.nodes} nodes, {len(parts.edges)} edges"
        candidates = len(parts.edges[0].candidates)
        # A cell is fused whole or not at all. Where it cannot be, its mixed ops are found after it,
        # one by one.
        what = f"cell of {size}, {candidates} candidates: mixed_edges"
        yield _Way(cell_forward, cell_parts, parts, what)
        return
    edge = mixed_op_parts(module)
    ops = candidate_modules(module)
    if isinstance(edge, str):
        yield edge
    elif not edge.norms:
        yield next(iter(edge.foreign.values()), "its candidates have no batch norm")
    elif not edge.foreign:
        yield _Way(edge_forward, mixed_op_parts, edge, f"{len(ops)} candidates: mixed_edges")
    else:
        # Foreign candidates (an own noisy skip) run beside one fused call of all the others.
        rest = "; ".join(f"{k}: {reason}" for k, reason in edge.foreign.items())
        fused = f"{len(ops) - len(edge.foreign)} of {len(ops)} candidates: mixed_edges"
        what = f"{fused}; the rest mixed_sum ({rest})"
        yield _Way(edge_forward, mixed_op_parts, edge, what)
    # The last resort, which runs every candidate by its module, works for any mixed op.
    sums = sum_parts(module)
    normed = len(sums.norms)
    what = f"mixed_norm_sum, {normed} of them with batch norm" if normed else "mixed_sum"
    yield _Way(sum_forward, sum_parts, sums, f"{len(ops)} candidates: {what}")


@typed
def accelerate(
    model: nn.Module, memory: str = "lean", backend: str | None = None, *, check: bool = True
) -> Report:
    """Lets the fused ops compute the cells and mixed ops of a DARTS-style network, in place.

    Looks for cells (`preprocess0`, `preprocess1`, a ModuleList `_ops` of mixed ops; called with
    s0, s1, weights) and, in what is no such cell, for mixed ops (a ModuleList `_ops`; called
    with x, weights), by what they are made of, not by class::

        report = fastnas.accelerate(network)
        print(report)

    Each gets a new `forward`, and that is all: modules, parameters, buffers, state-dict names,
    optimizers and hooks stay as they are, and so do the results, to rounding. A cell all of
    whose operations are those of DARTS runs fused as a whole. Of a mixed op, the operations of
    DARTS run fused; others (an own noisy skip connection) run by their own modules. Where none
    is of DARTS, the weighted sum is fused, with the batch norms that the operations end in.

    A call that the fused ops cannot serve (some batch norms frozen and others not, another
    device) runs the module's own forward and logs the reason once.
    Each call looks whether the module still is what was read: operations that were exchanged,
    hooked or set otherwise are read again, and where a class has another forward, or a module of
    its own class other settings, than were compared, the module's own forward runs. Copies
    (`copy.deepcopy`, pickle) are as fast as the original. `nn.DataParallel` is not served: its
    replicas share their forward with the first; use DistributedDataParallel.

    Args:
        model: the network, on the device where it is to run.
        memory: what the fused cells keep for backward: "fast" | "lean" | "minimal".
        backend: as in `mixed_sum`.
        check: run each module on a small random input, in training and evaluation mode, by its
            own forward and by the new one, and leave it as it is where output, gradients or
            running statistics differ: noise in its own forward, other ways to mix. It runs copies,
            so that nothing in the module moves; a module that cannot be copied, or is on the meta
            device, is left. Hooks inside an operation that runs by its own module are called. A
            forward that leaves out candidates of weight 0 runs itself where a weight is 0, which
            each call then has to read. What a forward makes of objects that it keeps, or of values
            in its own buffers, no check can see, and a network that the loop builds anew (`new()`
            of the unrolled step) is to be accelerated itself.

    Returns:
        Which modules were replaced by what, and which were left, and why.

    Raises:
        TypeError: `model` is no module.
        ValueError: `memory` is none of the three, or nothing like a cell or mixed op was found.
        BackendError: the explicit backend cannot run here.
    """
    if memory not in MEMORY:
        raise ValueError(f"accelerate: memory is {memory!r}; allowed: {', '.join(MEMORY)}")
    found = [(name, module) for name, module in model.named_modules() if candidate_modules(module)]
    if not found:
        raise ValueError(
            f"accelerate: {type(model).__name__} has no module with a ModuleList `_ops`; looked for"
            " cells (preprocess0, preprocess1, _ops; forward(s0, s1, weights)) and mixed ops"
            " (_ops; forward(x, weights))"
        )
    if backend is not None:  # raises before anything is replaced
        probe = torch.ones(1, dtype=dtype_of(model), device=device_of(model))
        mixed_sum([probe], probe, backend=backend)
    # A second call begins at the modules' own forwards, not at those of the first.
    decelerate(model)
    report = Report()
    fused: set[nn.Module] = set()
    for name, module in found:
        if module in fused:
            continue
        name = name or type(module).__name__
        what, reasons = _replace(module, memory, backend, check)
        if what is None:
            report.left.append((name, "; ".join(reasons)))
            continue
        report.replaced.append((name, "; not fused: ".join([what, *reasons])))
        if is_cell(module):
            # The mixed ops of a fused cell are never called: they need no forward and no row.
            fused.update(module.modules())
    return report


@typed
def decelerate(model: nn.Module) -> None:
    """Gives every module its own forward back."""
    for module in model.modules():
        own = vars(module).get("forward")
        # Others set forwards of instances, too; only ours are taken away.
        if isinstance(own, functools.partial) and own.func in FORWARDS:
            del module.forward


def _replace(
    module: nn.Module, memory: str, backend: str | None, check: bool
) -> tuple[str | None, list[str]]:
    """Returns a label of the new forward (None: it keeps its own), and why faster ones fail."""
    # `fastnas.nn` reads its parts from the space and looks at them in each call already.
    if isinstance(module, Dag | MixedOp):
        return None, ["it is fastnas' own and fused already"]
    if "forward" in vars(module):
        return None, ["its instance has a forward of its own"]
    reasons = []
    for way in _ways(module):
        if isinstance(way, str):
            reasons.append(way)
            continue
        checked = Checked(parts_of(module, way.parts))
        settings = Settings(memory, backend, Reading(Reader(way.reader, checked)))
        reason = _refusal(module, way, settings, check)
        if reason is None:
            # A partial of a module-level function, unlike a closure, can be copied and pickled with
            # the network.
            module.forward = functools.partial(way.forward, module, settings)
            zeros = "; by its own forward where a weight is 0" if settings.skips_zeros else ""
            return way.what + zeros, reasons
        reasons.append(reason)
    return None, reasons


def _refusal(module: nn.Module, way: _Way, settings: Settings, check: bool) -> str | None:
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
        # inputs[-2] is s1 of a cell and x of a mixed op.
        reason = can_run(way.parts, inputs[-2], True, settings.backend)
        if reason is not None:
            return reason
    return _difference(module, way, settings, inputs) if check else None


def _difference(
    module: nn.Module, way: _Way, settings: Settings, inputs: Sequence[Tensor]
) -> str | None:
    """Says where the forwards differ, or None; finds out what the own one does at weights of 0."""

    def forward(m: nn.Module, *x: Tensor) -> Tensor:
        # m is a copy: parts that were read before are those of the original.
        reading = replace(settings.reading, seen={})
        return way.forward(m, replace(settings, reading=reading, strict=True), *x)

    *x, w = inputs
    # Some public forwards leave out candidates of weight 0, whose norms then stand still. If the
    # two agree only where no weight is 0, each call has to look for zeros.
    for skips_zeros in (False, True):
        settings.skips_zeros = skips_zeros
        small = faint(w, zero=not skips_zeros)
        trials = {"": inputs, " at weights near 0": (*x, small)}
        reason = disagreement(module, forward, trials)
        if reason is None:
            break
    return reason
