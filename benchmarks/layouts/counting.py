"""Counts how much of what a network asks of its candidates is computed by torch's own layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from torch import nn
from torch.nn import functional as F

_POOLS = ("max_pool2d", "avg_pool2d")
WINDOW = (3, (3, 3))
"""The kernel of a candidate's pool; others are of what stands around the candidates."""


class Layers:
    """Counts convolutions with the weights of candidates, and pools as candidates have them."""

    def __init__(self, candidates: Iterable[nn.Module]) -> None:
        modules = [module for op in candidates for module in op.modules()]
        self.weights = {id(m.weight) for m in modules if isinstance(m, nn.Conv2d)}
        # Bare pools beside a network's own candidates would be counted as if they were some.
        self.pools = any(isinstance(m, nn.MaxPool2d | nn.AvgPool2d) for m in modules)
        self.count = 0

    def counted(self, function: Callable[..., Any], counts: Callable[..., bool]) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.count += counts(*args, **kwargs)
            return function(*args, **kwargs)

        return call

    def is_conv(self, input: object, weight: object, *_: object, **__: object) -> bool:
        return id(weight) in self.weights

    def is_pool(self, input: object, kernel_size: object, *_: object, **__: object) -> bool:
        return self.pools and kernel_size in WINDOW


@contextmanager
def own_layers(candidates: Iterable[nn.Module]) -> Iterator[Layers]:
    """Counts the layers of candidates that torch runs within the context.

    Not by hooks nor by forwards of its own, which would make `accelerate` leave a module alone.
    """
    layers = Layers(candidates)
    wrapped = {name: layers.counted(getattr(F, name), layers.is_pool) for name in _POOLS}
    wrapped["conv2d"] = layers.counted(F.conv2d, layers.is_conv)
    with patch.multiple(F, **wrapped):
        yield layers


def layers_of(candidates: Iterable[nn.Module], step: Callable[[], object]) -> int:
    """Counts the layers of candidates that torch runs in a step."""
    with own_layers(candidates) as layers:
        step()
    return layers.count


def calls_of(modules: Iterable[nn.Module], step: Callable[[], object]) -> int:
    """Counts the calls of the modules in one step of a network that runs by itself."""
    count = 0

    def counts(*_: object) -> None:
        nonlocal count
        count += 1

    # A hook makes a module run by itself, so this must not be an accelerated network.
    handles = [m.register_forward_hook(counts) for m in dict.fromkeys(modules)]
    try:
        step()
    finally:
        for handle in handles:
            handle.remove()
    return count
