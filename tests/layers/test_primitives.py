import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fastnas.layers.primitives import (
    FactorizedReduce,
    Identity,
    ReLUConvBN,
    primitive,
    search_candidate,
)
from fastnas.spaces import OPS, PARAMETER_FREE

STATISTICS = ["running_mean", "running_var", "num_batches_tracked"]
AFFINE = ["weight", "bias", *STATISTICS]


def norm(prefix, names):
    return {f"{prefix}.{name}" for name in names}


STATE = {
    "none": lambda bn: set(),
    "max_pool_3x3": lambda bn: set(),
    "avg_pool_3x3": lambda bn: set(),
    "noise": lambda bn: set(),
    "skip_connect": lambda bn: {"conv_1.weight", "conv_2.weight", *norm("bn", bn)},
    "sep_conv_3x3": lambda bn: {
        *("op.1.weight", "op.2.weight", "op.5.weight", "op.6.weight"),
        *norm("op.3", bn),
        *norm("op.7", bn),
    },
    "dil_conv_3x3": lambda bn: {"op.1.weight", "op.2.weight", *norm("op.3", bn)},
    "conv_7x1_1x7": lambda bn: {"1.weight", "2.weight", *norm("3", bn)},
}
STATE |= {f"sep_conv_{k}": STATE["sep_conv_3x3"] for k in ("5x5", "7x7")}
STATE |= {"dil_conv_5x5": STATE["dil_conv_3x3"]}


@pytest.mark.parametrize("name", OPS)
def test_state_dict_names_are_those_of_darts(name):
    assert set(primitive(name, 4, 2, affine=True).state_dict()) == STATE[name](AFFINE)
    assert set(primitive(name, 4, 2, affine=False).state_dict()) == STATE[name](STATISTICS)


def test_state_dict_names_of_the_preprocessing():
    expected = {"op.1.weight", *norm("op.2", AFFINE)}
    assert set(ReLUConvBN(6, 4, 1, 1, 0).state_dict()) == expected
    assert set(FactorizedReduce(6, 4).state_dict()) == STATE["skip_connect"](AFFINE)


@pytest.mark.parametrize("name", OPS)
def test_only_some_operations_have_parameters(name):
    assert (name in PARAMETER_FREE) == (not list(primitive(name, 4, 1, True).parameters()))


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (5, 4), (7, 7), (8, 8)])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("name", OPS)
def test_shapes(name, stride, size):
    x = torch.randn(3, 4, *size, dtype=torch.float64)
    y = search_candidate(name, 4, stride).double()(x)
    assert y.shape == (3, 4, *(-(-n // stride) for n in size))
    assert y.dtype == x.dtype
    assert y.isfinite().all()


def test_skip_connect_is_the_identity_at_stride_1():
    op = primitive("skip_connect", 3, 1, affine=True)
    x = torch.randn(2, 3, 4, 4)
    assert isinstance(op, Identity)
    assert op(x) is x


def test_none_is_zero_but_lets_nan_through():
    x = torch.randn(2, 3, 4, 4)
    x[0, 0, 0, 0] = float("nan")
    y = primitive("none", 3, 2, affine=True)(x)
    assert y[0, 0, 0, 0].isnan()
    assert y.nansum() == 0
    assert y.isnan().sum() == 1


def test_noise_ignores_its_input():
    op = primitive("noise", 16, 2, affine=False)
    x = torch.full((8, 16, 9, 9), float("nan"), requires_grad=True)
    torch.manual_seed(0)
    first, second = op(x), op(x)
    torch.manual_seed(0)
    assert torch.equal(op(x + 1), first)
    assert not torch.equal(first, second)
    assert not first.requires_grad
    assert first.mean().abs() < 0.1
    assert (first.std() - 1).abs() < 0.1


def test_pools():
    x = torch.randn(2, 3, 5, 6, dtype=torch.float64)
    padded = F.pad(x, (1, 1, 1, 1), value=float("nan")).unfold(2, 3, 2).unfold(3, 3, 2).flatten(4)
    largest = padded.nan_to_num(nan=-torch.inf).amax(4)
    torch.testing.assert_close(primitive("max_pool_3x3", 3, 2, True)(x), largest)
    torch.testing.assert_close(primitive("avg_pool_3x3", 3, 2, True)(x), padded.nanmean(4))


@pytest.mark.parametrize(
    ("name", "reach"), [("sep_conv_5x5", 4), ("dil_conv_3x3", 2), ("dil_conv_5x5", 4)]
)
def test_receptive_field(name, reach):
    x = torch.rand(1, 1, 21, 21, dtype=torch.float64).requires_grad_()
    op = primitive(name, 1, 1, affine=True).double().eval()
    for p in op.parameters():
        nn.init.ones_(p)
    op(x)[0, 0, 10, 10].backward()
    rows = x.grad[0, 0].any(1).nonzero().flatten()
    assert (rows.min(), rows.max()) == (10 - reach, 10 + reach)
    assert len(rows) == (2 * reach + 1 if name.startswith("sep") else reach + 1)


def definition_of_factorized_reduce(op, x):
    n, c, h, w = x.shape
    u = x.new_zeros(n, c, h + 1, w + 1)
    u[:, :, :h, :w] = x.clamp(min=0)
    mix = "oc,nchw->nohw"
    near = torch.einsum(mix, op.conv_1.weight[:, :, 0, 0], u[:, :, 0:h:2, 0:w:2])
    far = torch.einsum(mix, op.conv_2.weight[:, :, 0, 0], u[:, :, 1 : h + 1 : 2, 1 : w + 1 : 2])
    return op.bn(torch.cat([near, far], 1))


@pytest.mark.parametrize("size", [(4, 4), (5, 4), (4, 7), (1, 1), (9, 9)])
def test_factorized_reduce(size):
    op = FactorizedReduce(3, 4).double()
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    torch.testing.assert_close(op(x), definition_of_factorized_reduce(op, x))


@pytest.mark.parametrize("size", [(4, 6), (8, 8)])
def test_factorized_reduce_never_pads_even_sizes(size):
    op = FactorizedReduce(3, 4).double()
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    u = x.relu()
    public = op.bn(torch.cat([op.conv_1(u), op.conv_2(u[:, :, 1:, 1:])], 1))
    assert torch.equal(op(x), public)


@pytest.mark.parametrize("name", ["max_pool_3x3", "avg_pool_3x3"])
def test_a_pool_in_the_search_network_has_its_own_batch_norm(name):
    op = search_candidate(name, 4, 2)
    assert isinstance(op, nn.Sequential)
    assert set(op.state_dict()) == norm("1", STATISTICS)
    x = torch.randn(2, 4, 6, 6)
    expected = F.batch_norm(primitive(name, 4, 2, False)(x), None, None, training=True)
    torch.testing.assert_close(op(x), expected)


@pytest.mark.parametrize("name", OPS)
def test_batch_norms_are_affine_only_on_request(name):
    def affine(module):
        return {m.affine for m in module.modules() if isinstance(m, nn.BatchNorm2d)}

    assert affine(primitive(name, 4, 2, affine=True)) <= {True}
    assert affine(search_candidate(name, 4, 2)) <= {False}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: primitive("conv", 4, 1, True), "no operation 'conv'; there are none, max_pool"),
        (lambda: primitive(None, 4, 1, True), "no operation None"),
        (lambda: search_candidate("sep_conv", 4, 1), "no operation 'sep_conv'"),
        (lambda: primitive("noise", 0, 1, True), "noise: C must be at least 1, got 0"),
        (lambda: primitive("none", 4, 3, True), "none: stride must be 1 or 2, got 3"),
        (lambda: primitive("skip_connect", 3, 2, True), "even number of channels, got C_out=3"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
