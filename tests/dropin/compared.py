"""What one call of a network leaves behind, and whether another's is the same."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

MODES = ("training", "evaluation", "evaluation with gradients")
TOLERANCE = 1e-10


def state_after(
    call: Callable[[Tensor], Tensor],
    network: nn.Module,
    alphas: Iterable[Tensor],
    x: Tensor,
    mode: str = "training",
    seed: int = 9,
) -> dict[str, Tensor | None]:
    """Output, gradients (None where there are none) and buffers after a call in that mode.

    The next number of torch's generator is among them: a call has drawn as many as another.
    """
    network.train(mode == "training")
    torch.manual_seed(seed)
    x = x.detach().clone().requires_grad_()
    seen: dict[str, Tensor | None] = {}
    with torch.set_grad_enabled(mode != "evaluation"):
        y = call(x)
    seen["the next random number"] = torch.rand(())
    seen["output"] = y.detach()
    if mode != "evaluation":
        leaves = {"x": x, **{f"alphas {i}": a for i, a in enumerate(alphas)}}
        leaves |= {n: p for n, p in network.named_parameters() if p.requires_grad}
        dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
        grads = torch.autograd.grad(y, list(leaves.values()), dy, allow_unused=True)
        seen |= {f"gradient of {name}": grad for name, grad in zip(leaves, grads)}
    seen |= {f"buffer {name}": b.clone() for name, b in network.named_buffers()}
    return seen


def differences(
    given: dict[str, Tensor | None],
    expected: dict[str, Tensor | None],
    tolerance: float = TOLERANCE,
) -> list[str]:
    """What is not the same, the largest difference first."""
    found: list[tuple[float, str]] = []
    if list(given) != list(expected):
        found.append((float("inf"), f"{set(given) ^ set(expected)} are seen of one only"))
    for name in expected.keys() & given.keys():
        apart = _apart(given[name], expected[name])
        if not apart <= tolerance:  # NaN is a difference
            found.append((apart, f"{name} differs by {apart:.1e}"))
    return [text for _, text in sorted(found, key=lambda f: (-f[0], f[1]))]


def _apart(a: Tensor | None, b: Tensor | None) -> float:
    if a is None or b is None:
        return 0.0 if a is b else float("inf")
    if a.shape != b.shape or a.dtype != b.dtype:
        return float("inf")
    if b.numel() == 0:
        return 0.0
    a, b = a.double(), b.double()
    return float((a - b).abs().max() / (1 + b.abs().max()))


def assert_same_state(
    given: dict[str, Any], expected: dict[str, Any], tolerance: float = TOLERANCE
) -> None:
    found = differences(given, expected, tolerance)
    assert not found, f"{len(found)} of {len(expected)}: " + "; ".join(found[:5])
