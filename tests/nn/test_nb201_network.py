"""The NAS-Bench-201 network: its published parameter counts, names, and what a cell computes."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fastnas.layers.nb201 import ResidualBlock, nb201_operation
from fastnas.nn import NB201EvalNetwork, count_parameters
from fastnas.nn.nb201_eval import NB201EvalCell
from fastnas.reference.nb201_search import NB201Cell
from fastnas.spaces import NB201_OPS, Genotype, from_nb201, get_space

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
ARCH_11 = "|nor_conv_3x3~0|+|nor_conv_3x3~0|avg_pool_3x3~1|+|none~0|nor_conv_3x3~1|avg_pool_3x3~2|"
CLASSES = {"cifar10": 10, "cifar100": 100, "ImageNet16-120": 120}


def parameters(text, classes):
    with torch.device("meta"):
        return count_parameters(NB201EvalNetwork(from_nb201(text), 16, classes, 5))


def test_parameters_of_architecture_11():
    assert parameters(ARCH_11, 10) == 802_426


def test_parameters_are_those_of_the_benchmark():
    path = DATA / "nats_tss_3arch_details.json"
    if not path.exists():
        pytest.skip("needs shared/data/nats_tss_3arch_details.json beside the checkout")
    compared = set()
    for arch, by_epochs in json.loads(path.read_text()).items():
        for found in by_epochs.values():
            for run, result in found["results"].items():
                data = next(name for name in CLASSES if run in (name, *_runs(name, run)))
                count = parameters(found["arch_str"], CLASSES[data])
                assert count == round(result["params_MB"] * 1e6), (arch, run)
                compared.add((arch, data))
    assert len(compared) == 9


def _runs(name, run):
    """cifar10-777 and cifar10-valid-777 are of cifar10."""
    return [run] if run.removeprefix(f"{name}-").removeprefix("valid-").isdigit() else []


def test_a_cell_by_hand():
    """A term of each operation; edges are read in the order of the string."""
    text = "|nor_conv_3x3~0|+|skip_connect~0|avg_pool_3x3~1|+|none~0|nor_conv_1x1~1|skip_connect~2|"
    cell = NB201EvalCell(from_nb201(text), 3).double()
    x = torch.randn(2, 3, 5, 4, dtype=torch.float64)
    conv3, conv1 = cell.layers[0].op[1].weight, cell.layers[4].op[1].weight

    def norm(z):
        mean = z.mean((0, 2, 3), keepdim=True)
        return (z - mean) / (z.var((0, 2, 3), unbiased=False, keepdim=True) + 1e-5).sqrt()

    # The mean over the pixels that are there: of each window, sum over count.
    ones = torch.ones_like(x[:, :1])
    window = torch.ones(1, 1, 3, 3, dtype=torch.float64)
    count = F.conv2d(ones, window, padding=1)
    x1 = norm(F.conv2d(x.relu(), conv3, padding=1))
    x2 = x + F.conv2d(x1, window.expand(3, 1, 3, 3), padding=1, groups=3) / count
    y = norm(F.conv2d(x1.relu(), conv1)) + x2
    torch.testing.assert_close(cell(x), y, rtol=1e-10, atol=1e-12)


def test_a_cell_of_nones_is_zero():
    cell = NB201EvalCell(from_nb201("|none~0|+|none~0|none~1|+|none~0|none~1|none~2|"), 2)
    assert not cell(torch.randn(1, 2, 4, 4)).any()


@pytest.mark.parametrize("training", [True, False])
def test_one_hot_weights_make_the_search_cell_the_evaluation_cell(training):
    genotype = from_nb201(ARCH_11.replace("none~0", "nor_conv_1x1~0"))
    search = NB201Cell(get_space("nb201"), 3).double().train(training)
    cell = NB201EvalCell(genotype, 3).double().train(training)
    w = torch.zeros(6, 5, dtype=torch.float64)
    for e, ((op, _, _), layer) in enumerate(zip(genotype.edges(), cell.layers)):
        k = NB201_OPS.index(op)
        w[e, k] = 1
        missing, _ = layer.load_state_dict(search._ops[e]._ops[k].state_dict(), strict=False)
        assert all(key in ("op.2.weight", "op.2.bias") for key in missing)  # 1 and 0
    x = torch.randn(2, 3, 6, 5, dtype=torch.float64)
    torch.testing.assert_close(search(x, w), cell(x), rtol=1e-12, atol=1e-12)


def test_stages_and_names():
    network = NB201EvalNetwork(from_nb201(ARCH_11), 4, 7, 2, in_channels=1)
    assert [type(m) is ResidualBlock for m in network.cells] == [*2 * [0], 1, *2 * [0], 1, *2 * [0]]
    shapes = {key: list(value.shape) for key, value in network.state_dict().items()}
    expected = {
        "stem.0.weight": [4, 1, 3, 3],
        "stem.1.running_mean": [4],
        "cells.0.layers.0.op.1.weight": [4, 4, 3, 3],
        "cells.2.conv_a.op.1.weight": [8, 4, 3, 3],
        "cells.2.conv_b.op.2.bias": [8],
        "cells.2.downsample.1.weight": [8, 4, 1, 1],
        "cells.7.layers.4.op.2.weight": [16],
        "lastact.0.weight": [16],
        "classifier.weight": [7, 16],
    }
    assert shapes.items() >= expected.items()
    assert not any(key.startswith("cells.0.layers.3") for key in shapes)  # none


@pytest.mark.parametrize("size", [8, 9, 16])
def test_sizes_are_halved_twice(size):
    network = NB201EvalNetwork(from_nb201(ARCH_11), 2, 3, 1)
    sizes = []
    for block in network.cells:
        block.register_forward_hook(lambda _, x, y: sizes.append((x[0].shape[2], y.shape[2])))
    assert network(torch.randn(2, 3, size, size)).shape == (2, 3)
    half, quarter = -(-size // 2), -(-size // 4)
    assert sizes == [(size, size), (size, half), (half, half), (half, quarter), (quarter, quarter)]


def test_a_residual_block_by_hand():
    block = ResidualBlock(2, 4)
    x = torch.randn(2, 2, 6, 6)
    shortcut = F.conv2d(F.avg_pool2d(x, 2), block.downsample[1].weight)
    assert isinstance(block.conv_a.op[2], nn.BatchNorm2d) and block.conv_a.op[2].affine
    torch.testing.assert_close(block(x), shortcut + block.conv_b(block.conv_a(x)))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: NB201EvalNetwork(Genotype([[("a", 0)]], [2], [[("a", 0)]], [2]), 16, 10, 5),
            TypeError,
            "genotype is Genotype.*; NB201Genotype is needed",
        ),
        (lambda: NB201EvalNetwork(from_nb201(ARCH_11), 16, 10, 0), ValueError, "layers must be"),
        (lambda: NB201EvalNetwork(from_nb201(ARCH_11), 0, 10, 5), ValueError, "C must be"),
        (lambda: nb201_operation("sep_conv_3x3", 4, True), ValueError, "'sep_conv_3x3' in NAS-B"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
