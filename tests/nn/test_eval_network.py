import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fastnas.layers.primitives import drop_path
from fastnas.nn.eval_network import AuxiliaryHead, EvalCell, EvalNetwork, count_parameters
from fastnas.spaces import Genotype

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"

DARTS_V2 = Genotype(
    normal=[
        *[("sep_conv_3x3", 0), ("sep_conv_3x3", 1), ("sep_conv_3x3", 0), ("sep_conv_3x3", 1)],
        *[("sep_conv_3x3", 1), ("skip_connect", 0), ("skip_connect", 0), ("dil_conv_3x3", 2)],
    ],
    normal_concat=range(2, 6),
    reduce=[
        *[("max_pool_3x3", 0), ("max_pool_3x3", 1), ("skip_connect", 2), ("max_pool_3x3", 1)],
        *[("max_pool_3x3", 0), ("skip_connect", 2), ("skip_connect", 2), ("max_pool_3x3", 1)],
    ],
    reduce_concat=range(2, 6),
)
ONE_NODE = ((("skip_connect", 0), ("sep_conv_3x3", 1)),)
TINY = Genotype(ONE_NODE, (2,), ONE_NODE, (2,))


def published():
    path = DATA / "known_genotypes.json"
    if not path.exists():
        pytest.skip("needs shared/data/known_genotypes.json beside the checkout")
    return json.loads(path.read_text())


def parameters(genotype, auxiliary=False):
    """In the network of DARTS on CIFAR-10; no memory is allocated."""
    with torch.device("meta"):
        network = EvalNetwork(genotype, 36, 10, 20, auxiliary=auxiliary)
    return count_parameters(network, exclude_auxiliary=False)


def test_parameters_of_darts_v2():
    assert parameters(DARTS_V2) == 3_349_342
    with torch.device("meta"):
        network = EvalNetwork(DARTS_V2, 36, 10, 20, auxiliary=True)
    assert count_parameters(network) == 3_349_342
    head = 576 * 128 + 2 * 128 + 128 * 768 * 4 + 2 * 768 + 768 * 10 + 10
    assert count_parameters(network, exclude_auxiliary=False) == 3_349_342 + head


def test_parameters_are_those_the_papers_print():
    data = published()
    different = {}
    matching = 0
    for name, reported in data["reported"].items():
        if "params_M" not in reported:
            continue
        printed = str(reported["params_M"])
        digits = 10 ** len(printed.split(".")[1])
        count = parameters(Genotype(**data["genotypes"][name]))
        if math.floor(count / 1e6 * digits) / digits == reported["params_M"]:
            matching += 1
        else:
            different[name] = (count, printed)
    assert matching == 11
    # The 3.3 is PC-DARTS' README quoting another repository. 3.01 may be 3.10 misspelled.
    assert different == {
        "quark0/darts:DARTS_V1": (3_169_414, "3.3"),
        "xiaomi-automl/NoisyDARTS:noisy_darts_h": (3_101_374, "3.01"),
    }


@pytest.mark.parametrize(
    ("name", "printed", "auxiliary"),
    [
        ("NASNet", 3.83, False),
        ("ENASNet", 4.02, False),
        ("FairDARTS_a", 2.83, True),
        ("FairDARTS_b", 3.88, True),
        ("FairDARTS_c", 2.59, False),
        ("FairDARTS_d", 3.84, True),
        ("FairDARTS_e", 3.12, True),
        ("FairDARTS_f", 3.62, True),
        ("FairDARTS_g", 3.375, True),
        ("DCO_SPARSE_BS_64", 3.01, False),
    ],
)
def test_parameters_of_cells_with_other_than_eight_edges(name, printed, auxiliary):
    """As printed in comments of fairdarts/genotypes.py, some with the auxiliary head counted."""
    genotype = Genotype(**published()["genotypes"][f"xiaomi-automl/FairDARTS:{name}"])
    assert 0 <= parameters(genotype, auxiliary) / 1e6 - printed < 0.01


STATISTICS = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def norm(prefix):
    return {f"{prefix}.{name}" for name in STATISTICS}


def test_state_dict_names_are_those_of_darts():
    network = EvalNetwork(TINY, 4, 10, 3, auxiliary=True)
    sep_conv = {f"{i}.weight" for i in (1, 2, 5, 6)} | norm("3") | norm("7")
    expected = {"stem.0.weight", "classifier.weight", "classifier.bias", *norm("stem.1")}
    for cell in ("cells.0", "cells.1", "cells.2"):
        expected |= {f"{cell}.preprocess1.op.1.weight", *norm(f"{cell}.preprocess1.op.2")}
        expected |= {f"{cell}._ops.1.op.{name}" for name in sep_conv}
    expected |= {"cells.0.preprocess0.op.1.weight", *norm("cells.0.preprocess0.op.2")}
    expected |= {"cells.1.preprocess0.op.1.weight", *norm("cells.1.preprocess0.op.2")}
    factorized = ("cells.2.preprocess0", "cells.1._ops.0", "cells.2._ops.0")
    for prefix in factorized:
        expected |= {f"{prefix}.conv_1.weight", f"{prefix}.conv_2.weight", *norm(f"{prefix}.bn")}
    head = "auxiliary_head"
    expected |= {f"{head}.features.2.weight", f"{head}.features.5.weight"}
    expected |= norm(f"{head}.features.3") | norm(f"{head}.features.6")
    expected |= {f"{head}.classifier.weight", f"{head}.classifier.bias"}
    assert set(network.state_dict()) == expected


def test_cell_is_the_sum_of_its_edges():
    torch.manual_seed(0)
    genotype = Genotype(
        normal=[("sep_conv_3x3", 1), ("skip_connect", 0), ("max_pool_3x3", 2), ("none", 0)],
        normal_concat=[3, 2],
        reduce=[("sep_conv_3x3", 1), ("skip_connect", 0), ("max_pool_3x3", 2), ("none", 0)],
        reduce_concat=[2],
    )
    cell = EvalCell(genotype, 5, 7, 4, reduction=False, reduction_prev=True).double()
    x, y = torch.randn(2, 5, 12, 12).double(), torch.randn(2, 7, 6, 6).double()
    s0, s1 = cell.preprocess0(x), cell.preprocess1(y)
    s2 = cell._ops[0](s1) + s0
    s3 = F.max_pool2d(s2, 3, 1, 1)
    torch.testing.assert_close(cell(x, y, 0.0), torch.cat([s3, s2], 1))
    assert cell.multiplier == 2


@pytest.mark.parametrize("size", [8, 11, 32])
@pytest.mark.parametrize("layers", [1, 2, 3, 8])
def test_shapes(layers, size):
    network = EvalNetwork(DARTS_V2, 3, 7, layers, in_channels=1, auxiliary=True)
    x = torch.randn(2, 1, size, size)
    logits, auxiliary = network(x)
    assert logits.shape == auxiliary.shape == (2, 7)
    (logits.sum() + auxiliary.sum()).backward()
    assert all(p.grad is not None for p in network.parameters())
    logits, auxiliary = network.eval()(x)
    assert logits.shape == (2, 7)
    assert auxiliary is None


def test_without_auxiliary_head():
    network = EvalNetwork(TINY, 2, 3, 3)
    assert network(torch.randn(2, 3, 8, 8))[1] is None
    assert not [name for name in network.state_dict() if "auxiliary" in name]


@pytest.mark.parametrize("size", [8, 9, 10])
def test_auxiliary_head_pools_as_darts_where_darts_can(size):
    head = AuxiliaryHead(4, 3).eval()
    x = torch.randn(2, 4, size, size)
    public = nn.Sequential(
        nn.ReLU(), nn.AvgPool2d(5, stride=3, count_include_pad=False), *head.features[2:]
    )
    torch.testing.assert_close(head(x), head.classifier(public(x).flatten(1)))


@pytest.mark.parametrize("size", [(1, 1), (2, 2), (7, 8), (14, 14)])
def test_auxiliary_head_adapts_to_other_sizes(size):
    x = torch.randn(2, 4, *size)
    kept = x.clone()
    assert AuxiliaryHead(4, 3)(x).shape == (2, 3)
    assert torch.equal(x, kept)


def test_sparse_genotype():
    genotype = Genotype(
        normal=[("sep_conv_3x3", 2, 0), ("skip_connect", 2, 0), ("sep_conv_5x5", 4, 3)],
        normal_concat=[2, 3, 4],
        reduce=[("max_pool_3x3", 2, 0), ("skip_connect", 4, 2)],
        reduce_concat=[2, 3, 4],
    )
    network = EvalNetwork(genotype, 4, 10, 3)
    normal, reduce = network.cells[:2]
    assert (normal.multiplier, reduce.multiplier) == (1, 2)
    assert len(normal._ops) == 2, "the edge out of the empty node 3 computes nothing"
    assert network(torch.randn(2, 3, 16, 16))[0].shape == (2, 10)


def test_drop_path_drops_samples_and_keeps_the_mean():
    torch.manual_seed(0)
    x = torch.rand(4000, 3, 2, 2, dtype=torch.float64) + 1
    y = drop_path(x, 0.25)
    ratio = y / x
    dropped = ratio[:, 0, 0, 0] == 0
    torch.testing.assert_close(ratio[~dropped], torch.full_like(ratio[~dropped], 1 / 0.75))
    assert (ratio[dropped] == 0).all()
    assert abs(dropped.double().mean() - 0.25) < 0.03


def test_drop_path_spares_identities():
    nodes = ((("skip_connect", 0),), (("avg_pool_3x3", 1),))
    cell = EvalCell(Genotype(nodes, (2, 3), nodes, (2, 3)), 3, 3, 4, False, False)
    x = torch.randn(64, 3, 4, 4)
    identity, pool = cell(x, x, 0.5).chunk(2, dim=1)
    assert torch.equal(identity, cell.preprocess0(x))
    dropped = (pool == 0).flatten(1).all(1)
    assert 0 < dropped.sum() < 64
    cell.eval()
    assert torch.equal(cell(x, x, 0.5), cell(x, x, 0.0))


def test_drop_path_can_change_in_training():
    network = EvalNetwork(DARTS_V2, 2, 3, 3, drop_path=0.1)
    x = torch.randn(16, 3, 8, 8)
    assert network.drop_path == 0.1
    assert not torch.equal(network(x)[0], network(x)[0])
    network.drop_path = 0
    assert torch.equal(network(x)[0], network(x)[0])
    with pytest.raises(ValueError, match=r"drop_path must be in \[0, 1\), got 1"):
        network.drop_path = 1


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"genotype": "DARTS_V2"}, TypeError, "genotype is 'DARTS_V2'; Genotype is needed"),
        ({"C": 0}, ValueError, "C must be at least 1, got 0"),
        ({"layers": 0}, ValueError, "layers must be at least 1, got 0"),
        ({"num_classes": -1}, ValueError, "num_classes must be at least 1, got -1"),
        ({"in_channels": 0}, ValueError, "in_channels must be at least 1, got 0"),
        ({"drop_path": 1.0}, ValueError, r"drop_path must be in \[0, 1\), got 1.0"),
        ({"drop_path": float("nan")}, ValueError, r"drop_path is nan; a finite number is needed"),
        (
            {"genotype": Genotype([[("conv", 0)]], [2], ONE_NODE, [2])},
            ValueError,
            "no operation 'conv'; there are none",
        ),
        (
            {"genotype": Genotype([[]], [2], ONE_NODE, [2])},
            ValueError,
            r"the normal cell has no output: no edge reaches any of the nodes \[2\]",
        ),
    ],
)
def test_bad_input(arguments, error, message):
    with pytest.raises(error, match=message):
        EvalNetwork(**{"genotype": TINY, "C": 4, "num_classes": 3, "layers": 3, **arguments})
