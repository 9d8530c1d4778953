"""Holds the forward that `accelerate` gives to modules which have candidates in them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fastnas.dropin.deferred import DeferredSum
from fastnas.dropin.modes import inside_module, is_compiled, leaves_hooks
from fastnas.dropin.plans import Plans
from fastnas.dropin.rehearsal import rehearsal_now
from fastnas.dropin.replacements import replacement
from fastnas.dropin.tape import NoPlan
from fastnas.dropin.waiting import real
from fastnas.nn.facts import has_global_hooks, hooks


@dataclass
class Around:
    """Says what a module around candidates is.

    Args:
        outermost: whether it is the network, which returns no sums that wait.
        plans: of a module that calls candidates itself, what it does with them.
    """

    outermost: bool
    plans: Plans | None

    def renewed(self) -> Around:
        """Returns the same for another module."""
        return Around(self.outermost, None if self.plans is None else Plans())


@replacement
def around_forward(module: nn.Module, around: Around, *args: Any, **kwargs: Any) -> Any:
    """Runs the own forward of a module that has candidates in it, or does at once what it does."""
    return run_around(module, around.outermost, args, kwargs, around.plans)


def run_around(
    module: nn.Module, outermost: bool, args: Any, kwargs: Any, plans: Plans | None = None
) -> Any:
    """Runs the own forward of a module that has candidates in it, unless there is a plan.

    Returns tensors where hooks, a checkpoint or the caller's code look at them.
    """
    if is_compiled():
        return type(module).forward(module, *args, **kwargs)
    if rehearsal_now() is not None:
        raise NoPlan("a module around candidates is called")
    with inside_module():
        y = None if plans is None else plans.output(module, args, kwargs)
        if y is None:
            y = type(module).forward(module, *args, **kwargs)
    if outermost or has_global_hooks() or any(hooks(module)) or leaves_hooks():
        return real(y)
    call = object()
    for part in [y] if isinstance(y, Tensor) else tree_leaves(y):
        if isinstance(part, DeferredSum):
            part.end_of_cell(call)
    return y
