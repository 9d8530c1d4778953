"""Makes steps, forward and backward, that leave nothing behind outside of a copy of a network."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from fastnas.dropin.equivalence import device_of, seeded
from fastnas.dropin.regions import Clock
from fastnas.saved_bytes import saved_bytes_by

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
Loss = Callable[[Any], Any]


@dataclass
class Steps:
    """Makes steps of a network on one batch.

    Args:
        network: a copy, which steps may change; `clock` watches its cells.
        batch: the arguments of a call, which stay what they are.
        loss: as in `profile`.
        gradients: id of each leaf that a step reaches, with that and the gradient that it had.
    """

    network: nn.Module
    batch: Arguments
    loss: Loss | None
    clock: Clock
    gradients: dict[int, tuple[Tensor, Tensor | None]]
    leaves: list[Tensor] = field(default_factory=list)

    def saved_bytes(self) -> tuple[int, dict[str, int]]:
        """Makes the first step; returns what it saves for backward, and what each place does."""
        inputs = self._inputs()
        given = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)]
        held = [*self.network.parameters(), *self.network.buffers(), *given]
        return saved_bytes_by(lambda: self._step(inputs, True), lambda: self.clock.place, held)

    def seconds(self) -> dict[str, float]:
        """Makes a step, and returns the seconds of each place."""
        return self._step(self._inputs(), False)

    def _inputs(self) -> Arguments:
        # A network may overwrite what it is given.
        inputs: Arguments = tree_map(_own_copy, self.batch)
        return inputs

    def _step(self, inputs: Arguments, first: bool) -> dict[str, float]:
        for leaf in self.leaves:
            leaf.grad = None
        # A collection in the middle of a step would count as its time, and weights that autocast
        # has cast before would not.
        gc.collect()
        torch.clear_autocast_cache()
        on_cuda = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
        args, kwargs = inputs
        with seeded(on_cuda):
            self.clock.start()
            y = self.network(*args, **kwargs)
            if first:
                self._keep(y)
            with torch.autocast(device_of(self.network).type, enabled=False):
                self._backward(y)
            return self.clock.stop()

    def _keep(self, y: Any) -> None:
        """Keeps the gradients of what backward reaches, which may lie outside of the copy."""
        for leaf in _leaves_of(y):
            self.gradients.setdefault(id(leaf), (leaf, leaf.grad))
            leaf.grad = None
            self.leaves.append(leaf)

    def _backward(self, y: Any) -> None:
        outputs = [t for t in tree_leaves(y) if isinstance(t, Tensor) and t.requires_grad]
        if not outputs:
            raise ValueError(
                "profile: the network returns no tensor that requires a gradient, so there is no"
                f" backward pass to measure: {type(y).__name__}"
            )
        # The loss is of tensors of its own, so that it reaches nothing else that the caller has.
        apart = tree_map(_cut, y)
        cut = [t for t in tree_leaves(apart) if isinstance(t, Tensor) and t.requires_grad]
        value = _mean_square(cut) if self.loss is None else self.loss(apart)
        if not (isinstance(value, Tensor) and value.numel() == 1 and value.requires_grad):
            what = f"{list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(
                f"profile: loss returns {what}; a tensor of one value that depends on what the"
                " network returns is needed"
            )
        grads = torch.autograd.grad(value, cut, allow_unused=True)
        pairs = [(t, g) for t, g in zip(outputs, grads) if g is not None]
        torch.autograd.backward([t for t, _ in pairs], [g for _, g in pairs])


def _own_copy(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.detach().clone().requires_grad_(value.requires_grad)


def _cut(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.detach().requires_grad_(value.requires_grad)


def _mean_square(outputs: list[Tensor]) -> Tensor:
    total = torch.zeros((), device=outputs[0].device)
    for y in outputs:
        total = total + (y.abs() if y.is_complex() else y).square().mean()
    return total


def _leaves_of(y: Any) -> Iterator[Tensor]:
    """Yields the leaves that backward of a value reaches."""
    nodes = [t.grad_fn for t in tree_leaves(y) if isinstance(t, Tensor)]
    seen = set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            yield node.variable
        nodes += [following for following, _ in node.next_functions]
