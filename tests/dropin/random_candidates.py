"""Candidates for random mixed ops: of DARTS in several spellings, dense ones, foreign ones."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastnas.benchmarks.layouts import nb201_operations, operations, pt_darts

DARTS = operations.PRIMITIVES
DENSE = ("nor_conv_1x1", "nor_conv_3x3", "bare_avg_pool", "bare_max_pool")
FOREIGN = ("inverted", "factored", "plain_conv", "gate", "noisy_skip", "late_relu", "seven")


class Gate(nn.Module):
    """Scales channels by their means: nothing that any fused op computes."""

    def __init__(self, C: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.linear = nn.Linear(C, C)

    def forward(self, x: Tensor) -> Tensor:
        scale = self.linear(x.mean((2, 3))).sigmoid()
        return x[:, :, :: self.stride, :: self.stride] * scale[:, :, None, None]


class NoisySkip(nn.Module):
    def __init__(self, C: int, stride: int) -> None:
        super().__init__()
        self.skip = operations.operation("skip_connect", C, stride)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        y = self.skip(x)
        if not self.training:
            return y
        self.calls += 1
        return y + 0.1 / self.calls * torch.randn_like(y)


class LateReLU(nn.Module):
    """Has the layers of a dilated convolution in another order."""

    def __init__(self, C: int, stride: int) -> None:
        super().__init__()
        relu, *others = operations.depthwise_separable(C, 3, stride, 2)
        self.op = nn.Sequential(*others, relu)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


def _inverted(C: int, stride: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(C, 2 * C, 1, bias=False),
        nn.BatchNorm2d(2 * C),
        nn.ReLU6(),
        nn.Conv2d(2 * C, 2 * C, 3, stride, 1, groups=2 * C, bias=False),
        nn.BatchNorm2d(2 * C),
        nn.ReLU6(),
        nn.Conv2d(2 * C, C, 1, bias=False),
        nn.BatchNorm2d(C, affine=False),
    )


def _factored(C: int, stride: int) -> nn.Module:
    return nn.Sequential(
        nn.ReLU(inplace=False),
        nn.Conv2d(C, C, (1, 7), (1, stride), (0, 3), bias=False),
        nn.Conv2d(C, C, (7, 1), (stride, 1), (3, 0), bias=False),
        nn.BatchNorm2d(C, affine=False),
    )


def _seven(C: int, stride: int) -> nn.Module:
    return operations.SepConv(C, 7, stride)


FOREIGNERS: dict[str, Callable[[int, int], nn.Module]] = {
    "inverted": _inverted,
    "factored": _factored,
    "plain_conv": lambda C, stride: nn.Conv2d(C, C, 3, stride, 1),
    "gate": Gate,
    "noisy_skip": NoisySkip,
    "late_relu": LateReLU,
    "seven": _seven,
}


def candidate(name: str, C: int, stride: int, spelling: str) -> nn.Module:
    """Builds a candidate; `spelling` is the code base whose classes those of DARTS have."""
    if name in FOREIGN:
        return FOREIGNERS[name](C, stride)
    if name.startswith("bare"):
        return operations.bare_pool(name.removeprefix("bare_") + "_3x3", stride)
    if name in DENSE:
        return nb201_operations.operation(name, C, stride, bias=spelling == "xautodl")
    if spelling == "pt.darts":
        return pt_darts.operation(name, C, stride)
    if spelling == "xautodl" and "conv" in name:
        theirs = name.replace("sep_conv", "dua_sepc").replace("dil_conv", "dil_sepc")
        return nb201_operations.operation(theirs, C, stride, bias=True)
    return operations.operation(name, C, stride)


def disturb(module: nn.Module, rng: random.Random) -> list[str]:
    """Changes some settings of a module's layers; what was changed, in words."""
    done: list[str] = []

    def sometimes(probability: float, what: str) -> bool:
        happens = rng.random() < probability
        if happens:
            done.append(what)
        return happens

    norms = [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]
    convs = [m for m in module.modules() if isinstance(m, nn.Conv2d)]
    if norms and sometimes(0.1, "another eps"):
        rng.choice(norms).eps = 1e-3
    if norms and sometimes(0.08, "another momentum"):
        rng.choice(norms).momentum = 0.3
    if norms and sometimes(0.05, "a cumulative average"):
        rng.choice(norms).momentum = None
    if norms and sometimes(0.06, "a frozen batch norm"):
        rng.choice(norms).register_forward_pre_hook(_evaluate)
    if convs and sometimes(0.1, "a frozen convolution"):
        rng.choice(convs).requires_grad_(False)
    if convs and sometimes(0.06, "a hook"):
        rng.choice(convs).register_forward_hook(_double)
    return done


def _evaluate(norm: nn.Module, _: Any) -> None:
    norm.training = False


def _double(_: nn.Module, __: Any, output: Tensor) -> Tensor:
    return 2 * output


def norms_of_another_kind(module: nn.Module, kind: str) -> nn.Module:
    """Exchanges every batch norm: with scale and shift, or one that keeps no statistics."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.BatchNorm2d) and not child.affine:
                C = child.num_features
                if kind == "affine":
                    norm = nn.BatchNorm2d(C)
                    nn.init.uniform_(norm.weight, 0.5, 1.5), nn.init.normal_(norm.bias)
                else:
                    norm = nn.BatchNorm2d(C, affine=False, track_running_stats=False)
                setattr(parent, name, norm)
    return module
