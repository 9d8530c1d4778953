"""Searches a network of blocks of one's own, each exact mixture in the memory of one block."""

from functools import partial

import torch
from torch import nn

from fastnas.nn import Choice, split_parameters
from fastnas.saved_bytes import saved_bytes


class Block(nn.Module):
    """A residual block with a depthwise convolution between two dense ones, as in MobileNetV2."""

    def __init__(self, C, kernel, expansion):
        super().__init__()
        wide = C * expansion
        layers = [nn.Conv2d(C, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.ReLU6()]
        layers += [nn.Conv2d(wide, wide, kernel, padding=kernel // 2, groups=wide, bias=False)]
        layers += [nn.BatchNorm2d(wide), nn.ReLU6(), nn.Conv2d(wide, C, 1, bias=False)]
        self.body = nn.Sequential(*layers, nn.BatchNorm2d(C))

    def forward(self, x):
        return x + self.body(x)


def blocks(C):
    sizes = [(kernel, expansion) for kernel in (3, 5, 7) for expansion in (3, 6)]
    named = {f"mbconv_k{k}_e{e}": Block(C, k, e) for k, e in sizes}
    return Choice({"skip": nn.Identity(), **named}, mixing="softmax")


def network():
    torch.manual_seed(0)
    stages = [blocks(16) for _ in range(3)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4)]
    return nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), *stages, *head)


images, labels = torch.randn(16, 3, 12, 12), torch.arange(16) % 4
for memory in ("eager", "recompute", "minimal"):
    model = network()
    choices = [module for module in model if isinstance(module, Choice)]
    for choice in choices:
        choice.memory = memory
    weights, logits = split_parameters(model)
    optimizers = [torch.optim.SGD(weights, lr=0.05), torch.optim.Adam(logits, lr=0.02)]
    held = saved_bytes(partial(model, images), model.parameters())
    for _ in range(4):
        for optimizer in optimizers:  # a search draws a batch of its own for each
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
    best = ", ".join(choice.best()[0] for choice in choices)
    print(f"{memory:<9} holds {held / 2**20:6.2f} MiB, loss {loss:.5f}, derived: {best}")
