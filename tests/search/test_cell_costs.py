"""Expected costs at one-hot weights are the counted ones; searches that pay become cheaper."""

import pytest
import torch
from rich.console import Console

from fastnas.nn import EVAL_NETWORKS, count_parameters
from fastnas.nn.cost import count_macs
from fastnas.runs.search import run_search
from fastnas.search.checkpoint import CheckpointError
from fastnas.search.config import ConfigError, SearchConfig, make_config
from fastnas.search.searcher import Searcher
from fastnas.spaces import get_space
from fastnas.strategies.derivation import derive_path, derive_top_edges

QUIET = Console(quiet=True)
TINY = {
    "channels": 2,
    "layers": 3,
    "images": 64,
    "batch_size": 8,
    "epochs": 2,
    "train_epochs": 0,
    "train_channels": 3,
    "train_layers": 4,
    "compare_steps": 0,
    "tensorboard": False,
    "threads": 1,
}


def searcher(**settings):
    return Searcher(make_config(SearchConfig, {**TINY, **settings}))


def counted(run, genotype, kind):
    config, images = run.config, run.images
    sizes = config.train_channels, images.classes, config.train_layers
    network = EVAL_NETWORKS[genotype.layout](genotype, *sizes, in_channels=images.channels)
    return count_macs(network, images.shape) if kind == "macs" else count_parameters(network)


def one_hot(space, seed):
    """Weights of one operation on two random edges of each node, or on every edge."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for cell in space.cell_types:
        w = torch.zeros(len(space.edges), space.num_candidates(cell))
        for node in range(space.inputs, space.inputs + space.nodes):
            into = [e for e, (_, j) in enumerate(space.edges) if j == node]
            count = space.cell_layout.edges_per_node or len(into)
            for i in torch.randperm(len(into), generator=generator)[:count].tolist():
                names = space.candidates(cell)[into[i]]
                allowed = [
                    k
                    for k, name in enumerate(names)
                    if name != "none" or space.cell_layout.derives_none
                ]
                pick = int(torch.randint(len(allowed), (), generator=generator))
                w[into[i], allowed[pick]] = 1
        found[cell] = w
    return found


@pytest.mark.parametrize("kind", ["macs", "params"])
@pytest.mark.parametrize(
    ("method", "space"),
    [
        ("darts", "S0"),
        ("noisy-darts", "S1"),
        ("fair-darts", "S2"),
        ("darts", "nb201"),
        ("gdas", "S3"),
    ],
)
def test_at_one_hot_it_is_what_is_counted(monkeypatch, kind, method, space):
    run = searcher(method=method, space=space, cost=f"{kind}:1e6")
    for seed in range(6):
        w = one_hot(run.space, seed)
        monkeypatch.setattr(run.strategy, "mixing_weights", lambda arch, w=w: w)
        genotype = derive_top_edges(w, run.space)
        assert float(run.cost.expected(run.arch).detach()) == counted(run, genotype, kind)


@pytest.mark.parametrize("method", ["rome", "rome-v1"])
def test_of_sampled_edges_at_decided_logits_as_well(method):
    run = searcher(method=method, space="S1", cost="macs:1e6")
    generator = torch.Generator().manual_seed(3)
    for _ in range(4):
        with torch.no_grad():
            for name, p in run.arch.named_parameters():
                # Far apart, so that the softmax of what is not kept is 0 in float64.
                if name.endswith("edges"):
                    sizes = [2, 3, 4, 5] if method == "rome" else [1, 3, 6, 10]
                    p.copy_(
                        torch.cat([torch.randperm(n, generator=generator) for n in sizes]) * 900.0
                    )
                else:
                    rows = [torch.randperm(p.shape[1], generator=generator) for _ in p]
                    p.copy_(torch.stack(rows) * 900.0)
        genotype = derive_path(run.strategy.likeliest(run.arch), run.space)
        assert float(run.cost.expected(run.arch).detach()) == counted(run, genotype, "macs")


def test_latencies_are_measured_kept_and_resumed(tmp_path):
    """A table measured anew would be another one, and the run with it."""
    settings = {"method": "darts", "space": "nb201", "layers": 1, "train_layers": 1}
    settings |= {"cost": "latency:1us", "cost_weight": 5.0}
    run = searcher(**settings)
    convolution = run.cost.table.edges["normal"][0]["nor_conv_3x3"]
    assert convolution > run.cost.table.edges["normal"][0]["none"] > 0 and run.cost.table.fixed > 0
    run.start_epoch()
    run.run_step()
    run.step = 1
    run.save(tmp_path / "search.pt")
    again = searcher(**settings)
    assert again.cost.state_dict() != run.cost.state_dict()
    again.resume(tmp_path / "search.pt")
    assert again.cost.state_dict() == run.cost.state_dict()
    for each in (run, again):
        each.start_epoch()
        each.run_step()
    assert all(map(torch.equal, run.arch.parameters(), again.arch.parameters()))
    assert again.cost.expected(again.arch) == run.cost.expected(run.arch)
    other = searcher(**{**settings, "train_channels": 4})
    with pytest.raises(CheckpointError, match="train_channels 3 -> 4"):
        other.resume(tmp_path / "search.pt")


def test_measuring_moves_nothing_of_the_run():
    states = []
    for cost in (None, "macs:1e12", "latency:9s"):
        run = searcher(method="noisy-darts", space="S2", cost=cost)
        run.start_epoch()
        run.run_step()
        states.append([*run.network.parameters(), *run.arch.parameters()])
    assert all(map(torch.equal, states[0], states[1]))  # far below its target it costs nothing
    assert all(map(torch.equal, states[0], states[2]))


@pytest.mark.parametrize("method", ["darts", "fair-darts", "gdas", "rome"])
def test_a_search_that_pays_derives_less(tmp_path, method):
    """By 16 steps at a high rate; the same seed without a cost derives a dearer network."""
    found = {}
    for cost in (None, "macs:100"):
        settings = {**TINY, "method": method, "space": "S2", "arch_lr": 0.2, "epochs": 2}
        settings |= {"samples": 2} if method == "rome" else {}
        settings |= {"threshold": 0.0} if method == "fair-darts" else {}
        settings |= {} if cost is None else {"cost": cost, "cost_weight": 1e3}
        out = str(tmp_path / f"{cost is None}")
        found[cost] = run_search(make_config(SearchConfig, {**settings, "out": out}), console=QUIET)
    free, paid = found.values()
    assert paid["macs"] < free["macs"]
    assert "sep_conv" not in paid["genotype"]
    assert "cost" not in free
    assert paid["cost"]["target"] == 100 and paid["cost"]["weight"] == 1000
    assert paid["cost"]["expected"] < 2 * paid["macs"]


def test_what_is_refused_before_a_run():
    for settings, message in (
        ({"cost": "macs:"}, "cost is 'macs:'; macs:NUMBER, params:NUMBER"),
        ({"cost": "latency:12"}, "cost is 'latency:12'; macs:NUMBER"),
        ({"cost_weight": 2.0}, "cost_weight is 2.0, but there is no cost"),
        ({"cost": "macs:1", "cost_weight": 0.0}, "cost_weight is 0.0; a number is needed, above 0"),
    ):
        with pytest.raises(ConfigError) as caught:
            make_config(SearchConfig, settings)
        assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_none_costs_nothing_and_is_never_derived():
    run = searcher(method="darts", space="S3", cost="macs:1e6")
    assert all(row["none"] == 0 for row in run.cost.table.edges["normal"])
    assert get_space("S3").candidates("normal")[0][0] == "none"
