"""Tells in which cell of a network a step is, forward and backward, and for how long."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fastnas.dropin.candidates import candidate_forward
from fastnas.dropin.cells import is_cell
from fastnas.dropin.deferred import DeferredSum
from fastnas.dropin.forwards import WholeSettings
from fastnas.dropin.replacements import is_replaced
from fastnas.nn.dag import Dag
from fastnas.nn.mixed_op import MixedOp

REST = "the rest"
_CONTAINERS = (nn.ModuleList, nn.ModuleDict)


def cells_of(network: nn.Module) -> list[str]:
    """Returns the names of the cells of an accelerated network, or of one of `fastnas.nn`.

    A cell is a module that runs fused as a whole or has several lists of candidates, else the
    innermost one around several mixed ops. A mixed op in none of these is one for itself.
    """
    sites = _sites(network)
    cells = {name: name if alone else _around(name, network, sites) for name, alone in sites}
    # What holds other cells is the network, or a stage of it.
    holds = {cell for cell in cells.values() for other in cells.values() if is_inside(other, cell)}
    return list(dict.fromkeys(name if cell in holds else cell for name, cell in cells.items()))


def is_inside(name: str, outer: str) -> bool:
    """Tells whether a module lies in another one, by their names."""
    return name != outer and (not outer or name.startswith(f"{outer}."))


def _sites(network: nn.Module) -> list[tuple[str, bool]]:
    """Lists modules that run fused or have candidates, and whether each is more than a mixed op."""
    wholes: dict[str, bool] = {}
    lists: dict[str, set[str]] = {}
    for name, module in network.named_modules():
        if any(is_inside(name, whole) for whole in wholes):
            continue
        if _is_whole(module):
            wholes[name] = isinstance(module, Dag) or is_cell(module)
        elif is_replaced(module) and vars(module)["forward"].func is candidate_forward:
            outer = _ancestors(name)
            holder = next(n for n in outer if not _is_container(network, n))
            lists.setdefault(holder, set()).add(outer[0])
    return [*wholes.items(), *((holder, len(found) > 1) for holder, found in lists.items())]


def _is_whole(module: nn.Module) -> bool:
    """Tells whether it runs fused as a whole, where a call can be served."""
    if is_replaced(module):
        return isinstance(vars(module)["forward"].args[1], WholeSettings)
    return isinstance(module, Dag | MixedOp)


def _ancestors(name: str) -> list[str]:
    """Lists the names of the modules around one, the innermost first."""
    parts = name.split(".") if name else []
    return [".".join(parts[:i]) for i in reversed(range(len(parts)))]


def _is_container(network: nn.Module, name: str) -> bool:
    return isinstance(network.get_submodule(name), _CONTAINERS)


def _around(name: str, network: nn.Module, sites: list[tuple[str, bool]]) -> str:
    for outer in _ancestors(name):
        if not _is_container(network, outer) and sum(is_inside(n, outer) for n, _ in sites) > 1:
            return outer
    return name


class Clock:
    """Counts the seconds of a step, place by place.

    Args:
        device: waited for where a place is entered; without that the clock would tell how long it
            takes to queue the kernels.
    """

    def __init__(self, device: torch.device) -> None:
        self.wait: Callable[[], None] = torch.get_device_module(device.type).synchronize
        self.start()

    def start(self) -> None:
        """Begins a step."""
        self.seconds: dict[str, float] = defaultdict(float)
        self.known: set[int] = set()
        """Ids of the tensors that places have returned in this step."""
        self.place, self.since = REST, self._now()

    def enter(self, place: str) -> str:
        """Returns the place that is left."""
        before = self.place
        if place != before:
            now = self._now()
            self.seconds[before] += now - self.since
            self.place, self.since = place, now
        return before

    def stop(self) -> dict[str, float]:
        """Returns the seconds of each place."""
        self.seconds[self.place] += self._now() - self.since
        return self.seconds

    def _now(self) -> float:
        self.wait()
        return perf_counter()

    def watch(self, value: Any, place: str) -> None:
        """Enters the place when backward has the gradient of a tensor in a value.

        Sums that wait are computed: here, where the module returns that they belong to.
        """
        for leaf in tree_leaves(value):
            y = leaf.computed() if isinstance(leaf, DeferredSum) else leaf
            # Gradients of leaves are there in the middle of the last cell that uses them.
            if isinstance(y, Tensor) and y.grad_fn is not None and id(y) not in self.known:
                self.known.add(id(y))
                y.register_hook(functools.partial(self._hook, place))

    def _hook(self, place: str, grad: Tensor) -> None:
        self.enter(place)


def watch_network(network: nn.Module, cells: list[str], clock: Clock) -> None:
    """Lets the calls of cells, and of the modules beside them, tell the clock where a step is.

    Sets their forwards, and whatever else of a cell's class is called forward. No hooks: with hooks
    a module is not fused.
    """
    modules = {network.get_submodule(name): name for name in cells}
    for cell, name in modules.items():
        # A cell that is fused whole is held to the attributes that it had.
        others = [] if _is_whole(cell) else dir(type(cell))
        names = {"forward", *(n for n in others if n.startswith("forward"))}
        for method in names:
            _wrap(cell, method, name, clock)
    for module in _beside(network, modules):
        _wrap(module, "forward", REST, clock)


def _beside(module: nn.Module, cells: Mapping[nn.Module, str]) -> Iterator[nn.Module]:
    """Yields the outermost modules that are no cells, nor around or in one."""
    if module in cells:
        return
    for child in module.children():
        if any(part in cells for part in child.modules()):
            yield from _beside(child, cells)
        # What TorchScript compiled cannot be given another forward.
        elif not isinstance(child, (*_CONTAINERS, torch.jit.ScriptModule)):
            yield child


def _wrap(module: nn.Module, method: str, place: str, clock: Clock) -> None:
    call = getattr(module, method)
    if callable(call):
        vars(module)[method] = functools.partial(_run, call, place, clock)


def _run(call: Callable[..., Any], place: str, clock: Clock, *args: Any, **kwargs: Any) -> Any:
    before = clock.enter(place)
    try:
        clock.watch((args, kwargs), before)
        y = call(*args, **kwargs)
        clock.watch(y, place)
        return y
    finally:
        clock.enter(before)
