"""Puts a candidate operation of one's own among those of DARTS: the others still run fused."""

import copy

import torch
from public_darts import Cell
from torch import nn

import fastnas


class ChannelAttention(nn.Module):
    """An operation that fastnas does not know: each channel scaled by what its neighbours say."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(1, 1, 3, padding=1, bias=False)

    def forward(self, x):
        across = self.conv(x.mean((2, 3)).unsqueeze(1)).squeeze(1)
        return x * across.sigmoid()[:, :, None, None]


torch.manual_seed(0)
own = Cell(16)
for edge in own._ops:
    edge._ops.append(ChannelAttention())
own.double()  # in float64 the two differ by nothing but rounding at 1e-16

fused = copy.deepcopy(own)
print(fastnas.accelerate(fused))

x = torch.randn(4, 64, 8, 8, dtype=torch.float64)
alpha = torch.randn(14, 7, dtype=torch.float64, requires_grad=True)
gradients = []
for cell in (own, fused):
    loss = cell(x, x, alpha.softmax(-1)).square().mean()
    gradients.append(torch.autograd.grad(loss, [alpha, *cell.parameters()]))
    print(f"loss {loss.item():.12f}")
error = max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(*gradients))
print(f"largest relative difference of a gradient: {error:.1e}")
