"""Multiply-adds beside published counts, and latencies that leave no trace."""

import json

import pytest
import torch
from test_eval_network import DARTS_V2, DATA

from fastnas import reference
from fastnas.nn import (
    EvalNetwork,
    MobileNetEvalNetwork,
    NB201EvalNetwork,
    SearchNetwork,
    count_parameters,
)
from fastnas.nn.cost import count_macs, latency_ms, multiply_adds, network_cost
from fastnas.spaces import MOBILE_ARCHITECTURES, Genotype, get_space, parse

CIFAR = 3, 32, 32
NOISY = dict(zip("abcdefghij", (
    513.87, 492.25, 529.60, 492.20, 519.57, 428.41, 528.47, 492.69, 485.81, 467.78,
), strict=True))  # fmt: skip
"""Millions of multiply-adds in convolutions and linear layers of NoisyDARTS' cells."""


def macs(genotype):
    with torch.device("meta"):
        return count_macs(EvalNetwork(genotype, 36, 10, 20, auxiliary=True), CIFAR)


def test_macs_of_darts_v2():
    assert macs(DARTS_V2) == 528_359_040


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("quark0/darts:DARTS_V1", 500_987_520),
        ("PDARTS", 532_174_464),
        ("PC_DARTS_cifar", 556_670_592),
        ("PC_DARTS_image", 570_466_944),
        *((f"noisy_darts_{letter}", count) for letter, count in NOISY.items()),
    ],
)
def test_macs_of_published_cells(name, count):
    path = DATA / "known_genotypes.json"
    if not path.exists():
        pytest.skip("needs shared/data/known_genotypes.json beside the checkout")
    found = json.loads(path.read_text())["genotypes"]
    names = [full for full in found if full == name or full.endswith(f":{name}")]
    if not names:
        pytest.skip(f"{name} is not among the genotypes")
    for full in names:
        counted = macs(Genotype(**found[full]))
        assert counted == count if isinstance(count, int) else abs(counted / 1e6 - count) < 0.005


def test_macs_of_a_nas_bench_201_cell():
    """The cell of 3x3 convolutions on every edge, written out."""
    nodes = ["|".join(f"nor_conv_3x3~{i}" for i in range(j)) for j in (1, 2, 3)]
    text = "+".join(f"|{node}|" for node in nodes)
    network = NB201EvalNetwork(parse(text), 16, 10, 5)
    stem = 32 * 32 * 3 * 16 * 9
    cells = sum(
        5 * 6 * size**2 * channels**2 * 9 for channels, size in ((16, 32), (32, 16), (64, 8))
    )
    blocks = sum(
        size**2 * (c * 2 * c * 9 + (2 * c) ** 2 * 9 + c * 2 * c) for c, size in ((16, 16), (32, 8))
    )
    assert count_macs(network, CIFAR) == stem + cells + blocks + 64 * 10


def test_a_network_of_fused_ops_counts_as_the_mathematics():
    """The supernet on its ops has what the eager one has."""
    space = get_space("S2")
    found = []
    for kind in (SearchNetwork, reference.SearchNetwork):
        network = kind(space, 2, 4, 3)
        w = {cell: torch.rand(14, 2) for cell in space.cell_types}
        x = torch.randn(1, 3, 8, 8)
        with torch.no_grad():
            found.append(multiply_adds(lambda net=network, x=x, w=w: net(x, w)))
    assert found[0] == found[1] > 0


def test_a_cost_leaves_no_trace():
    network = EvalNetwork(DARTS_V2, 4, 10, 3, auxiliary=True).train()
    network.cells[0].eval()
    before = [t.clone() for t in network.state_dict().values()]
    random = torch.get_rng_state()
    found = network_cost(network, (3, 16, 16))
    assert set(found) == {"macs", "parameters", "latency_ms", "latency_threads"}
    assert found["parameters"] == count_parameters(network) and found["latency_ms"] > 0
    assert found["latency_threads"] == torch.get_num_threads()
    assert torch.equal(random, torch.get_rng_state())
    assert all(map(torch.equal, before, network.state_dict().values()))
    assert network.training and not network.cells[0].training and network.cells[1].training
    assert {p.device.type for p in network.parameters()} == {"cpu"}


def test_a_latency_is_a_median_without_the_first_passes(monkeypatch):
    """Three warm up; of the others the one that was disturbed does not decide."""
    times = iter([9.0, 9.0, 9.0, 1.0, 2.0, 50.0, 2.0, 3.0])
    clock = [0.0]
    monkeypatch.setattr("fastnas.nn.cost.perf_counter", lambda: clock[0])

    def run():
        clock[0] += next(times)

    assert latency_ms(run, torch.device("cpu"), seconds=30.0) == 2000.0


def test_the_macs_of_a_mobile_network():
    with torch.device("meta"):
        network = MobileNetEvalNetwork(MOBILE_ARCHITECTURES["FairNAS-A"], 1000)
    assert round(count_macs(network, (3, 224, 224)) / 1e6, 2) == 388.12
