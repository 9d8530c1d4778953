"""Whatever changes in a module after it was compiled, its next call gives eager's results.

Hooks too, of which torch.compile by itself takes no notice.
"""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from accelerated import C, assert_same, cell_inputs, observed
from public_darts import Cell, SepConv
from torch import nn

import fastnas

AVG, SEP = "_ops.1._ops.2", "_ops.1._ops.4"


def one(path, **fields):
    def change(module):
        for name, value in fields.items():
            setattr(module.get_submodule(path), name, value)

    return change


def shifted(module):
    module.get_submodule(SEP).op[2].bias = nn.Parameter(torch.linspace(-1, 1, C).double())


def exchanged(module):
    torch.manual_seed(3)
    module._ops[1]._ops[4] = SepConv(C, 5, 1).double()


def patched(module):
    part = module.get_submodule(SEP)
    part.forward = lambda x: 2 * type(part).forward(part, x)


CHANGES = {
    "momentum": one(AVG + ".1", momentum=0.3),
    "a bias": shifted,
    "an operation": exchanged,
    "a forward": patched,
    "a hook": lambda m: m.get_submodule(SEP).register_forward_hook(lambda m, x, y: 2 * y),
}


def compiled(module):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    return torch.compile(module, backend="eager")


def graphs():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def inputs_of_one_node():
    s0, s1, w = cell_inputs()
    return [s0, s1, w.detach()[:2].requires_grad_()]


@pytest.fixture
def twins():
    """A cell of one node, as each edge takes a second to trace, and the same accelerated."""
    eager = Cell(1, 1, 6, 8, C, False, False).double()
    fused = copy.deepcopy(eager)
    fastnas.accelerate(fused)
    return eager, fused


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_seen(twins, name):
    fast, inputs = compiled(twins[1]), inputs_of_one_node()
    for module in (twins[0], fast):
        module(*inputs)
    for module in twins:
        CHANGES[name](module)
    assert_same(observed(fast, inputs), observed(twins[0], inputs))


def test_modes_and_weights_are_no_reasons_to_compile_again(twins):
    eager, fused = twins
    fast, inputs = compiled(fused), inputs_of_one_node()
    for step in range(2):
        for training in (True, False):
            for module in (eager, fused):
                module.train(training)
                with torch.no_grad():
                    for p in module.parameters():
                        p.mul_(1.1)
            with torch.set_grad_enabled(training):
                assert_same([fast(*inputs)], [eager(*inputs)])
        assert graphs() == 2, f"after step {step}"


def test_a_setting_put_back_finds_its_compiled_code_again(twins):
    fast, norm, inputs = compiled(twins[1]), twins[1].get_submodule(AVG)[1], inputs_of_one_node()
    first = fast(*inputs)
    norm.count = 1
    fast(*inputs)
    known = graphs()
    del norm.count
    assert torch.equal(fast(*inputs), first)
    assert graphs() == known


def test_compiled_code_does_not_keep_a_network(twins):
    fast = compiled(copy.deepcopy(twins[1]))
    fast(*inputs_of_one_node())
    gone = weakref.ref(fast._orig_mod)
    del fast
    gc.collect()
    assert gone() is None
