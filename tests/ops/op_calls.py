"""A small valid call of every op, and each of its tensors exchanged for another in turn."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from edge_cases import edge
from torch import Tensor

from fastnas import SkipNoise, ops
from fastnas.spaces import EdgeTable

Call = dict[str, Any]
Place = tuple[Any, ...]
"""("x", 1) is the second of the tensors x."""

NOISE = SkipNoise()
FUNCTIONS: dict[str, Callable[..., Any]] = {
    "mixed_sum": ops.mixed_sum,
    "mixed_norm_sum": ops.mixed_norm_sum,
    "mixed_edges": ops.mixed_edges,
    "mixed_edges along paths": ops.mixed_edges,
    "relu_conv_bn": ops.relu_conv_bn,
    "relu_conv_bn at stride 2": ops.relu_conv_bn,
    "sample_paths": ops.sample_paths,
}
TABLE = EdgeTable(2, 1, 3, (edge(0, 0, 1, ("skip", "dil_3")), edge(1, 0, 1, ("max_pool", "sep_3"))))


def _normal(*shape: int) -> Tensor:
    return torch.randn(shape)


def _running(channels: int) -> tuple[Tensor, Tensor]:
    return _normal(channels), torch.rand(channels) + 0.5


def call(name: str, seed: int = 0) -> Call:
    """Keyword arguments, the same values for the same seed; every tensor argument is there."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return _CALLS[name]()


def _noise() -> Call:
    return {"noise": NOISE, "level": NOISE.level(0.7), "rng": torch.randint(2**62, (2,))}


def _sum() -> Call:
    x = [_normal(2, 4, 3, 6) for _ in range(3)]
    return {"x": x, "w": _normal(3), "noisy": [1], **_noise()}


def _norm_sum() -> Call:
    return {
        "z": [_normal(2, 4, 3, 6) for _ in range(3)],
        "w": _normal(3),
        "normed": [True, False, True],
        "running": [_running(4), None, _running(4)],
        "noisy": [1],
        **_noise(),
    }


def _edges() -> Call:
    return {
        "x": [_normal(2, 4, 3, 6) for _ in range(2)],
        "w": _normal(2, 3),
        "params": [_normal(*shape) for shape in TABLE.param_shapes(4)],
        "table": TABLE,
        "running": [_running(4) for _ in range(TABLE.norms)],
        **_noise(),
        "rng": torch.randint(2**62, (1, 2)),
    }


def _paths() -> Call:
    return _edges() | {
        "w": _normal(2, 2),
        "choice": torch.tensor([[0, 1], [1, 0]]),
        "rng": torch.randint(2**62, (2, 1, 2)),
    }


def _conv(*shapes: tuple[int, ...]) -> Call:
    return {
        "x": _normal(2, 4, 6, 6),
        "params": [_normal(*shape) for shape in shapes],
        "running": _running(sum(shape[0] for shape in shapes)),
    }


def _sample() -> Call:
    return {
        "alpha": _normal(3, 3),
        "beta": _normal(3),
        "nodes": (3,),
        "topology": "top2",
        "tau": torch.tensor(0.7),
        "rng": torch.randint(2**62, (2,)),
    }


_CALLS: dict[str, Callable[[], Call]] = {
    "mixed_sum": _sum,
    "mixed_norm_sum": _norm_sum,
    "mixed_edges": _edges,
    "mixed_edges along paths": _paths,
    "relu_conv_bn": lambda: _conv((6, 4, 1, 1)),
    "relu_conv_bn at stride 2": lambda: _conv((3, 4, 1, 1), (3, 4, 1, 1)),
    "sample_paths": _sample,
}


def tensors(given: Any, at: Place = ()) -> Iterator[tuple[Place, Tensor]]:
    """All tensors of a call with their places."""
    if isinstance(given, Tensor):
        yield at, given
    elif isinstance(given, dict):
        for key, value in given.items():
            yield from tensors(value, (*at, key))
    elif isinstance(given, list | tuple):
        for i, value in enumerate(given):
            yield from tensors(value, (*at, i))


def exchanged(given: Any, place: Place, new: Any) -> Any:
    """The call with something else at that place."""
    if not place:
        return new
    first, *rest = place
    if isinstance(given, dict):
        return given | {first: exchanged(given[first], tuple(rest), new)}
    items = list(given)
    items[first] = exchanged(items[first], tuple(rest), new)
    return type(given)(items)


def differentiable(name: str, given: Call) -> list[Tensor]:
    """What has gradients."""
    names = ("alpha", "beta") if name == "sample_paths" else ("x", "z", "w", "params")
    return [t for place, t in tensors(given) if place[0] in names]


def results(name: str, given: Call, backend: str, dy: Tensor | None = None) -> list[Tensor]:
    """Output, gradients and running statistics of a call."""
    leaves = differentiable(name, given)
    for t in leaves:
        t.requires_grad_()
    y = FUNCTIONS[name](**given, backend=backend)
    y = y.weight if name == "sample_paths" else y
    grads = torch.autograd.grad(y, leaves, torch.ones_like(y) if dy is None else dy)
    kept = [t for place, t in tensors(given) if place[0] == "running"]
    return [y.detach(), *grads, *(t.clone() for t in kept)]
