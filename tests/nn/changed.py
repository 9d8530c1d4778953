"""Modules that are changed after their first call: twins, and ways to change them."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from accelerated import C, assert_same, cell, cell_inputs, edge_inputs, observed
from public_darts import MixedOp
from torch import nn

import fastnas
from fastnas import nn as own
from fastnas import reference
from fastnas.spaces import uniform_space

PRIMITIVES = (
    "none", "max_pool_3x3", "avg_pool_3x3", "skip_connect", "sep_conv_3x3", "sep_conv_5x5",
    "dil_conv_3x3", "dil_conv_5x5",
)  # fmt: skip
SPACE = uniform_space("two nodes", PRIMITIVES, 2)
AVG, MAX, SKIP, SEP, DIL = (f"_ops.1._ops.{k}" for k in (2, 1, 3, 4, 6))


def of_fastnas():
    eager = reference.Cell(SPACE, "normal", 6, 8, C, False).double()
    fused = own.Cell(SPACE, "normal", 6, 8, C, False).double()
    fused.load_state_dict(eager.state_dict())
    return eager, fused, cell_inputs()


def of_the_public_code():
    eager = cell()
    fused = copy.deepcopy(eager)
    assert fastnas.accelerate(fused).replaced == [
        ("Cell", "cell of 2 nodes, 5 edges, 8 candidates: mixed_edges")
    ]
    return eager, fused, cell_inputs()


class Dense(nn.Module):
    """No operation of DARTS, but one that ends in a batch norm."""

    def __init__(self):
        super().__init__()
        norm = nn.BatchNorm2d(C, affine=False)
        self.op = nn.Sequential(nn.Conv2d(C, C, 3, padding=1), nn.Softplus(), norm)

    def forward(self, x):
        return self.op(x)


def with_sums():
    eager = MixedOp(C, 1, ())
    eager._ops.extend([Dense(), nn.Tanh(), Dense(), nn.Sequential(*Dense().op)])
    fused = copy.deepcopy(eager.double())
    [(_, what)] = fastnas.accelerate(fused).replaced
    assert what.startswith("4 candidates: mixed_norm_sum, 3 of them with batch norm")
    return eager, fused, edge_inputs(4)


def norms(module):
    return [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]


def every_norm(**fields):
    return lambda module: [setattr(n, k, v) for n in norms(module) for k, v in fields.items()]


def one(path, **fields):
    def change(module):
        for name, value in fields.items():
            setattr(module.get_submodule(path), name, value)

    return change


def own_forward(path):
    def change(module):
        part = module.get_submodule(path)
        forward = type(part).forward
        part.forward = lambda *x: 2 * forward(part, *x)

    return change


def own_method(path, name):
    """A method that the forward of the module's class calls, or that calls it."""

    def change(module):
        part = module.get_submodule(path)
        method = getattr(type(part), name)
        setattr(part, name, lambda *x: 2 * method(part, *x))

    return change


def hooked(path, register, hook, **options):
    return lambda module: getattr(module.get_submodule(path), register)(hook, **options)


def torch_seeded(make):
    torch.manual_seed(3)
    return make()


def assert_alike(eager, fused, inputs):
    """In a step of training, and in evaluation mode."""
    assert_same(observed(fused, inputs), observed(eager, inputs))
    eager.eval(), fused.eval()
    with torch.no_grad():
        assert_same([fused(*inputs)], [eager(*inputs)])
    eager.train(), fused.train()


def pickled(module):
    return pickle.loads(pickle.dumps(module))


KINDS = {"fastnas": of_fastnas, "accelerate": of_the_public_code, "sums": with_sums}


@pytest.fixture(scope="module")
def made():
    return {name: make() for name, make in KINDS.items()}


@pytest.fixture
def twins(made, request):
    """An eager module, the fused one, and inputs: copies, after a call in each mode."""
    eager, fused, inputs = copy.deepcopy(made[request.param])
    assert_alike(eager, fused, inputs)
    return eager, fused, inputs
