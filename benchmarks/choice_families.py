"""Makes the candidates of the benchmark of `Choice`: MBConv, transformer blocks, graph layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


class MBConv(nn.Module):
    """Computes x + f(x), f an inverted residual (Sandler et al., CVPR 2018) with batch norms.

    Args:
        C: channels of x [N, C, H, W].
        kernel, expansion: of the depthwise convolution, on C * expansion channels.
    """

    def __init__(self, C: int, kernel: int, expansion: int) -> None:
        super().__init__()
        wide, pad = C * expansion, kernel // 2
        self.body = nn.Sequential(
            nn.Conv2d(C, wide, 1, bias=False),
            nn.BatchNorm2d(wide),
            nn.ReLU6(),
            nn.Conv2d(wide, wide, kernel, padding=pad, groups=wide, bias=False),
            nn.BatchNorm2d(wide),
            nn.ReLU6(),
            nn.Conv2d(wide, C, 1, bias=False),
            nn.BatchNorm2d(C),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class Block(nn.Module):
    """Computes a transformer block with its norms first, on x [N, tokens, width].

    Args:
        width, heads: of the attention.
        hidden: of the layer between the two linear ones.
        dropout: on both of its parts.
    """

    def __init__(self, width: int, heads: int, hidden: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        u = self.norms[0](x)
        x = x + self.dropout(self.attention(u, u, u, attn_mask=mask, need_weights=False)[0])
        return x + self.dropout(self.mlp(self.norms[1](x)))


def _mean(x: Tensor, edges: Tensor) -> Tensor:
    target = edges[1]
    count = x.new_zeros(len(x)).index_add(0, target, x.new_ones(len(target)))
    return _sum(x, edges) / count.clamp(min=1)[:, None]


def _sum(x: Tensor, edges: Tensor) -> Tensor:
    source, target = edges
    return torch.zeros_like(x).index_add(0, target, x[source])


def _gated(x: Tensor, edges: Tensor) -> Tensor:
    source, target = edges
    return torch.zeros_like(x).index_add(0, target, (x[source] * x[target]).sigmoid())


GATHERED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sum": _sum, "mean": _mean, "gated": _gated,
}  # fmt: skip


class GraphLayer(nn.Module):
    """Computes relu(A(W x) + V x), A gathering over the neighbours; x [nodes, width].

    Args:
        width: of x.
        how: "sum", "mean" or "gated".
    """

    def __init__(self, width: int, how: str) -> None:
        super().__init__()
        self.how = how
        self.neighbours, self.own = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        return (GATHERED[self.how](self.neighbours(x), edges) + self.own(x)).relu()


@dataclass(frozen=True)
class Family:
    """Holds what candidates of one kind are made of, and what they are called with.

    Args:
        candidate: the k-th of them.
        inputs: arguments of a call, at the given scale (1: as measured; tests take less).
        most: how many differ.
    """

    candidate: Callable[[int], nn.Module]
    inputs: Callable[[float], tuple[Any, ...]]
    most: int

    def candidates(self, count: int) -> dict[str, nn.Module]:
        """Makes the first `count` of them, by name."""
        return {f"{k}": self.candidate(k) for k in range(count)}


CHANNELS, WIDTH = 40, 128


def _mbconv(k: int) -> nn.Module:
    # The skip comes second, so that it stands among any two.
    if k == 1:
        return nn.Identity()
    kernel, expansion = divmod(k - (k > 1), 2)
    return MBConv(CHANNELS, (3, 5, 7)[kernel], (3, 6)[expansion])


def _block(k: int) -> nn.Module:
    return Block(WIDTH, (2, 4, 8)[k % 3], WIDTH * (1 + k // 3))


def _graph(k: int) -> nn.Module:
    return GraphLayer(WIDTH // 2, tuple(GATHERED)[k % 3])


def _graph_inputs(scale: float) -> tuple[Tensor, Tensor]:
    nodes = int(4000 * scale)
    return torch.randn(nodes, WIDTH // 2), torch.randint(nodes, (2, 6 * nodes))


FAMILIES = {
    "mbconv": Family(_mbconv, lambda s: (torch.randn(max(2, int(16 * s)), CHANNELS, 28, 28),), 7),
    "transformer": Family(_block, lambda s: (torch.randn(max(2, int(16 * s)), 64, WIDTH),), 12),
    "graph": Family(_graph, _graph_inputs, 12),
}
