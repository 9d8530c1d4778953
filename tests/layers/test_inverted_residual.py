"""The inverted residual computes what MobileNetV2 and FairNAS write, and counts as they do."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastnas.layers.inverted_residual import InvertedResidual


def written_out(block: InvertedResidual, x: Tensor, activation) -> Tensor:
    """The equation on the block's own weights, in evaluation mode."""

    def normed(u: Tensor, norm: nn.Module) -> Tensor:
        return F.batch_norm(u, norm.running_mean, norm.running_var, norm.weight, norm.bias)

    u = x
    if len(block.expand):
        u = activation(normed(F.conv2d(u, block.expand[0].weight), block.expand[1]))
    D = block.depthwise[0]
    u = F.conv2d(u, D.weight, stride=D.stride, padding=D.kernel_size[0] // 2, groups=u.shape[1])
    u = activation(normed(u, block.depthwise[1]))
    if not isinstance(block.squeeze, nn.Identity):
        _, reduce, _, widen, _ = block.squeeze.gate
        s = u.mean((2, 3), keepdim=True)
        s = activation(F.conv2d(s, reduce.weight, reduce.bias))
        u = u * torch.sigmoid(F.conv2d(s, widen.weight, widen.bias))
    y = normed(F.conv2d(u, block.project[0].weight), block.project[1])
    return x + y if x.shape == y.shape else y


@pytest.mark.parametrize("squeeze", [False, True], ids=["plain", "squeeze"])
@pytest.mark.parametrize("activation", ["relu6", "swish"])
@pytest.mark.parametrize(
    ("C_out", "kernel", "expansion", "stride"),
    [(8, 3, 6, 1), (8, 5, 3, 2), (12, 7, 3, 1), (8, 3, 1, 1)],
)
def test_it_is_the_equation(C_out, kernel, expansion, stride, squeeze, activation) -> None:
    torch.manual_seed(0)
    block = InvertedResidual(
        8, C_out, kernel, expansion, stride, squeeze=squeeze, activation=activation
    ).double()
    x = torch.randn(3, 8, 9, 9, dtype=torch.float64)
    block(x)  # running statistics leave 0 and 1
    block.eval()
    y = block(x)
    assert y.shape == (3, C_out, 9 if stride == 1 else 5, 9 if stride == 1 else 5)
    function = {"relu6": F.relu6, "swish": F.silu}[activation]
    assert torch.allclose(y, written_out(block, x, function), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("squeeze", [False, True], ids=["plain", "squeeze"])
def test_its_parts_are_the_block(squeeze: bool) -> None:
    torch.manual_seed(0)
    block = InvertedResidual(8, 8, 3, 3, squeeze=squeeze).double().eval()
    x = torch.randn(2, 8, 6, 6, dtype=torch.float64)
    first, second, last = block.parts()
    assert torch.equal(x + last(second(first(x))), block(x))
    parts = [p for part in block.parts() for p in part.parameters()]
    assert len(parts) == len(list(block.parameters()))


def test_parameters_by_hand() -> None:
    """Convolutions 8 -> 48, 5x5 over 48, 48 -> 16; norms of two each; a squeeze to 8 / 4 = 2."""
    plain = 8 * 48 + 25 * 48 + 48 * 16 + 2 * (48 + 48 + 16)
    counts = [
        sum(p.numel() for p in InvertedResidual(8, 16, 5, 6, 2, squeeze=squeeze).parameters())
        for squeeze in (False, True)
    ]
    assert counts == [plain, plain + 48 * 2 + 2 + 2 * 48 + 48]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"kernel": 4}, "kernel is 4; an odd number is needed"),
        ({"kernel": 0}, "kernel is 0; at least 1 is needed"),
        ({"stride": 3}, "stride is 3; at most 2 is allowed"),
        ({"activation": "relu"}, "activation is 'relu'; allowed: relu6, swish"),
        ({"squeeze": 1}, "squeeze is 1; bool is needed"),
    ],
)
def test_other_blocks_are_refused(given, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        InvertedResidual(**{"C_in": 8, "C_out": 8, "kernel": 3, "expansion": 3, **given})
