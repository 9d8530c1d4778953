"""profile: what it measures of cells and of the rest, that it leaves no trace, what it refuses."""

from __future__ import annotations

import copy
import functools
import io
import random
import time
from contextlib import redirect_stdout

import numpy as np
import pytest
import torch
from accelerated import network
from torch import Tensor, nn

import fastnas
from fastnas import nn as own
from fastnas.benchmarks.layouts import LAYOUTS
from fastnas.dropin.regions import REST, Clock, cells_of, watch_network
from fastnas.saved_bytes import saved_bytes, saved_bytes_by
from fastnas.spaces import get_space

pytestmark = pytest.mark.usefixtures("one_thread")


def images(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 8, 8, dtype=torch.float64)


@functools.cache
def fused() -> nn.Module:
    """One that is accelerated already, which takes most of the time: it is never changed."""
    net = network(1)
    fastnas.accelerate(net)
    return net


def profiled(*args, **options):
    with redirect_stdout(io.StringIO()) as said:
        found = fastnas.profile(*args, **{"rounds": 1, **options})
    assert said.getvalue() == f"{found}\n"
    return found


def test_a_row_a_cell_the_rest_and_the_whole():
    net, x = network(2), images()
    found = profiled(net, x)
    assert [row.name for row in found.rows] == [
        "cells.0",
        "cells.1",
        "the rest",
        "the whole network",
    ]
    assert all(row.before_ms > 0 and row.after_ms > 0 for row in found.rows)
    for when in ("before_bytes", "after_bytes"):
        assert sum(getattr(row, when) for row in found.rows[:-1]) == getattr(found.whole, when)
    held = [*net.parameters(), *net.buffers(), x]
    own_bytes = saved_bytes(lambda: net(x).square().mean().backward(), held)
    fastnas.accelerate(net)
    assert found.whole.before_bytes == own_bytes
    assert found.whole.after_bytes == saved_bytes(lambda: net(x).square().mean().backward(), held)
    assert all(cell.saved_ratio > 2 and cell.fused == 1 for cell in found.cells)
    assert found.rest.fused is None and found.whole.fused == found.calls.share == 1
    text = str(found).splitlines()
    assert text[2].split()[0] == "cells.0" and f"{found.cells[0].speedup:.2f}" in text[2]
    assert "2x3x8x8 float64 in training, cpu, 1 thread" in text[6]


def trace(net: nn.Module, *tensors: Tensor):
    """What a network, torch and Python hold, to be compared."""
    state = {name: value.clone() for name, value in [*net.named_parameters(), *net.named_buffers()]}
    grads = [None if t.grad is None else t.grad.clone() for t in [*net.parameters(), *tensors]]
    modules = [
        (m.training, {k: repr(v) for k, v in vars(m).items() if "hooks" in k}, vars(m).keys() | ())
        for m in net.modules()
    ]
    forwards = [vars(m).get("forward") for m in net.modules()]
    generators = torch.get_rng_state(), random.getstate(), str(np.random.get_state())  # noqa: NPY002
    return state, grads, modules, forwards, generators


def same(a, b) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and torch.equal(a, b)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return a == b


@pytest.mark.parametrize("is_accelerated", [False, True])
def test_nothing_is_left_behind(is_accelerated):
    net, x = network(2, noise=0.1), images().requires_grad_()
    alphas = net.arch_parameters()
    report = fastnas.accelerate(net) if is_accelerated else None
    net(x).sum().backward()
    net.cells[0].register_forward_hook(lambda *_: None)
    net.stem[1].eval()
    calls = None if report is None else copy.copy(report.calls.fused)
    before = trace(net, x, *alphas)
    with torch.inference_mode():
        profiled(net, x)
    assert same(trace(net, x, *alphas), before)
    assert report is None or report.calls.fused == calls


class Outside(nn.Module):
    """Uses logits that lie in no module, and overwrites its input."""

    logits = torch.zeros(2, requires_grad=True)

    def __init__(self):
        super().__init__()
        self.net = fused()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.mul_(self.logits.softmax(0)[0]))


def test_tensors_outside_of_the_network_keep_their_gradients():
    scale, x = torch.ones((), requires_grad=True), images()
    given = x.clone()
    Outside.logits.grad = torch.full((2,), 7.0)
    profiled(Outside(), x, loss=lambda y: (scale * y).sum())
    assert scale.grad is None and Outside.logits.grad.tolist() == [7, 7] and torch.equal(x, given)


def test_an_accelerated_network_is_measured_as_it_is():
    net, x = copy.deepcopy(fused()), images()
    minimal = profiled(net, x).whole  # what few channels take by themselves
    fastnas.accelerate(net, memory="lean", check=False)
    lean = profiled(net, x).whole
    assert minimal.before_bytes == lean.before_bytes and minimal.after_bytes < lean.after_bytes


@pytest.mark.parametrize(
    ("kind", "space", "sizes"),
    [(own.SearchNetwork, "S0", (4, 10, 3)), (own.NB201SearchNetwork, "nb201", (4, 10, 1))],
)
def test_networks_of_fastnas_beside_eager_torch(kind, space, sizes):
    space = get_space(space)
    net = kind(space, *sizes)
    weights = own.ArchParameters(space).alphas()
    weights = {name: alpha.softmax(-1) for name, alpha in weights.items()}
    found = profiled(net, (images().float(), weights))
    assert len(found.cells) == 3 and all(cell.fused is None for cell in found.cells)
    assert all(cell.saved_ratio > 2 for cell in found.cells)

    class Mine(kind):
        pass

    with pytest.raises(ValueError, match="Mine is a class of your own on"):
        profiled(Mine(space, *sizes), (images().float(), weights))


@pytest.mark.parametrize(
    ("name", "first"),
    [
        ("pc-darts", "cells.0"),  # mixed ops in a cell
        ("naslib", "cells.0"),  # as children
        ("xautodl-nasnet-gdas", "cells.0"),  # that have no forward, in a cell without one
        ("drnas-nb201", "cells.0"),  # a cell that has candidates itself
    ],
)
def test_cells_of_public_layouts(name, first):
    layout = LAYOUTS[name]
    net = layout.build(8, 3, 2)
    found = profiled(net, torch.randn(2, 3, 8, 8))
    assert found.cells[0].name == first and len(found.cells) == 3
    assert found.rest.before_bytes < found.whole.before_bytes / 2


def test_a_cell_alone_and_mixed_ops_beside_cells():
    net = network(1)
    cell = net.cells[0]
    w = torch.randn(5, 8, dtype=torch.float64).softmax(-1)
    s = torch.randn(2, 12, 8, 8, dtype=torch.float64)
    assert [row.name for row in profiled(cell, s, s, w).cells] == ["Cell"]
    both = nn.Module()
    both.cells, both.first, both.second = net.cells, *copy.deepcopy(cell._ops[:2])
    fastnas.accelerate(both)
    assert cells_of(both) == ["cells.0", "first", "second"]


class Sleep(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, seconds):
        ctx.seconds = seconds
        time.sleep(seconds)
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        time.sleep(2 * ctx.seconds)
        return grad, None


class Sleeps(nn.Module):
    def __init__(self, seconds):
        super().__init__()
        self.seconds = seconds
        self.first = nn.Parameter(torch.ones(3))

    def forward(self, x, before=0.0):
        return Sleep.apply(x * self.first + before, self.seconds)


def test_time_and_bytes_belong_to_the_cell_that_takes_them():
    net = nn.Module()
    net.stem, net.a, net.glue, net.b = (Sleeps(t / 1e3) for t in (5, 10, 20, 40))
    clock = Clock(torch.device("cpu"))
    watch_network(net, ["a", "b"], clock)

    def step():
        clock.start()
        x = net.stem(torch.ones(3))
        a = net.a(x)
        net.b(net.glue(a), a).sum().backward()  # b looks at the output of a, too
        clock.stop()

    _, saved = saved_bytes_by(step, lambda: clock.place, net.parameters())
    expected = {"a": 30, "b": 120, REST: 75}
    assert clock.seconds.keys() == expected.keys() == saved.keys()
    assert all(ms - 1 < 1e3 * clock.seconds[name] < ms + 25 for name, ms in expected.items())
    # Each product saves its x; those of a and the glue are outputs of what is before them.
    assert saved == {"a": 12, "b": 12, REST: 24}


def test_under_autocast_and_in_evaluation_mode():
    net, x = copy.deepcopy(fused()).float(), images().float()
    whole = profiled(net, x).whole
    with torch.autocast("cpu", torch.bfloat16):
        half = profiled(net, x).whole
    found = profiled(net.eval(), x)
    assert half.before_bytes < whole.before_bytes
    assert found.whole.after_bytes < whole.after_bytes and "in evaluation" in found.conditions


class Locked(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = fused()

    def __deepcopy__(self, memo):
        raise TypeError("a lock")


@pytest.mark.parametrize(
    ("args", "options", "error", "says"),
    [
        (lambda: (3, 4), {}, TypeError, "network is 3; Module is needed"),
        (lambda: (network(1),), {}, TypeError, r"batch is \(\); a tensor, several"),
        (lambda: (network(1), 3), {}, TypeError, r"batch is \(3,\); a tensor"),
        (lambda: (fused(), images(), images()), {}, TypeError, "Labels belong into `loss`"),
        (lambda: (fused(), images()), {"loss": 3}, TypeError, "loss is 3; Callable"),
        (
            lambda: (network(1), images()),
            {"loss": lambda y: y},
            ValueError,
            r"loss returns \[2, 10",
        ),
        (lambda: (fused(), images()), {"loss": lambda y: 1}, ValueError, "loss returns int"),
        (lambda: (fused(), images()), {"rounds": 0}, ValueError, "rounds is 0; at least 1"),
        (lambda: (nn.Conv2d(3, 3, 1), images()), {}, ValueError, "accelerate: Conv2d has no oper"),
        (lambda: (Locked(), images()), {}, ValueError, "no copy can be made of Locked, .*a lock"),
        (
            lambda: (torch.compile(fused(), backend="eager"), images()),
            {},
            TypeError,
            "compiled by torch.compile",
        ),
    ],
)
def test_what_is_refused(args, options, error, says):
    with pytest.raises(error, match=says):
        profiled(*args(), **options)


def test_what_has_no_backward_pass_or_nothing_to_fuse_is_refused():
    net = network(1).requires_grad_(False)
    for alphas in net.arch_parameters():
        alphas.requires_grad_(False)
    with pytest.raises(ValueError, match="no tensor that requires a gradient"):
        profiled(net, images())
    for module in net.modules():
        if hasattr(module, "_ops"):
            module.forward = lambda *_: None
    with pytest.raises(ValueError, match=r"nothing in Network is fused\n.* a forward of its own"):
        profiled(net, images())
