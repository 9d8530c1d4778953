"""accelerate'd networks under torch.autocast: held to eager autocast by the rule of tests/ops."""

from __future__ import annotations

import copy

import pytest
import torch
from accelerated import C, calls, network  # noqa: F401
from public_darts import MixedOp
from rule import agree
from torch import nn

import fastnas
from fastnas.saved_bytes import saved_bytes
from fastnas.spaces import get_space

BATCH = 4


def narrowed(net):
    """The network in fp32, beside it the same in fp64."""
    net = net.float()
    exact = copy.deepcopy(net).double()
    for mine, its in zip(net.arch_parameters(), exact.arch_parameters()):
        its.data = mine.data.double()
    return net, exact


def images(size=16, dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    return torch.randn(BATCH, 3, size, size, generator=generator).to(dtype)


def stepped(net, x, dtype=None, run=None):
    """Logits, gradients and running statistics of one step; autocast to `dtype` where given."""
    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        logits = (run or net)(x)
        loss = nn.functional.cross_entropy(logits, torch.arange(BATCH))
    loss.backward()
    found = {"logits": logits.detach()}
    found |= {f"dw[{i}]": a.grad for i, a in enumerate(net.arch_parameters())}
    for i, (name, p) in enumerate(net.named_parameters()):
        found[f"{'dparams' if name.startswith('cells') else name}[{i}]"] = p.grad
    for i, (name, b) in enumerate(net.named_buffers()):
        if b.is_floating_point():
            found[f"{name.rpartition('.')[2]}[{i}]"] = b.clone()
    return found


def test_a_public_network(calls):  # noqa: F811
    eager, exact = narrowed(network())
    fused = copy.deepcopy(eager)
    fastnas.accelerate(fused)
    calls.clear()
    got = stepped(fused, images(), torch.bfloat16)
    assert calls == {"run_cell": 3}
    expected = stepped(exact, images(dtype=torch.float64))
    agree(got, expected, stepped(eager, images(), torch.bfloat16), torch.bfloat16)
    counters = [b for b in fused.buffers() if not b.is_floating_point()]
    assert all(counter == 1 for counter in counters)
    # Gradients come back in the dtype of the parameters.
    assert {p.grad.dtype for p in fused.parameters()} == {torch.float32}


def test_our_own_network():
    """SearchNetwork takes the mixing weights and has no `arch_parameters`; it shares the rest."""
    space = get_space("S0")
    torch.manual_seed(0)
    fused = fastnas.nn.SearchNetwork(space, C, 10, 3)
    eager = fastnas.reference.SearchNetwork(space, C, 10, 3)
    eager.load_state_dict(fused.state_dict())
    exact = copy.deepcopy(eager).double()
    alpha = {kind: torch.randn(14, 8) for kind in ("normal", "reduce")}

    def run(net, x, dtype=None):
        own = [a.to(x.dtype, copy=True).requires_grad_() for a in alpha.values()]
        net.arch_parameters = lambda: own
        weights = dict(zip(alpha, (a.softmax(-1) for a in own)))
        return stepped(net, x, dtype, lambda x: net(x, weights))

    with torch.autocast("cpu", torch.bfloat16):
        assert fused.cells[0].why_not_fused(images()) is None
    results = (
        run(fused, images(), torch.bfloat16),
        run(exact, images(dtype=torch.float64)),
        run(eager, images(), torch.bfloat16),
    )
    agree(*results, torch.bfloat16)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("names", [None, ["sep_conv_3x3", "dil_conv_5x5"], ["max_pool_3x3"]])
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16])
def test_a_mixed_op(calls, stride, names, given):  # noqa: F811
    """What is no convolution keeps the dtype of x, and the sum that of its widest term."""
    torch.manual_seed(1)
    options = {} if names is None else {"primitives": names}
    eager = MixedOp(C, stride, **options)
    fused, exact = copy.deepcopy(eager), copy.deepcopy(eager).double()
    fastnas.accelerate(fused)
    calls.clear()
    x = torch.randn(BATCH, C, 8, 8).to(given)
    w = torch.randn(len(eager._ops)).softmax(0)

    def run(module, x, w, on=True):
        x, w = x.requires_grad_(), w.requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=on):
            y = module(x, w)
        dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
        grads = torch.autograd.grad(y, [x, w, *module.parameters()], dy.to(y.dtype))
        kinds = ("dx", "dw", *(f"dparams[{i}]" for i in range(len(grads) - 2)))
        return {"y": y.detach(), **dict(zip(kinds, grads))}

    got = run(fused, x.clone(), w.clone())
    assert calls == {"deferred": 1}
    expected = run(exact, x.double(), w.double(), on=False)
    agree(got, expected, run(eager, x.clone(), w.clone()), torch.bfloat16)


def test_float64_is_left_alone():
    eager = network()
    fused = copy.deepcopy(eager)
    fastnas.accelerate(fused)
    x = images(dtype=torch.float64)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        cell, inputs = fused.cells[0], [fused.stem(x)] * 2
        y = cell(*inputs, fused.alphas_normal)
        expected = eager.cells[0](*inputs, eager.alphas_normal)
    assert y.dtype == torch.float64
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)


def test_compiled():
    fused = network(layers=1).float()  # the cells of three take thrice as long to trace
    fastnas.accelerate(fused)
    compiled = torch.compile(copy.deepcopy(fused), backend="aot_eager", fullgraph=True)
    expected = stepped(fused, images(), torch.bfloat16)
    got = stepped(compiled, images(), torch.bfloat16)
    for found, want in zip(got.values(), expected.values()):
        assert found is want or torch.equal(found, want)  # None: without a normal cell
    for net in (fused, compiled):
        net.eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(compiled(images()), fused(images()))


def test_saved_bytes():
    """A step holds at most a third of what eager holds in fp32; measured: a fourteenth."""
    eager = network().float()
    fused = copy.deepcopy(eager)
    fastnas.accelerate(fused)

    def held(net, on):
        def step():
            with torch.autocast("cpu", torch.bfloat16, enabled=on):
                net(images()).float().sum().backward()

        return saved_bytes(step, exclude=[*net.parameters(), *net.buffers()])

    assert held(fused, True) <= held(eager, False) / 12
