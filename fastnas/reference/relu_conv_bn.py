"""y = r (z - mean z),  z = W relu(x),  r = (var z + eps)^-1/2,  W a 1x1 convolution
dz = r (dy - mean dy - y mean(dy y)),  dW = dz relu(x)^T,  dx = W^T dz where x > 0.
Given statistics: dz = r dy
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from fastnas.checks import typed
from fastnas.reference.arguments import check_shape


def batch_norm(z: Tensor, stats: Tensor, training: bool, eps: float) -> Tensor:
    """Returns BN(z) without scale and shift; `stats` [2, C] is filled in training, else used."""
    if not training:
        mean, var = stats.to(z.dtype)
        return F.batch_norm(z, mean, var, training=False, eps=eps)
    # Statistics are taken of z as it is stored, in the wider dtype, and are not differentiated:
    # `F.batch_norm` below computes its own, with their gradient.
    wide = z.detach().to(stats.dtype)
    stats[0] = wide.mean((0, 2, 3))
    stats[1] = wide.var((0, 2, 3), correction=0)
    return F.batch_norm(z, None, None, training=True, eps=eps)


def strided_pair(x: Tensor, params: Sequence[Tensor]) -> Tensor:
    """Returns `FactorizedReduce`'s 1x1 convolutions at stride 2, the second a pixel further."""
    odd_h, odd_w = x.shape[2] % 2, x.shape[3] % 2
    # The second convolution reads x[2h + 1, 2w + 1]. Of an odd size its last row and column would
    # be missing, and the halves could not be concatenated.
    padded = F.pad(x, (0, odd_w, 0, odd_h)) if odd_h or odd_w else x
    first, second = params
    return torch.cat(
        [F.conv2d(x, first, stride=2), F.conv2d(padded[:, :, 1:, 1:], second, stride=2)], dim=1
    )


@typed
def relu_conv_bn(
    x: Tensor, params: Sequence[Tensor], stats: Tensor, *, training: bool = True, eps: float = 1e-5
) -> Tensor:
    """Specifies `fastnas.ops.relu_conv_bn`: its maths in eager torch.

    Args:
        x: [N, C_in, H, W].
        params: [C, C_in, 1, 1], or two of [C / 2, C_in, 1, 1]: then with stride 2, the second on
            the image shifted by a pixel (`FactorizedReduce`).
        stats: [2, C] mean and biased variance of z; filled in training, else used.

    Returns:
        [N, C, H, W], or [N, C, ceil(H / 2), ceil(W / 2)].
    """
    check_shape("x", x, [None] * 4)
    if len(params) not in (1, 2):
        raise ValueError(f"params has {len(params)} tensors; one or two are needed")
    for i, p in enumerate(params):
        check_shape(f"params[{i}]", p, [None, x.shape[1], 1, 1])
    check_shape("stats", stats, [2, sum(p.shape[0] for p in params)])
    if eps < 0:
        raise ValueError(f"eps is {eps}; at least 0 is needed")
    u = F.relu(x)
    z = F.conv2d(u, params[0]) if len(params) == 1 else strided_pair(u, params)
    return batch_norm(z, stats, training, eps)
