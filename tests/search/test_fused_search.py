"""A search on the fused cells is the search that the eager cells make."""

import os

import pytest
import torch
from rich.console import Console

from fastnas import nn, reference, use_backend
from fastnas.search.bilevel import Bilevel
from fastnas.search.config import SearchConfig, make_config
from fastnas.search.searcher import Searcher
from fastnas.spaces import DARTS_PRIMITIVES, Space, get_space
from fastnas.strategies import DARTS, NoisyDARTS

# Of the five seeds, all of which derived the eager genotype: FASTNAS_SEEDS=5.
SEEDS = int(os.environ.get("FASTNAS_SEEDS", "1"))


@pytest.fixture(autouse=True)
def one_thread(fixed_seed_and_threads):
    """Thousands of small ops: on busy cores most of the time would be waiting for a thread."""
    torch.set_num_threads(1)


def searched_alphas(strategy, steps, fused):
    """The logits after steps in fp64; unfused, every candidate is an eager module."""
    torch.manual_seed(0)
    edges = (DARTS_PRIMITIVES,) * 5  # two nodes: 200 eager steps of four take minutes
    space = Space("two nodes", edges, edges)
    network = nn.SearchNetwork(space, 2, 4, 3, in_channels=1, noise=strategy.skip_noise())
    network.double().train()
    arch = nn.ArchParameters(space).double()
    params_optimizer = torch.optim.SGD(network.parameters(), lr=0.025, momentum=0.9)
    arch_optimizer = torch.optim.Adam(arch.parameters(), lr=3e-3, betas=(0.5, 0.999))
    bilevel = Bilevel(network, arch, strategy, params_optimizer, arch_optimizer)
    assert fused == (network.cells[0].why_not_fused(torch.empty(2, 6, 8, 8).double()) is None)
    for _ in range(steps):
        batch = torch.randn(4, 1, 8, 8, dtype=torch.float64), torch.randint(4, (4,))
        bilevel.arch_step(batch, batch)
        bilevel.weight_step(batch)
    return torch.cat([p.detach() for p in arch.parameters()])


@pytest.mark.parametrize(
    ("strategy", "steps"), [(DARTS(), 200), (NoisyDARTS(), 20)], ids=["darts", "noisy-darts"]
)
def test_fp64_follows_the_eager_logits(strategy, steps):
    fused = searched_alphas(strategy, steps, True)
    with use_backend("eager"):
        eager = searched_alphas(strategy, steps, False)
    assert (fused - eager).abs().max() < 1e-6
    assert eager.abs().max() > 5e-4 * steps, "the logits moved"


@pytest.mark.parametrize("seed", range(SEEDS))
def test_two_epochs_on_digits_derive_the_eager_genotype(seed, tmp_path):
    genotypes = []
    for backend in ("auto", "eager"):
        settings = {
            "method": "darts", "data": "digits", "channels": 4, "layers": 3, "epochs": 2,
            "seed": seed, "backend": backend, "validate_every": 0, "tensorboard": False,
        }  # fmt: skip
        searcher = Searcher(make_config(SearchConfig, settings))
        searcher.search(tmp_path, Console(quiet=True))
        genotypes.append(searcher.genotype())
    assert genotypes[0] == genotypes[1]


def test_the_baseline_is_eager():
    with use_backend("eager"):
        cell = nn.SearchNetwork(get_space("S0"), 2, 4, 1).cells[0]
        reason = cell.why_not_fused(torch.empty(2, 2, 8, 8))
    assert reason == "mixed_edges computes eagerly on cpu"
    assert isinstance(cell, reference.Cell)
