"""Whatever is changed in a module after its first call, the next call gives eager's results."""

from __future__ import annotations

import pytest
import torch
from accelerated import C
from changed import (
    AVG,
    DIL,
    MAX,
    SEP,
    SKIP,
    Dense,
    assert_alike,
    every_norm,
    hooked,
    one,
    own_forward,
    own_method,
    torch_seeded,
)
from changed import made as made
from changed import twins as twins
from public_darts import SepConv
from torch import nn
from torch.nn.utils import parametrizations, prune


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


def with_statistics_that_are_no_buffers(module):
    norm = module.get_submodule(AVG)[1]
    mean = norm.running_mean + 1
    del norm.running_mean
    norm.running_mean = mean


def of_a_subclass(module):
    part = module.get_submodule(SEP)
    kind = type(part)
    part.__class__ = type(kind.__name__, (kind,), {"forward": lambda m, x: 2 * kind.forward(m, x)})


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
