"""Whatever is changed in a module after its first call, the next call gives eager's results."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from accelerated import C, assert_same, cell, cell_inputs, edge_inputs, observed
from accelerated import (
    calls as calls,
)
from public_darts import Cell, MixedOp, SepConv
from torch import nn
from torch.nn.utils import parametrizations, prune

import fastnas
from fastnas import nn as own
from fastnas import reference
from fastnas.nn import reading
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


def scaled(module):
    norm = module.get_submodule(AVG)[1]
    norm.weight = nn.Parameter(torch.linspace(1, 2, C).double())
    norm.bias = nn.Parameter(torch.linspace(-1, 0, C).double())


def shifted(module):
    conv = module.get_submodule(SEP).op[2]
    conv.bias = nn.Parameter(torch.linspace(-1, 1, C).double())


def renewed(module):
    conv = module.get_submodule(DIL).op[1]
    conv.weight = nn.Parameter(3 * conv.weight.detach())


def with_other_statistics(module):
    norm = module.get_submodule(MAX)[1]
    norm.running_mean, norm.running_var = norm.running_mean + 1, norm.running_var * 2


def without_statistics(module):
    norm = module.get_submodule(MAX)[1]
    norm.running_mean = norm.running_var = norm.num_batches_tracked = None


def less_dilated(module):
    conv = module.get_submodule(DIL).op[1]
    conv.dilation = conv.padding = (1, 1)


def at_other_edges(module):
    conv = module.get_submodule(SEP).op[1]
    conv.padding_mode, conv._reversed_padding_repeated_twice = "reflect", [1, 1, 1, 1]


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


def with_statistics_that_are_no_buffers(module):
    norm = module.get_submodule(AVG)[1]
    mean = norm.running_mean + 1
    del norm.running_mean
    norm.running_mean = mean


def of_a_subclass(module):
    part = module.get_submodule(SEP)
    kind = type(part)
    part.__class__ = type(kind.__name__, (kind,), {"forward": lambda m, x: 2 * kind.forward(m, x)})


def hooked(path, register, hook, **options):
    return lambda module: getattr(module.get_submodule(path), register)(hook, **options)


def leaky(module):
    module.get_submodule(SEP).op[0] = nn.LeakyReLU(0.5)


def with_another_layer(module):
    module.get_submodule(SEP).op.append(nn.Tanh())


def with_another_norm(module):
    module.get_submodule(AVG)[1] = nn.InstanceNorm2d(C)


def with_a_parameter(module):
    module.get_submodule(SKIP).scale = nn.Parameter(torch.ones(1).double())


def of_another_kernel(module):
    module.get_submodule("_ops.1")._ops[4] = torch_seeded(lambda: SepConv(C, 5, 1).double())


def torch_seeded(make):
    torch.manual_seed(3)
    return make()


CHANGES = {
    "cumulative statistics": every_norm(momentum=None),
    "another momentum": every_norm(momentum=0.3),
    "momentum 0": every_norm(momentum=0.0),
    "momentum of one": one(AVG + ".1", momentum=0.3),
    "another eps": every_norm(eps=0.1),
    "eps of one": one(SEP + ".op.3", eps=0.1),
    "statistics of batches": every_norm(track_running_stats=False),
    "statistics of batches in one": one(DIL + ".op.3", track_running_stats=False),
    "statistics removed": without_statistics,
    "statistics exchanged": with_other_statistics,
    "statistics in attributes": with_statistics_that_are_no_buffers,
    "batches not counted": one(AVG + ".1", num_batches_tracked=None),
    "scale and shift": scaled,
    "a frozen norm": lambda m: m.get_submodule(AVG).eval(),
    "a frozen norm of the preprocessing": lambda m: m.preprocess0.eval(),
    "a bias": shifted,
    "weights exchanged": renewed,
    "weights frozen": lambda m: m.get_submodule(SEP).requires_grad_(False),
    "weight_norm": lambda m: parametrizations.weight_norm(m.get_submodule(SEP).op[2]),
    "weight_norm by a hook": lambda m: nn.utils.weight_norm(m.get_submodule(SEP).op[2]),
    "spectral_norm": lambda m: torch_seeded(
        lambda: parametrizations.spectral_norm(m.get_submodule(SEP).op[6])
    ),
    "prune": lambda m: prune.l1_unstructured(m.get_submodule(DIL).op[2], "weight", 0.5),
    "dilation": less_dilated,
    "padding_mode": at_other_edges,
    "count_include_pad": one(AVG + ".0", count_include_pad=True),
    "divisor_override": one(AVG + ".0", divisor_override=4),
    "kernel of a pool": one(MAX + ".0", kernel_size=5, padding=2),
    "forward of an operation": own_forward(SKIP),
    "forward of a layer": own_forward(SEP + ".op.5"),
    "forward of a norm": own_forward(AVG + ".1"),
    "forward of the preprocessing": own_forward("preprocess1"),
    "what a convolution calls": own_method(SEP + ".op.2", "_conv_forward"),
    "what calls an operation": own_method(SEP, "_call_impl"),
    "what calls a mixed op": own_method("_ops.3", "_call_impl"),
    "another class": of_a_subclass,
    "a layer exchanged": leaky,
    "a layer more": with_another_layer,
    "a norm exchanged": with_another_norm,
    "an operation exchanged": of_another_kernel,
    "an operation of another class": lambda m: m._ops[1]._ops.__setitem__(4, nn.Softplus()),
    "a parameter more": with_a_parameter,
    "forward hook": hooked(SEP, "register_forward_hook", lambda m, x, y: 2 * y),
    "forward hook with keywords": hooked(
        DIL + ".op.3", "register_forward_hook", lambda m, x, k, y: 2 * y, with_kwargs=True
    ),
    "forward pre-hook": hooked(
        SEP + ".op.1", "register_forward_pre_hook", lambda m, x: (2 * x[0],)
    ),
    "backward hook": hooked(
        SEP + ".op.2", "register_full_backward_hook", lambda m, dx, dy: (2 * dx[0],)
    ),
    "hook of a mixed op": hooked("_ops.3", "register_forward_hook", lambda m, x, y: 2 * y),
    "forward of a mixed op": own_forward("_ops.3"),
    "hook of none": hooked("_ops.3._ops.0", "register_forward_hook", lambda m, x, y: y + 1),
    "backward pre-hook": hooked(
        "preprocess0", "register_full_backward_pre_hook", lambda m, dy: (2 * dy[0],)
    ),
}


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


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("twins", ["fastnas", "accelerate"], indirect=True)
def test_a_cell(twins, name):
    eager, fused, inputs = twins
    for module in (eager, fused):
        CHANGES[name](module)
    assert_alike(eager, fused, inputs)


SUM_CHANGES = {
    "cumulative statistics": every_norm(momentum=None),
    "momentum of one": one("_ops.2.op.2", momentum=0.3),
    "eps of one": one("_ops.2.op.2", eps=0.1),
    "statistics of batches": every_norm(track_running_stats=False),
    "statistics removed": one("_ops.2.op.2", running_mean=None, running_var=None),
    "scale": lambda m: setattr(m._ops[0].op[2], "weight", nn.Parameter(2 * torch.ones(C).double())),
    "shift": lambda m: setattr(m._ops[3][2], "bias", nn.Parameter(torch.ones(C).double())),
    "a frozen norm": lambda m: m._ops[0].eval(),
    "forward of an operation": own_forward("_ops.0"),
    "forward of its layers": own_forward("_ops.0.op"),
    "forward of a norm": own_forward("_ops.3.2"),
    "what calls a norm": own_method("_ops.3.2", "_call_impl"),
    "forward hook": hooked("_ops.3", "register_forward_hook", lambda m, x, y: 2 * y),
    "hook of a norm": hooked("_ops.2.op.2", "register_forward_hook", lambda m, x, y: 2 * y),
    "another class": lambda m: setattr(m._ops[0], "__class__", Doubled),
    "a layer more": lambda m: m._ops[0].op.append(nn.Tanh()),
    "an operation exchanged": lambda m: m._ops.__setitem__(0, nn.Softplus()),
    "an operation of another class": lambda m: m._ops.__setitem__(
        0, torch_seeded(lambda: Doubled().double())
    ),
    "an operation more": lambda m: (m._ops.append(nn.Softplus()), m._ops.pop(1)),
}


class Doubled(Dense):
    def forward(self, x):
        return 2 * self.op(x)


@pytest.mark.parametrize("name", SUM_CHANGES)
@pytest.mark.parametrize("twins", ["sums"], indirect=True)
def test_a_sum(twins, name):
    eager, fused, inputs = twins
    for module in (eager, fused):
        SUM_CHANGES[name](module)
    assert_alike(eager, fused, inputs)


# ---- what is changed for all modules at once


def doubled(forward):
    return lambda module, *x: 2 * forward(module, *x)


@pytest.mark.parametrize(
    ("kind", "method"),
    [
        (nn.Conv2d, "forward"),
        (nn.BatchNorm2d, "forward"),
        (nn.Sequential, "forward"),
        (nn.Conv2d, "_conv_forward"),
        (nn.Module, "_call_impl"),
        (nn.Module, "__call__"),
    ],
)
@pytest.mark.parametrize("twins", KINDS, indirect=True)
def test_a_method_of_a_class_of_torch(twins, kind, method, monkeypatch):
    monkeypatch.setattr(kind, method, doubled(getattr(kind, method)))
    assert_alike(*twins)


@pytest.mark.parametrize("twins", KINDS, indirect=True)
def test_the_forward_of_a_class(twins, monkeypatch):
    eager, _, _ = twins
    part = eager._ops[0] if isinstance(eager._ops[0], Dense) else eager.get_submodule(SEP)
    monkeypatch.setattr(type(part), "forward", doubled(type(part).forward))
    assert_alike(*twins)


@pytest.mark.parametrize("twins", KINDS, indirect=True)
def test_a_hook_of_all_modules(twins):
    seen = []

    def hook(module, x, y):
        seen.append(type(module))
        return 2 * y if isinstance(module, nn.BatchNorm2d) else None

    eager, fused, inputs = twins
    with nn.modules.module.register_module_forward_hook(hook):
        assert_alike(eager, fused, inputs)
        assert_calls(eager, fused, inputs, seen)
    calls = len(seen)
    assert_alike(eager, fused, inputs)
    assert len(seen) == calls


def assert_calls(eager, fused, inputs, seen):
    """The fused module calls as many modules of each torch class as the eager one does."""
    counts = []
    for module in (eager, fused):
        seen.clear()
        module(*inputs)
        counts.append([sum(kind is k for k in seen) for kind in (nn.Conv2d, nn.BatchNorm2d)])
    assert counts[0] == counts[1] != [0, 0]


# ---- what a subclass of ours overrides


class OfTwice(own.MixedOp):
    def forward(self, x, w):
        return 2 * super().forward(x, w)


class SumOfTwice(own.MixedOp):
    def reduce(self, *arguments):
        return 2 * super().reduce(*arguments)


class MixOfTwice(own.MixedOp):
    def mix(self, *arguments):
        return 2 * super().mix(*arguments)


class EagerTwice(reference.MixedOp):
    def forward(self, x, w):
        return 2 * super().forward(x, w)


def cell_of(base, kind):
    return type("Cell", (base,), {"mixed_op": kind})(SPACE, "normal", 6, 8, C, False).double()


@pytest.mark.parametrize("kind", [OfTwice, SumOfTwice, MixOfTwice])
def test_what_a_subclass_overrides_is_run(kind):
    eager, fused = cell_of(reference.Cell, EagerTwice), cell_of(own.Cell, kind)
    fused.load_state_dict(eager.state_dict())
    assert_alike(eager, fused, cell_inputs())


# ---- settings of a user's own classes


class Scaled(Cell):
    def __init__(self, *args, scale=1.0):
        super().__init__(*args)
        self.scale = scale

    def forward(self, s0, s1, weights):
        return self._scaled(super().forward(s0, s1, weights))

    def _scaled(self, y):
        return self.scale * y


@pytest.fixture
def scaled_cells(request):
    eager = Scaled(2, 2, 6, 8, C, False, False).double()
    fused = copy.deepcopy(eager)
    assert not fastnas.accelerate(fused).left
    return eager, fused, cell_inputs()


@pytest.mark.parametrize("duplicate", [lambda m: m, copy.deepcopy, pickled])
def test_a_setting_changed_since_the_check(scaled_cells, calls, duplicate):
    eager, fused, inputs = scaled_cells
    eager.scale = fused.scale = 2.0
    fused = duplicate(fused)
    calls.clear()
    assert_alike(eager, fused, inputs)
    assert not calls
    eager.scale = fused.scale = 1.0
    assert_alike(eager, fused, inputs)
    assert calls["run_cell"]


def test_a_helper_of_a_class(scaled_cells, monkeypatch):
    monkeypatch.setattr(Scaled, "_scaled", lambda module, y: 3 * y)
    assert_alike(*scaled_cells)


def test_a_helper_of_one_module(scaled_cells):
    eager, fused, inputs = scaled_cells
    eager._scaled = fused._scaled = lambda y: 3 * y
    assert_alike(eager, fused, inputs)


def test_marks_that_libraries_leave_are_no_settings(scaled_cells, calls):
    eager, fused, inputs = scaled_cells
    fused._is_wrapped = fused._ops[1]._is_wrapped = True
    calls.clear()
    assert_alike(eager, fused, inputs)
    assert calls["run_cell"]


def test_an_array_as_a_setting(scaled_cells):
    """Arrays have no one truth value to be compared by."""
    eager, fused, inputs = scaled_cells
    for module in (eager, fused):
        module._ops[0].mask = torch.ones(3)
        module(*inputs)
    for module in (eager, fused):
        module._ops[0].mask = torch.zeros(3)
    assert_alike(eager, fused, inputs)


# ---- what it costs


@pytest.mark.parametrize("twins", KINDS, indirect=True)
def test_modes_and_weights_may_change_without_reading_again(twins, monkeypatch):
    _, fused, inputs = twins
    read = []
    monkeypatch.setattr(reading, "Facts", lambda *parts: read.append(parts))
    with torch.no_grad():
        for p in fused.parameters():
            p.add_(1)
        for training in (False, True, False, True):
            fused.train(training)
            fused(*inputs)
    assert not read


@pytest.mark.parametrize("twins", ["fastnas", "accelerate"], indirect=True)
def test_update_bn_of_torch(twins):
    """It sets every momentum to None, and back."""
    eager, fused, inputs = twins
    data = [torch.randn_like(inputs[0]) for _ in range(3)]
    for module in (eager, fused):
        wrapped = OfOneInput(module, *inputs[1:])
        torch.optim.swa_utils.update_bn(data, wrapped)
    assert_alike(eager, fused, inputs)


class OfOneInput(nn.Module):
    def __init__(self, cell, *others):
        super().__init__()
        self.cell = cell
        self.others = others

    def forward(self, s0):
        return self.cell(s0, *self.others)
