"""Measures time and saved bytes of a network, cell by cell, by its own forwards and fused."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fastnas import nn as own
from fastnas import reference
from fastnas.checks import check_int, short, typed
from fastnas.dropin.accelerate import accelerate, decelerate
from fastnas.dropin.candidates import Settings
from fastnas.dropin.equivalence import device_of
from fastnas.dropin.regions import REST, Clock, cells_of, is_inside, watch_network
from fastnas.dropin.replacements import is_replaced
from fastnas.dropin.steps import Arguments, Loss, Steps
from fastnas.dropin.tally import Site, Tally, grouped
from fastnas.nn.dag import Dag

WHOLE = "the whole network"
BEFORE, AFTER = "before", "after"
_PLAIN: dict[type[nn.Module], type[nn.Module]] = {
    own.MixedOp: reference.MixedOp,
    own.Cell: reference.Cell,
    own.SearchNetwork: reference.SearchNetwork,
    own.NB201Cell: reference.NB201Cell,
    own.NB201SearchNetwork: reference.NB201SearchNetwork,
}
"""Modules of `fastnas.nn`, which nothing makes slow again, to those of eager torch."""


@dataclass(frozen=True)
class Row:
    """Holds what a part of a network takes, forward and backward, before and after `accelerate`.

    Attributes:
        name: of a cell, "the rest" or "the whole network".
        before_ms, after_ms: medians over the rounds.
        before_bytes, after_bytes: what is saved for backward, parameters, buffers and inputs apart.
            Each storage counts once, where it is saved first.
        fused: the share of its calls of candidates that ran fused; None where none is counted.
    """

    name: str
    before_ms: float
    after_ms: float
    before_bytes: int
    after_bytes: int
    fused: float | None

    @property
    def speedup(self) -> float:
        """Returns how many times faster it is; inf where it takes no time any more."""
        return _ratio(self.before_ms, self.after_ms)

    @property
    def saved_ratio(self) -> float:
        """Returns how many times fewer bytes it saves; inf where it saves none any more."""
        return _ratio(self.before_bytes, self.after_bytes)


@dataclass(frozen=True)
class Profile:
    """Holds what `profile` measured; printed, it is a table.

    Attributes:
        cells: a row each, in the order of the network.
        rest: what is in no cell: stem, classifier, loss.
        whole: cells and rest together.
        calls: which candidates ran fused in one step, and why others did not.
        conditions: batch, device, threads and rounds, in words.
    """

    cells: tuple[Row, ...]
    rest: Row
    whole: Row
    calls: Tally = field(compare=False)
    conditions: str

    @property
    def rows(self) -> tuple[Row, ...]:
        """Returns all rows, those of the rest and of the whole last."""
        return (*self.cells, self.rest, self.whole)

    def __str__(self) -> str:
        groups = ("", "time, ms", "", "", "saved, MiB", "", "", "")
        heads = ("cell", *(BEFORE, AFTER, "times") * 2, "fused")
        table = [groups, heads, *(_cells(row) for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*table)]
        lines = [
            "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
            for row in table
        ]
        calls = [str(self.calls)] if self.calls.total else []
        return "\n".join([*lines, self.conditions, *calls])


def _ratio(before: float, after: float) -> float:
    return before / after if after else float("inf") if before else 1.0


def _cells(row: Row) -> tuple[str, ...]:
    times = (f"{row.before_ms:.1f}", f"{row.after_ms:.1f}", f"{row.speedup:.2f}")
    saved = (row.before_bytes / 2**20, row.after_bytes / 2**20)
    fused = "" if row.fused is None else f"{row.fused:.0%}"
    return (row.name, *times, *(f"{s:.1f}" for s in saved), f"{row.saved_ratio:.1f}", fused)


@typed
def profile(
    network: nn.Module,
    *batch: Any,
    loss: Callable[..., Any] | None = None,
    rounds: int = 5,
) -> Profile:
    """Prints time and saved bytes of a network, cell by cell, before and after `accelerate`.

    One step is forward and backward of a batch, in the mode and under the autocast of the call::

        fastnas.profile(network, images)
        fastnas.profile(network, images, weights, loss=lambda logits: criterion(logits, labels))

    "Before" are the network's own forwards (of a network of `fastnas.nn`: its mathematics in eager
    torch), "after" is what `accelerate` makes of it by its defaults; one that is accelerated
    already is measured as it is. Both make a step in turn, the first of which is not timed but
    tells what is saved for backward. A cell is a module that runs fused as a whole, or the
    innermost one around several mixed ops; its time begins where its forward does, and in backward
    where the gradient of its output is known. On a GPU each of these moments waits for the device,
    which a step by itself does not do.

    Everything runs on two copies, which need the memory of two more networks. The network stays as
    it is: parameters, gradients, buffers, modes, hooks, whether it is accelerated, `Report.calls`
    and all random generators. The hooks of the network run, and what they or its forward do to
    objects outside of it is done.

    Args:
        network: a search network, accelerated or not; of a DistributedDataParallel its module.
        batch: the arguments of a call: a tensor, or several; or one tuple or list of them, or one
            dict of arguments by name. They are not changed.
        loss: maps what the network returns to a tensor of one value; None: the mean square of its
            outputs.
        rounds: timed steps of either, of which the medians are taken.

    Returns:
        The rows, and what ran fused; `print` shows them as a table.

    Raises:
        TypeError: `network` is no module, or compiled; it cannot be called so, or the batch holds
            no tensor.
        ValueError: nothing in it is fused; no copy can be made of it; `loss` gives no single value
            with a gradient.
    """
    network, (args, kwargs) = _checked(network), _arguments(batch)
    check_int("rounds", rounds, 1)
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    if not tensors:
        raise TypeError(
            f"profile: batch is {short(batch)}; a tensor, several, a tuple or list of arguments or"
            " a dict of arguments by name is needed"
        )
    # Copies that are made in inference mode could not be trained.
    with torch.inference_mode(False), torch.enable_grad():
        before, after, calls = _copies(network)
        _check_call(before, args, kwargs)
        cells = cells_of(after)
        found = _measured((before, after), cells, (args, kwargs), loss, rounds, calls)
    rows = [_row(name, *found, calls) for name in (*cells, REST, WHOLE)]
    # Cells that the step does not run have no row.
    ran = [row for row in rows[:-2] if row.name in found[0].seconds[0]]
    named = tuple(replace(row, name=row.name or type(network).__name__) for row in ran)
    conditions = _conditions(network, tensors[0], rounds)
    result = Profile(named, rows[-2], rows[-1], calls, conditions)
    print(result)
    return result


def _conditions(network: nn.Module, x: Tensor, rounds: int) -> str:
    shape, dtype = "x".join(map(str, x.shape)), str(x.dtype).removeprefix("torch.")
    threads = torch.get_num_threads()
    mode = "training" if network.training else "evaluation"
    where = f"{device_of(network)}, {threads} thread{'s' * (threads != 1)}"
    return f"forward + backward of {shape} {dtype} in {mode}, {where}, medians of {rounds} in turn"


def _checked(network: nn.Module) -> nn.Module:
    """Returns the module that is measured."""
    if isinstance(network, nn.parallel.DistributedDataParallel | nn.DataParallel):
        network = network.module
    # Dynamo, which takes seconds to import, is there if the network is its own.
    by_dynamo = type(network).__module__.startswith("torch._dynamo.")
    if by_dynamo or isinstance(network, torch.jit.ScriptModule):
        how = "torch.compile" if by_dynamo else "TorchScript"
        raise TypeError(f"profile: network is compiled by {how}; a plain Module is needed")
    return network


def _arguments(batch: tuple[Any, ...]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if len(batch) == 1 and isinstance(batch[0], Mapping):
        return (), dict(batch[0])
    if len(batch) == 1 and isinstance(batch[0], list | tuple):
        return tuple(batch[0]), {}
    return batch, {}


def _check_call(network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    signature = inspect.signature(network.forward)
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        raise TypeError(
            f"profile: {type(network).__name__} takes {signature}, and the batch has {len(args)}"
            f" arguments and the names {list(kwargs)}: {error}. Labels belong into `loss`"
        ) from None


def _copies(network: nn.Module) -> tuple[nn.Module, nn.Module, Tally]:
    """Returns a copy with its own forwards, one that is accelerated, and what counts its calls.

    Raises:
        ValueError: it cannot be copied, or nothing in it is fused.
    """
    try:
        before, after = copy.deepcopy(network), copy.deepcopy(network)
    except Exception as error:  # a module may hold anything
        raise ValueError(
            f"profile: no copy can be made of {type(network).__name__}, and it is copies that are"
            f" measured: {error}"
        ) from error
    decelerate(before)
    _make_plain(before)
    left: list[tuple[str, str]] = []
    if not any(map(is_replaced, after.modules())):
        left = accelerate(after).left
    if not cells_of(after):
        lines = "\n".join(grouped(left))
        raise ValueError(f"profile: nothing in {type(network).__name__} is fused\n{lines}")
    calls = Tally()
    for name, module in after.named_modules():
        settings = vars(module)["forward"].args[1] if is_replaced(module) else None
        # Copies count where the original does, whose counts are not to move.
        if isinstance(settings, Settings):
            settings.site = Site(name, calls)
    return before, after, calls


def _make_plain(network: nn.Module) -> None:
    """Lets the modules of `fastnas.nn` in a network run as those of eager torch."""
    for module in network.modules():
        kind = type(module)
        if not isinstance(module, Dag | own.MixedOp | own.SearchNetwork):
            continue
        if kind not in _PLAIN:
            raise ValueError(
                f"profile: {kind.__name__} is a class of your own on {kind.__base__.__name__} of"  # type: ignore[union-attr]
                " fastnas.nn; what it is in eager torch is known of fastnas' own classes only"
            )
        module.__class__ = _PLAIN[kind]  # type: ignore[assignment]


class _Figures(NamedTuple):
    """Holds seconds of each timed step, and saved bytes, by place."""

    seconds: list[dict[str, float]]
    saved: dict[str, int]


def _measured(
    networks: tuple[nn.Module, nn.Module],
    cells: list[str],
    batch: Arguments,
    loss: Loss | None,
    rounds: int,
    calls: Tally,
) -> tuple[_Figures, _Figures]:
    gradients: dict[int, tuple[Tensor, Tensor | None]] = {}
    pair = []
    for network in networks:
        clock = Clock(device_of(network))
        watch_network(network, cells, clock)
        pair.append(Steps(network, batch, loss, clock, gradients))
    try:
        found = []
        for steps in pair:
            whole, places = steps.saved_bytes()
            found.append(_Figures([], {**places, WHOLE: whole}))
        ran = Tally(calls.fused.copy(), calls.own.copy())
        for turn in range(rounds):
            # Each goes first in every other turn: a neighbour of the machine that comes or goes
            # then slows both.
            for steps, figures in list(zip(pair, found))[:: 1 if turn % 2 else -1]:
                seconds = steps.seconds()
                seconds[WHOLE] = sum(seconds.values())
                figures.seconds.append(seconds)
        calls.fused, calls.own = ran.fused, ran.own
    finally:
        for leaf, grad in gradients.values():
            leaf.grad = grad
    return found[0], found[1]


def _row(name: str, before: _Figures, after: _Figures, calls: Tally) -> Row:
    def ms(figures: _Figures) -> float:
        return 1e3 * median(seconds.get(name, 0.0) for seconds in figures.seconds)

    def count(counts: Mapping[Any, int]) -> int:
        names = ((key if isinstance(key, str) else key[0], n) for key, n in counts.items())
        return sum(n for key, n in names if name == WHOLE or key == name or is_inside(key, name))

    fused, others = count(calls.fused), count(calls.own)
    share = fused / (fused + others) if fused + others else None
    return Row(
        name, ms(before), ms(after), before.saved.get(name, 0), after.saved.get(name, 0), share
    )
