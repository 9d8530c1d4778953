"""Reading modules by structure: what is a DARTS candidate, mixed op or cell, and what is not."""

import re

import pytest
import torch
from public_darts import (
    PRIMITIVES,
    WITHOUT_NONE,
    Cell,
    DilConv,
    FactorizedReduce,
    Identity,
    MixedOp,
    NoisySkip,
    ReLUConvBN,
    SepConv,
    Zero,
    operation,
)
from torch import nn

from fastnas import reference
from fastnas.dropin.cells import cell_parts, mixed_op_parts
from fastnas.dropin.recognise import candidate, preprocess
from fastnas.spaces import get_space

C = 4


def plain_cell(reduction=False, reduction_prev=False, **options):
    return Cell(4, 4, 12, 16, C, reduction, reduction_prev, **options)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("name", [*PRIMITIVES, "sep_conv_7x7"])
def test_every_candidate_of_the_public_code(name, stride):
    module = operation(name, C, stride)
    found = candidate(module)
    assert (found.name, found.stride) == (name, stride)
    expected = {
        kind: tuple(m for m in module.modules() if type(m) is kind)
        for kind in (nn.Conv2d, nn.BatchNorm2d)
    }
    assert found.convs == expected[nn.Conv2d]
    assert found.norms == expected[nn.BatchNorm2d]


def test_frozen_parameters_and_other_class_names_are_fine():
    class Whatever(SepConv):
        pass

    assert candidate(Whatever(C, 3, 1).requires_grad_(False)).name == "sep_conv_3x3"
    assert candidate(SepConv(C, 3, 2).op).stride == 2
    assert candidate(nn.Identity()).name == "skip_connect"


def changed(module, path, **fields):
    for field, value in fields.items():
        setattr(module.get_submodule(path), field, value)
    return module


def hooked(module, path, register):
    getattr(module.get_submodule(path), register)(lambda *_: None)
    return module


def sequential(*changes, of):
    layers = list(of.op)
    for k, layer in changes:
        layers[k] = layer
    return nn.Sequential(*layers)


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (nn.Linear(3, 3), "Linear is not laid out as an operation of DARTS"),
        (nn.Conv2d(3, 3, 1), "Conv2d is not laid out"),
        (NoisySkip(Identity(), 0.2), "NoisySkip is not laid out"),
        (nn.Sequential(), "Sequential is not laid out"),
        (Zero(3), "stride is 3; 1 or 2 is needed"),
        (nn.Sequential(nn.MaxPool2d(3, 1, 1)), "Sequential is not laid out"),
        (nn.Sequential(nn.MaxPool2d(3, 1, 1), nn.BatchNorm2d(C)), "affine True"),
        (
            nn.Sequential(nn.MaxPool2d(2, 1, 1), nn.BatchNorm2d(C, affine=False)),
            r"max_pool_3x3 has kernel_size \(2, 2\); \(3, 3\) is needed",
        ),
        (
            nn.Sequential(nn.AvgPool2d(3, 1, 1), nn.BatchNorm2d(C, affine=False)),
            "avg_pool_3x3 has count_include_pad True; False is needed",
        ),
        (
            nn.Sequential(nn.MaxPool2d(3, 1, 1), nn.BatchNorm2d(C, affine=False, momentum=None)),
            "momentum None",
        ),
        (
            nn.Sequential(
                nn.AvgPool2d(3, 1, 1, count_include_pad=False),
                nn.BatchNorm2d(C, affine=False, track_running_stats=False),
            ),
            "track_running_stats False",
        ),
        (SepConv(C, 9, 1), r"sep_conv has kernel 9; one of \(3, 5, 7\) is needed"),
        (SepConv(C, 3, 3), "stride is 3"),
        (changed(SepConv(C, 3, 1), "op.3", eps=1e-3), "batch norms differ in eps"),
        (changed(SepConv(C, 3, 1), "op.0", inplace=True), "first ReLU overwrites the input"),
        (changed(SepConv(C, 3, 1), "op.5", stride=(2, 2)), r"stride \(2, 2\); \(1, 1\)"),
        (changed(DilConv(C, 5, 1), "op.1", padding=(2, 2)), r"padding \(2, 2\); \(4, 4\)"),
        (changed(DilConv(C, 3, 1), "op.1", padding_mode="reflect"), "padding_mode reflect"),
        (
            sequential((2, nn.Conv2d(C, C, 1)), of=DilConv(C, 3, 1)),
            "pointwise convolution has a bias",
        ),
        (
            sequential((1, nn.Conv2d(C, C, 3, 1, 2, 2, bias=False)), of=DilConv(C, 3, 1)),
            "depthwise convolution has groups 1; 4 is needed",
        ),
        (
            sequential((5, nn.Conv2d(C, C, 5, 1, 2, groups=C, bias=False)), of=SepConv(C, 3, 1)),
            r"depthwise convolution has kernel_size \(5, 5\); \(3, 3\) is needed",
        ),
        (FactorizedReduce(6, C), "convolution has in_channels 6; 4 is needed"),
        (
            hooked(SepConv(C, 3, 1), "op.1", "register_forward_pre_hook"),
            r"Conv2d \(op.1\) has hooks",
        ),
        (hooked(Identity(), "", "register_forward_hook"), "Identity has hooks"),
        (hooked(DilConv(C, 3, 1), "op", "register_full_backward_hook"), r"\(op\) has hooks"),
        (changed(DilConv(C, 3, 1), "op.3", forward=abs), "has a forward of its own instance"),
    ],
)
def test_why_a_module_is_no_candidate(module, reason):
    found = candidate(module)
    assert isinstance(found, str) and re.search(reason, found), found


def test_a_parametrised_convolution_is_foreign():
    module = SepConv(C, 3, 1)
    nn.utils.parametrizations.weight_norm(module.op[2])
    assert "not laid out" in candidate(module)


def test_own_parameters_beside_the_layers_are_foreign():
    module = SepConv(C, 3, 1)
    module.scale = nn.Parameter(torch.ones(1))
    assert "not laid out" in candidate(module)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("primitives", [PRIMITIVES, WITHOUT_NONE])
def test_mixed_op(primitives, stride):
    parts = mixed_op_parts(MixedOp(C, stride, primitives))
    assert tuple(c.name for c in parts.candidates) == primitives
    assert parts.stride == stride and not parts.foreign
    assert len(parts.norms) == (8 if stride == 1 else 9)


def test_mixed_op_names_its_foreign_candidates():
    op = MixedOp(C, 2, WITHOUT_NONE, noise=0.2)
    op._ops[0] = nn.Linear(3, 3)
    parts = mixed_op_parts(op)
    assert [k for k, c in enumerate(parts.candidates) if c is None] == [0, 2]
    assert list(parts.foreign) == [0, 2]
    assert "Linear" in parts.foreign[0] and "NoisySkip" in parts.foreign[2]
    assert parts.stride == 2


def mixed(*ops):
    op = MixedOp(C, 1, ())
    op._ops.extend(ops)
    return op


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (nn.Linear(3, 3), "no ModuleList `_ops`"),
        (mixed(), "no ModuleList `_ops`"),
        (mixed(Zero(2), Identity()), r"candidates differ in stride: \[1, 2\]"),
        (mixed(SepConv(4, 3, 1), SepConv(6, 3, 1)), "differ in num_features: 4, 6"),
        (
            mixed(SepConv(4, 3, 1), changed(DilConv(4, 3, 1), "op.3", momentum=0.2)),
            "differ in momentum: 0.1, 0.2",
        ),
        (mixed(*[DilConv(4, 3, 1)] * 2), "a batch norm is used more than once"),
    ],
)
def test_why_a_module_is_no_mixed_op(module, reason):
    found = mixed_op_parts(module)
    assert isinstance(found, str) and re.search(reason, found), found


def test_preprocess():
    module = ReLUConvBN(6, C)
    found = preprocess(module)
    assert found.kind == "relu_conv_bn"
    assert found.convs == (module.op[1],) and found.norm is module.op[2]
    module = FactorizedReduce(6, C)
    found = preprocess(module)
    assert found.kind == "factorized_reduce"
    assert found.convs == (module.conv_1, module.conv_2) and found.norm is module.bn
    assert "neither" in preprocess(SepConv(C, 3, 1))
    assert "kernel_size (3, 3); (1, 1)" in preprocess(
        changed(ReLUConvBN(6, C), "op.1", kernel_size=(3, 3))
    )


@pytest.mark.parametrize("reduction", [False, True])
@pytest.mark.parametrize("reduction_prev", [False, True])
def test_cell(reduction, reduction_prev):
    cell = plain_cell(reduction, reduction_prev)
    parts = cell_parts(cell)
    assert parts.nodes == 4 and len(parts.edges) == 14
    kind = "factorized_reduce" if reduction_prev else "relu_conv_bn"
    assert (parts.preprocess0.kind, parts.preprocess1.kind) == (kind, "relu_conv_bn")
    starts = [i for node in range(4) for i in range(node + 2)]
    assert [e.stride for e in parts.edges] == [2 if reduction and i < 2 else 1 for i in starts]
    assert set(parts.norms) == {m for m in cell.modules() if type(m) is nn.BatchNorm2d}


@pytest.mark.parametrize("name", ["S0", "S2", "S3"])
def test_cell_of_the_reference(name):
    cell = reference.SearchNetwork(get_space(name), C, 10, 1).cells[0]
    assert cell_parts(cell).nodes == 4


def without_edge():
    cell = plain_cell()
    del cell._ops[13]
    return cell


def replaced(path, module):
    cell = plain_cell()
    parent, _, name = path.rpartition(".")
    setattr(cell.get_submodule(parent), name, module)
    return cell


@pytest.mark.parametrize(
    ("cell", "reason"),
    [
        (MixedOp(C, 1), "no preprocess0, preprocess1 and `_ops`"),
        (without_edge(), "13 edges make no whole number of nodes"),
        (Cell(4, 2, 12, 16, C, False, False), "_multiplier is 2; the 14 edges make 4 nodes"),
        (changed(plain_cell(), "", _steps=3), "_steps is 3"),
        (plain_cell(noise=0.2), "edge 0, candidate 3: NoisySkip is not laid out"),
        (replaced("_ops.5", SepConv(C, 3, 1)), "edge 5: SepConv has no ModuleList"),
        (replaced("_ops.5", MixedOp(C, 2)), "edge 5 has stride 2; 1 is needed"),
        (replaced("_ops.5", MixedOp(C, 1, WITHOUT_NONE)), r"number of candidates: \[7, 8\]"),
        (replaced("_ops.5", MixedOp(6, 1)), "differ in num_features: 4, 6"),
        (replaced("preprocess1", nn.Identity()), "preprocess1: Identity is neither"),
        (hooked(plain_cell(), "_ops.2", "register_forward_hook"), "edge 2 has hooks"),
        (changed(plain_cell(), "_ops.2", forward=abs), "edge 2 has a forward of its own"),
    ],
)
def test_why_a_module_is_no_cell(cell, reason):
    found = cell_parts(cell)
    assert isinstance(found, str) and re.search(reason, found), found
