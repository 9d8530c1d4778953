"""Lets the fused ops compute the cells and candidates of an existing network, in place."""

from __future__ import annotations

import functools
import inspect
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import nn

from fastnas.backends import MEMORY
from fastnas.checks import typed
from fastnas.dropin.around import Around
from fastnas.dropin.candidates import Settings
from fastnas.dropin.cells import is_cell
from fastnas.dropin.equivalence import device_of, dtype_of
from fastnas.dropin.groups import Group, Trials, find_groups, fuse_groups, nearest_miss
from fastnas.dropin.replacements import is_replaced, replacement
from fastnas.dropin.tally import Site, Tally, grouped
from fastnas.dropin.whole import replace_forward
from fastnas.nn.dag import Dag
from fastnas.nn.mixed_op import MixedOp
from fastnas.nn.parts import candidate_modules
from fastnas.nn.reading import Reading
from fastnas.ops import mixed_sum


@dataclass(frozen=True)
class Report:
    """Tells what `accelerate` did; printed, it is a table.

    Args:
        replaced: name of each module that runs otherwise now, and what computes it.
        left: name of each module that runs as before, and why. The mixed ops of a cell that was
            left are in either list for themselves.
        calls: what ran since then, fused and not (`Tally`).
    """

    replaced: list[tuple[str, str]] = field(default_factory=list)
    left: list[tuple[str, str]] = field(default_factory=list)
    calls: Tally = field(default_factory=Tally, compare=False)

    def __str__(self) -> str:
        lists = ("replaced", self.replaced), ("left", self.left)
        lines = [
            line for title, rows in lists for line in (f"{title} ({len(rows)})", *grouped(rows))
        ]
        return "\n".join([*lines, *([str(self.calls)] if self.calls.total else [])])


class Options(NamedTuple):
    """Holds the arguments of a call of `accelerate`, for networks that the first one makes."""

    memory: str | None
    backend: str | None
    check: bool


@typed
def accelerate(
    model: nn.Module, memory: str | None = None, backend: str | None = None, *, check: bool = True
) -> Report:
    """Lets the fused ops compute the cells and candidates of a search network, in place.

    Looks for candidates by the layers that they are made of: separable and dilated convolutions,
    pools, factorized reductions, dense convolutions of NAS-Bench-201, identities and zeros, in
    lists, dicts or under names of their own::

        report = fastnas.accelerate(network)
        print(report)  # again after a step: what really ran fused

    What a candidate returns is a sum that waits. Scaled and added it stays one, and is computed, as
    one `mixed_edges` for all terms that have met by then, when anything else looks at it. So how a
    mixed op is named, called and written does not matter. Other candidates (an own noisy skip) run
    by their own modules. A cell as in the public DARTS code (`preprocess0`, `preprocess1`, a
    ModuleList `_ops`; called with s0, s1, weights) runs fused as a whole, which is faster. A mixed
    op (a ModuleList `_ops`) without a recognised candidate is summed by `mixed_norm_sum`.

    Modules get a new `forward` (and `new`, so that the network of an unrolled step is accelerated
    as well), and that is all: parameters, buffers, state-dict names, optimizers and hooks stay as
    they are, and so do the results, to rounding. The network itself returns tensors.

    A call that the fused ops cannot serve (some batch norms frozen and others not, another
    device, `torch.func`) runs the module's own forward and logs the reason once. So does compiled
    code, outside of whole cells. Each call looks whether the module still is what was read:
    operations that were exchanged, hooked or set otherwise are read again, and where a class has
    another forward, or a module of its own class other settings, than were compared, the module's
    own forward runs. Copies (`copy.deepcopy`, pickle) are as fast as the original.
    `nn.DataParallel` is not served: its replicas share their forward with the first; use
    DistributedDataParallel. An output of a candidate cannot be given to an `autograd.Function` as
    it is, nor may what a sum reads (inputs, parameters, summands, factors) be changed before
    the sum is used: both raise an error that says so.

    Args:
        model: the network, on the device where it is to run.
        memory: what the fused cells keep for backward: "fast" | "lean" | "minimal". None: "minimal"
            on the CPU for up to 16 channels, where it takes no time that could be measured and a
            third of the memory; else "lean".
        backend: as in `mixed_sum`.
        check: run each module on a small random input, in training and evaluation mode, by its
            own forward and by the new one, and leave it as it is where output, gradients or
            running statistics differ: noise in its own forward, other ways to mix. It runs copies,
            so that nothing in the module moves; a module that cannot be copied, or is on the meta
            device, is left. Hooks inside an operation that runs by its own module are called. A
            cell that leaves out candidates of weight 0 runs itself where a weight is 0, which
            each call then has to read. What a forward makes of objects that it keeps, or of values
            in its own buffers, no check can see.

    Returns:
        Which modules run otherwise now, which do not and why; `calls` counts what really ran.

    Raises:
        TypeError: `model` is no module, or one that TorchScript compiled.
        ValueError: `memory` is none of the three, or there is no candidate to fuse.
        BackendError: the explicit backend cannot run here.
    """
    if memory is not None and memory not in MEMORY:
        raise ValueError(f"accelerate: memory is {memory!r}; allowed: {', '.join(MEMORY)}")
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError("accelerate: model is compiled by TorchScript; a plain Module is needed")
    if backend is not None:  # raises before anything is replaced
        probe = torch.ones(1, dtype=dtype_of(model), device=device_of(model))
        mixed_sum([probe], probe, backend=backend)
    report = _accelerate(model, Options(memory, backend, check), Trials())
    if not (report.replaced or report.left):
        raise ValueError(
            f"accelerate: {type(model).__name__} has no operation of DARTS beside others, and no"
            f" module with a ModuleList `_ops` of candidates{nearest_miss(model)}"
        )
    return report


@typed
def decelerate(model: nn.Module) -> None:
    """Gives every module its own forward back."""
    for module in model.modules():
        for name in ("forward", "new"):
            # Others set forwards of instances, too; only ours are taken away.
            if is_replaced(module, name):
                delattr(module, name)


@replacement
def accelerated_new(
    network: nn.Module, options: Options, trials: Trials, *args: Any, **kwargs: Any
) -> Any:
    """Makes a network as its own `new` does, for the unrolled step, and accelerates it."""
    made = type(network).new(network, *args, **kwargs)  # type: ignore[attr-defined]
    if isinstance(made, nn.Module) and not _take_over(made, network, options, trials):
        _accelerate(made, options, trials)
    return made


def _take_over(made: nn.Module, network: nn.Module, options: Options, trials: Trials) -> bool:
    """Gives a network that is laid out like an accelerated one the forwards of that, if it is.

    Each step of an unrolled search makes one, and to find its candidates anew takes as long as two
    passes through it. What a module was compared with is looked at in its first call, as ever.
    """
    like, own = list(network.named_modules()), list(made.named_modules())
    if [(name, type(m)) for name, m in like] != [(name, type(m)) for name, m in own]:
        return False
    if any("forward" in vars(module) for _, module in own):
        return False
    for (_, module), (_, other) in zip(own, like):
        if is_replaced(other):
            forward = vars(other)["forward"]
            _, settings = forward.args
            if isinstance(settings, Settings):
                settings = replace(settings, reading=Reading(settings.reading.reader))
            elif isinstance(settings, Around):
                settings = settings.renewed()
            module.forward = functools.partial(forward.func, module, settings)
    _accelerate_new(made, options, trials)
    return True


def _accelerate_new(model: nn.Module, options: Options, trials: Trials) -> None:
    """Lets the methods `new` of a network and its modules make accelerated ones."""
    for module in model.modules():
        # Class methods and static ones do not make a network like this one.
        own = inspect.getattr_static(type(module), "new", None)
        if inspect.isfunction(own) and "new" not in vars(module):
            vars(module)["new"] = functools.partial(accelerated_new, module, options, trials)


def _accelerate(model: nn.Module, options: Options, trials: Trials) -> Report:
    """Does the work of `accelerate`, with what trials of like modules have told."""
    # A second call begins at the modules' own forwards, not at those of the first.
    decelerate(model)
    report, inside = Report(), set[nn.Module]()
    tried = trials if options.check else None
    groups = find_groups(model, tried)
    by_holder = {group.holder: group for group in groups}
    for name, module in model.named_modules():
        group = by_holder.get(module)
        is_site = candidate_modules(module) or (group is not None and group.is_fused)
        if module in inside or not is_site:
            continue
        label = name or type(module).__name__
        what, reasons = _replace(module, label, group, report, options, tried, model)
        if what is None:
            report.left.append((label, "; ".join(dict.fromkeys(reasons))))
            continue
        report.replaced.append((label, what))
        if is_cell(module) and "forward" in vars(module):
            # Its mixed ops are called where it cannot be fused whole: they have no rows.
            inside.update(module.modules())
    fuse_groups(model, groups, options.memory, options.backend, report.calls, tried)
    if report.replaced:
        _accelerate_new(model, options, trials)
    return report


def _replace(
    module: nn.Module,
    label: str,
    group: Group | None,
    report: Report,
    options: Options,
    trials: Trials | None,
    model: nn.Module,
) -> tuple[str | None, list[str]]:
    """Returns a label of what computes the module now (None: itself alone), or why it does."""
    # `fastnas.nn` reads its parts from the space and looks at them in each call already.
    if isinstance(module, Dag | MixedOp):
        return None, ["it is fastnas' own and fused already"]
    if "forward" in vars(module):
        return None, ["its instance has a forward of its own"]
    fused = group is not None and group.is_fused
    whole = is_cell(module)
    reasons = [] if fused or whole or group is None else [*group.foreign.values()][:1]
    if not fused or whole:
        site = Site(label, report.calls)
        what, reason = replace_forward(
            module, site, options.memory, options.backend, trials, module is model
        )
        if what is not None:
            return "; not fused: ".join([what, *reasons]), []
        reasons.append(reason)
    return (group.what if group is not None and fused else None), reasons
