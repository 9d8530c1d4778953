"""What a module does with its candidates, done without its Python: where it may be, and where not.

Each holder is called several times, by its own forward and accelerated: outputs, all gradients
(None and zeros are apart) and running statistics are the same each time. `planned` tells whether
its Python was left out.
"""

from __future__ import annotations

import copy
import gc
import math
import pickle
import random
import weakref

import pytest
import torch
from accelerated import C, assert_same_state
from public_darts import DilConv, Identity, SepConv
from torch import nn
from torch.nn import functional as F

import fastnas
from fastnas.dropin.plans import MOST

FACTOR = 2.0
ORDER = [2, 0, 1]
SETTINGS = {"skip": 1}


class Holder(nn.Module):
    """Three candidates of half of the channels, or of all of them; subclasses mix them."""

    def __init__(self, channels=C):
        super().__init__()
        self.ops = nn.ModuleList((SepConv(channels, 3, 1), DilConv(channels, 5, 1), Identity()))
        self.scale, self.listed, self.table = 2.0, [0, 1], {"first": 0}
        self.helper = helper
        self.alpha = nn.Parameter(torch.tensor([0.3, -0.4, 1.1]))

    def mixed(self, x, w):
        return sum(a * op(x) for a, op in zip(w, self.ops))


def helper(y):
    return FACTOR * y


def shuffle(y, groups):
    N, channels, H, W = y.shape
    y = y.view(N, groups, channels // groups, H, W).transpose(1, 2).contiguous()
    return y.view(N, -1, H, W)


def holder(forward):
    """A holder of `C` channels whose forward is this function, and one like it, accelerated."""
    torch.manual_seed(3)
    kind = type("Own", (Holder,), {"forward": forward, "__module__": __name__})
    kind.__qualname__ = "Own"
    globals()["Own"] = kind  # where pickle looks for it
    eager = kind(C // 2 if forward in PARTIAL.values() else C).double()
    fused = copy.deepcopy(eager)
    fastnas.accelerate(fused)
    return eager, fused


def planned(module):
    """Counts the programs that are known of a module."""
    seen = vars(module)["forward"].args[1].plans.seen.values()
    kept = [zeros.programs for one in seen for zeros in one.programs.values()]
    return sum(program is not None for programs in kept for program in programs.values())


def inputs(seed=0, zeros=(), layout=torch.contiguous_format):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3, C, 8, 8, generator=generator, dtype=torch.float64)
    w = torch.rand(3, generator=generator, dtype=torch.float64)
    w[list(zeros)] = 0
    return x.contiguous(memory_format=layout).requires_grad_(), w.requires_grad_()


def state(module, given, *further):
    x, w = given
    random.seed(5)
    torch.manual_seed(5)
    y = module(x, w, *further)
    leaves = [x, w, *module.parameters()]
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = torch.autograd.grad(y, leaves, dy, allow_unused=True)
    return [y.detach(), *found]


def assert_alike(eager, fused, given=None, *further):
    given = given or inputs()
    expected, found = (state(module, given, *further) for module in (eager, fused))
    assert [t is None for t in found] == [t is None for t in expected]
    for a, b in zip(found, expected):
        if b is not None:
            torch.testing.assert_close(a, b, rtol=0, atol=1e-10 * (1 + float(b.abs().max())))
    assert_same_state(eager, fused)


def unpacked(self, x, w):
    first, *rest = self.ops
    y = w[0] * first(x)
    for i, op in enumerate(rest, 1):
        y = y + op(x) * w[i]
    return y


def nodes(self, x, w):
    states = [x]
    for i in range(2):
        states.append(sum(w[j] * self.ops[(i + j) % 3](h) for j, h in enumerate(states)))
    return states[-1]


def all_nodes(self, x, w):
    first = w[0] * self.ops[0](x) + w[1] * self.ops[2](x)
    second = w[2] * self.ops[1](first)
    return torch.cat([first, second], dim=1)


def partial(self, x, w):
    half = x.shape[1] // 2
    y = self.mixed(x[:, :half], w)
    return shuffle(torch.cat([y, x[:, half:]], dim=1), 2)


def pooled(self, x, w):
    half = x.shape[1] // 2
    y, rest = self.mixed(x[:, half:], w), F.max_pool2d(x[:, :half], 3, 1, 1)
    return torch.cat([y, rest], dim=1)


PARTIAL = {"partial channels": partial, "pooled beside": pooled}
PLANNED = {
    "a sum": lambda self, x, w: self.mixed(x, w),
    "unpacked": unpacked,
    "of constants": lambda self, x, w: self.ops[0](x) * 0.5 - self.ops[1](x) / 3,
    "by settings": lambda self, x, w: self.scale * self.mixed(x, w[self.listed]),
    "by globals": lambda self, x, w: helper(self.ops[ORDER[0]](x)) * SETTINGS["skip"],
    "by its helper": lambda self, x, w: self.helper(self.ops[self.table["first"]](x)),
    "softmax": lambda self, x, w: self.mixed(x, F.softmax(w, dim=-1)),
    "temperature": lambda self, x, w: self.mixed(x, ((w - 0.5) / self.scale).sigmoid()),
    "scaled": lambda self, x, w: math.sqrt(4.0) * self.mixed(x, w[[2, 0, 1]]),
    "its own logits": lambda self, x, w: self.mixed(x, self.alpha.softmax(0) + w),
    "a stack": lambda self, x, w: self.mixed(x, torch.stack([w[2], w[0] * w[1], w.sum()])),
    "nodes": nodes,
    "all nodes": all_nodes,
    "a matrix": lambda self, x, w: self.mixed(x, w.view(1, 3)[0]),
    "without zeros": lambda self, x, w: sum(a * o(x) for a, o in zip(w, self.ops) if a != 0),
    **PARTIAL,
}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", PLANNED)
def test_each_call_is_as_by_the_own_forward(name, layout):
    eager, fused = holder(PLANNED[name])
    for call in range(4):
        for module in (eager, fused):
            module.train(call != 2)
        assert_alike(eager, fused, inputs(call, layout=layout))
    assert planned(fused) == 2  # one in each mode


def test_python_of_the_module_is_left_out():
    """The forward is run by the first call, once more without values, and then no more."""
    runs = []

    def forward(self, x, w):
        count(self)
        return self.mixed(x, w)

    def count(module):  # as the code has it now; what it is exchanged for is not looked into
        return module

    eager, fused = holder(forward)
    fused(*inputs())
    cell = next(c for c in forward.__closure__ if c.cell_contents is count)
    known = vars(fused)["forward"].args[1].plans.seen[True].constants.cells
    known[:] = [(c, value) for c, value in known if c is not cell]
    cell.cell_contents = runs.append
    fused(*inputs())
    assert runs == []
    eager(*inputs())
    assert len(runs) == 1


# ---- forwards that may do something else in the next call, by which they run themselves


def drawn(self, x, w):
    return self.mixed(x, w) * (2.0 if random.random() < 0.5 else 3.0)


def dropped(self, x, w):
    return self.mixed(x, F.dropout(w, 0.5, self.training))


def by_value(self, x, w):
    return w.max() * self.ops[int(w.argmax())](x)


def by_threshold(self, x, w):
    return sum(a * op(x) for a, op in zip(w, self.ops) if a > 0.4)


def by_image(self, x, w):
    return self.mixed(x, w) if x.sum() > 0 else self.ops[0](x)


def by_buffer(self, x, w):
    return self.mixed(x, w) if self.alpha[0] > 0 else self.ops[0](x)


def caught(self, x, w):
    try:
        large = bool(w[0] > 0.5)
    except RuntimeError:
        large = False
    return self.mixed(x, w) if large else self.ops[0](x)


def counted(self, x, w):
    self.scale += 1
    return self.scale * self.mixed(x, w)


def logged(self, x, w):
    self.listed.append(len(self.listed))
    return len(self.listed) * self.mixed(x, w)


def in_evaluation(self, x, w):
    self.ops[0].eval()
    y = self.mixed(x, w)
    self.ops[0].train(self.training)
    return y


def without_graph(self, x, w):
    with torch.no_grad():
        first = self.ops[0](x)
    return first + w[1] * self.ops[1](x)


def by_mode_of_torch(self, x, w):
    return self.mixed(x, w) if torch.is_grad_enabled() else self.ops[0](x)


REFUSED = {
    "random numbers": drawn,
    "dropout": dropped,
    "the largest weight": by_value,
    "large weights": by_threshold,
    "the image": by_image,
    "its buffer": by_buffer,
    "an exception": caught,
    "counts": counted,
    "keeps a list": logged,
    "sets a mode": in_evaluation,
    "without a graph": without_graph,
    "reads a mode": by_mode_of_torch,
    "cut off": lambda self, x, w: self.mixed(x, w.detach()),
    "data": lambda self, x, w: self.mixed(x, w.data),
    "clamped in place": lambda self, x, w: self.mixed(x, (w * 2).clamp_(max=0.5)),
    "drawn weights": lambda self, x, w: self.mixed(x, F.gumbel_softmax(w)),
    "prints": lambda self, x, w: (print("called"), self.mixed(x, w))[1],
    "an unused output": lambda self, x, w: (self.ops[0](x), self.ops[1](x) * w[1])[1],
    "imports": lambda self, x, w: __import__("math").sqrt(4.0) * self.mixed(x, w),
    "an activation": lambda self, x, w: F.relu(self.mixed(x, w)),
    "changes its argument": lambda self, x, w: self.mixed(x.mul_(2), w),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_may_do_something_else_runs_itself(name, capsys):
    eager, fused = holder(REFUSED[name])
    for call in range(4):
        if name == "changes its argument":  # a leaf cannot be changed in place
            (x, w), (x2, w2) = inputs(call), inputs(call)
            torch.testing.assert_close(fused(x * 1, w), eager(x2 * 1, w2))
        else:
            assert_alike(eager, fused, inputs(call))
    if name == "prints":
        assert capsys.readouterr().out.count("called") == 8
    if name == "reads a mode":
        with torch.no_grad():
            torch.testing.assert_close(fused(*inputs()), eager(*inputs()))
    assert planned(fused) == 0


@pytest.mark.parametrize("zeros", [(0,), (1,), (0, 2), (1, 2)])
def test_which_weights_are_zero_is_seen_in_each_call(zeros):
    eager, fused = holder(PLANNED["without zeros"])
    for given in ((), zeros, (), zeros, (2,)):
        assert_alike(eager, fused, inputs(1, given))
    assert planned(fused) == (3 if zeros != (2,) else 2)


# ---- what changes between calls


class Constant(nn.Module):
    def forward(self, x):
        return torch.ones_like(x)


def rebinds(module):
    global FACTOR
    FACTOR += 1.0


def scaled_by_three(module, x, w):
    return 3 * module.mixed(x, w)


def hook(module, args, output):
    return 2 * output


CHANGES = {
    "a setting": ("by settings", lambda m: setattr(m, "scale", m.scale + 1)),
    "a list": ("by settings", lambda m: m.listed.reverse()),
    "a dict": ("by its helper", lambda m: m.table.update(first=1)),
    "a global": ("by globals", rebinds),
    "a global list": ("by globals", lambda m: ORDER.reverse()),
    "a global dict": ("by globals", lambda m: SETTINGS.update(skip=SETTINGS["skip"] + 1)),
    "its helper": ("by its helper", lambda m: setattr(m, "helper", lambda y: 5 * y)),
    "its forward": ("a sum", lambda m: setattr(type(m), "forward", scaled_by_three)),
    "a method": ("a sum", lambda m: setattr(type(m), "mixed", lambda self, x, w: self.ops[0](x))),
    "a candidate": ("a sum", lambda m: m.ops.__setitem__(0, SepConv(C, 5, 1).double())),
    "a foreign candidate": ("a sum", lambda m: m.ops.__setitem__(2, Constant())),
    "one more": ("a sum", lambda m: m.ops.append(DilConv(C, 3, 1).double())),
    "a hook on it": ("a sum", lambda m: m.register_forward_hook(hook)),
    "a hook on a candidate": ("a sum", lambda m: m.ops[0].register_forward_hook(hook)),
    "a hook inside": ("a sum", lambda m: m.ops[0].op[-1].register_forward_hook(hook)),
    "its logits": ("its own logits", lambda m: new_logits(m)),
    "values of its logits": ("its own logits", lambda m: m.alpha.data.mul_(2)),
    "a parameter": ("a sum", lambda m: new_parameter(m.ops[0].op[1])),
    "its values": ("a sum", lambda m: m.ops[0].op[1].weight.data.mul_(2)),
    "a frozen parameter": ("a sum", lambda m: m.ops[0].op[1].weight.requires_grad_(False)),
    "a momentum": ("a sum", lambda m: setattr(m.ops[0].op[-1], "momentum", 0.7)),
    "an eps": ("a sum", lambda m: [setattr(p, "eps", 0.1) for p in norms(m)]),
    "frozen norms": ("a sum", lambda m: [p.eval() for p in norms(m)]),
}


def norms(module):
    return [part for part in module.modules() if isinstance(part, nn.BatchNorm2d)]


def new_logits(module):
    module.alpha = nn.Parameter(torch.tensor([1.0, 0.0, 2.0]).double())


def new_parameter(conv):
    conv.weight = nn.Parameter(conv.weight.detach() * 3)


@pytest.fixture
def _globals_put_back(monkeypatch):
    monkeypatch.setitem(globals(), "FACTOR", FACTOR)
    order, settings = list(ORDER), dict(SETTINGS)
    yield
    ORDER[:] = order
    SETTINGS.update(settings)


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.usefixtures("_globals_put_back")
def test_a_change_between_calls_is_seen(name):
    body, change = CHANGES[name]
    eager, fused = holder(PLANNED[body])
    assert_alike(eager, fused)
    assert_alike(eager, fused)
    torch.manual_seed(7)
    change(eager)
    if name not in ("a global", "a global list", "a global dict", "its forward", "a method"):
        torch.manual_seed(7)
        change(fused)
    for call in range(3):
        if name == "a frozen parameter":
            given = inputs(call)
            torch.testing.assert_close(fused(*given), eager(*given))
        else:
            assert_alike(eager, fused, inputs(call))


def test_what_changes_in_each_call_is_left_to_itself():
    def forward(self, x, w, step=0):
        return (1 + step) * self.mixed(x, w)

    eager, fused = holder(forward)
    for step in range(MOST + 3):
        assert_alike(eager, fused, inputs(step), step)
    plans = vars(fused)["forward"].args[1].plans
    assert plans.left == 0 and planned(fused) <= MOST


def test_other_shapes_have_programs_of_their_own():
    def forward(self, x, w):
        return self.mixed(x, w) if x.shape[0] == 3 else self.ops[0](x) * w[1]

    eager, fused = holder(forward)
    x, w = inputs()
    for given in ((x, w), (x[:2].detach().requires_grad_(), w), (x, w)):
        assert_alike(eager, fused, given)
    assert planned(fused) == 2


# ---- modes, copies, memory


def test_modes_of_torch():
    eager, fused = holder(PLANNED["nodes"])
    assert_alike(eager, fused)
    with torch.no_grad():
        torch.testing.assert_close(fused(*inputs(1)), eager(*inputs(1)))
    with torch.inference_mode():
        torch.testing.assert_close(fused(*inputs(2)), eager(*inputs(2)))
    assert_same_state(eager, fused)
    given = [t.detach().float() for t in inputs(3)]
    eager.float(), fused.float()
    with torch.autocast("cpu"):
        mine, expected = fused(*given), eager(*given)
    assert mine.dtype == expected.dtype
    torch.testing.assert_close(mine, expected, rtol=0.05, atol=0.05)


def test_exchanged_parameters():
    eager, fused = holder(PLANNED["a sum"])
    fused(*inputs())
    eager(*inputs())
    other = {name: 2 * p.detach() for name, p in eager.named_parameters()}
    for _ in range(2):
        y, expected = (torch.func.functional_call(m, other, inputs(1)) for m in (fused, eager))
        torch.testing.assert_close(y, expected)
        assert_alike(eager, fused)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_have_plans_of_their_own(copied):
    eager, fused = holder(PLANNED["all nodes"])
    assert_alike(eager, fused)
    other = copied(fused)
    assert planned(other) == 0
    for call in range(2):
        assert_alike(eager, fused, inputs(call))
        state(other, inputs(call))
    assert planned(other) == 1
    assert_same_state(fused, other)


def test_a_node_inside_is_needed_again():
    """Two sums of one output: its inner nodes have no values after the first was computed."""
    eager, fused = holder(PLANNED["nodes"])
    outer = [nn.Sequential() for _ in range(2)]
    for module, around in zip((eager, fused), outer):
        around.inner = module
        around.forward = lambda x, w, m=module: (2 * (y := m(x, w))).relu() + y
    for call in range(3):
        assert_alike(*outer, inputs(call))


def test_nothing_is_kept_beyond_its_use():
    _, fused = holder(PLANNED["nodes"])
    fused(*inputs())
    gc.collect()
    gc.disable()
    try:
        x, w = inputs(1)
        y = fused(x * 1, w)
        seen = weakref.ref(y)
        kept = [weakref.ref(x), weakref.ref(w)]
        y.sum().backward()
        del x, w, y
        assert seen() is None and all(ref() is None for ref in kept)
    finally:
        gc.enable()


def test_a_change_of_weights_before_their_use_is_an_error():
    """As of a product that the module's own forward makes: eager reads weights at once."""
    _, fused = holder(PLANNED["a sum"])
    outer = nn.Sequential()
    outer.inner = fused
    x, w = inputs()
    fused(x, w)
    around = vars(fused)["forward"].args[1]
    around.outermost = False  # as inside of a network
    w = w.detach().clone()
    y = fused(x, w)
    w.mul_(2)
    with pytest.raises(RuntimeError, match="was changed before the sum"):
        y.sum()
