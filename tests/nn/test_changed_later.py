"""Whatever is changed in a module after its first call, the next call gives eager's results."""

from __future__ import annotations

import copy

import pytest
import torch
from accelerated import C, assert_same, cell, cell_inputs, edge_inputs, observed
from public_darts import NoisySkip, SepConv
from torch import nn
from torch.nn.modules import module as torch_module
from torch.nn.utils import parametrizations, prune

import fastnas
from fastnas import nn as own
from fastnas import reference
from fastnas.nn import forwards
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


def with_sums():
    """A cell that was left, its mixed ops on `mixed_norm_sum`: no candidate is of DARTS."""
    eager = cell()
    for edge in eager._ops:
        for k, op in enumerate(edge._ops):
            if isinstance(op, SepConv):
                edge._ops[k] = NoisySkip(op, 0.0)
            elif isinstance(op, nn.Sequential):
                op[0].ceil_mode = True
            else:
                edge._ops[k] = nn.Sequential(op, nn.Softplus(), nn.BatchNorm2d(C, affine=False))
    eager = eager.double()
    fused = copy.deepcopy(eager)
    report = fastnas.accelerate(fused)
    assert all("mixed_norm_sum" in what for _, what in report.replaced) and report.replaced
    return eager, fused, cell_inputs()


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
    "backward pre-hook": hooked(
        "preprocess0", "register_full_backward_pre_hook", lambda m, dy: (2 * dy[0],)
    ),
}


def assert_alike(eager, fused, inputs):
    """In training, twice, so that what the first left behind shows, and in evaluation mode."""
    for _ in range(2):
        assert_same(observed(fused, inputs), observed(eager, inputs))
    eager.eval(), fused.eval()
    with torch.no_grad():
        assert_same([fused(*inputs)], [eager(*inputs)])
    eager.train(), fused.train()


KINDS = {"fastnas": of_fastnas, "accelerate": of_the_public_code, "sums": with_sums}
ONLY_OF_CELLS = {
    name for name, change in CHANGES.items() if name not in ()
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("kind", ["fastnas", "accelerate"])
def test_a_cell(kind, name):
    eager, fused, inputs = KINDS[kind]()
    assert_alike(eager, fused, inputs)
    for module in (eager, fused):
        CHANGES[name](module)
    assert_alike(eager, fused, inputs)
