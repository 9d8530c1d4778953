"""P-DARTS: its schedules, what a stage drops, the derivation with its cap, on vectors by hand."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from fastnas import nn
from fastnas.reference import SkipNoise
from fastnas.runs.search import run_search
from fastnas.search.config import ConfigError, SearchConfig, make_config
from fastnas.search.searcher import Searcher
from fastnas.spaces import get_space
from fastnas.strategies import get_strategy
from fastnas.strategies.base import Stage

pytestmark = pytest.mark.usefixtures("one_thread", "no_pictures")
QUIET = Console(quiet=True)


def test_the_published_search():
    config = make_config(SearchConfig, {"method": "p-darts"})
    settings = {"epochs": 75, "batch_size": 96, "lr": 0.025, "lr_min": 0.0, "arch_lr": 6e-4}
    assert {name: config.resolved(name) for name in settings} == settings
    assert config.resolved("arch_start_epoch") == 10
    strategy = config.strategy()
    assert strategy.stages(config.resolved("layers"), config.resolved("epochs")) == [
        Stage(5, 25), Stage(11, 25), Stage(17, 25)
    ]  # fmt: skip
    assert strategy.stages(5, 50) == [Stage(5, 17), Stage(11, 17), Stage(17, 16)]


@pytest.mark.parametrize(
    ("epoch", "p"), [(0, 0.672), (9, 0.420), (10, 0.700), (15, 0.2575), (24, 0.0426)]
)
def test_dropout_falls_rises_and_falls(epoch, p):
    strategy = get_strategy("p-darts")
    assert strategy.skip_noise() is None  # p0 of the first stage is 0
    strategy.start_stage(2)
    noise = strategy.skip_noise()
    assert noise == SkipNoise("bernoulli", "multiplicative", factor=0.7)
    kept, scale = noise.level(strategy.noise_amplitude(epoch, 25)).tolist()
    assert 1 - kept == pytest.approx(p, abs=5e-5)
    assert scale == pytest.approx(1 / kept)


def logits(space, probabilities=None):
    """Logits whose softmax on edge 0 of the normal cell is given, elsewhere falls by place."""
    arch = nn.ArchParameters(space)
    with torch.no_grad():
        for alpha in arch.alphas().values():
            alpha.copy_(-torch.arange(alpha.shape[1], dtype=alpha.dtype).expand_as(alpha))
        if probabilities is not None:
            arch.normal[0] = torch.tensor(probabilities).log()
    return arch


def test_a_stage_drops_what_is_least_probable():
    """Of [.1, .2, .1, .6] the first and the third go, of equal ones the first."""
    space = get_space("S0")
    strategy = get_strategy("p-darts", stage_operations="4,2")
    rest = [1e-6] * 4
    arch = logits(space, [0.1, 0.2, 0.1, 0.6, *rest])
    strategy.start_stage(0)
    second = strategy.next_space(space, arch)
    names = space.candidates("normal")[0]
    assert second.candidates("normal")[0] == tuple(names[k] for k in (0, 1, 2, 3))
    assert second.candidates("reduce")[3] == names[:4]
    strategy.start_stage(1)
    third = strategy.next_space(second, logits(second, [0.1, 0.2, 0.1, 0.6]))
    assert third.candidates("normal")[0] == (names[1], names[3])
    assert third.name == "S0, stage 3"
    tied = strategy.next_space(second, logits(second, [0.25] * 4))
    assert tied.candidates("normal")[0] == names[2:4]


def weighed(names, rows):
    """A space with these candidates on all 14 normal edges, and logits of these rows."""
    space = replace(get_space("S0"), name="made", normal=tuple(names for _ in range(14)))
    arch = nn.ArchParameters(space)
    with torch.no_grad():
        arch.normal.copy_(torch.tensor(rows).log())
    return space, arch


NAMES = ("none", "skip_connect", "sep_conv_3x3")


def test_edges_are_ranked_without_none_and_listed_by_predecessor():
    rows = [[0.8, 0.1, 0.1]] * 14
    rows[2], rows[3], rows[4] = [0.1, 0.1, 0.8], [0.9, 0.02, 0.08], [0.3, 0.1, 0.6]
    space, arch = weighed(NAMES, rows)
    found = get_strategy("p-darts").derive(arch, space)
    # Node 0 keeps both edges, of equal operations the later; node 1 leaves out its second edge,
    # nodes 2 and 3 the first ones of equal edges.
    assert found.normal[:2] == (
        (("sep_conv_3x3", 0), ("sep_conv_3x3", 1)),
        (("sep_conv_3x3", 0), ("sep_conv_3x3", 2)),
    )
    assert [[source for _, source in node] for node in found.normal[2:]] == [[2, 3], [3, 4]]


def test_the_cap_on_skips_takes_the_least_probable_first():
    rows = [[0.0, 0.51 + 0.03 * e, 0.49 - 0.03 * e] for e in range(14)]
    rows[1] = [0.0, 0.9, 0.1]
    space, arch = weighed(NAMES, [[max(p, 1e-9) for p in row] for row in rows])

    def skips(cap):
        genotype = get_strategy("p-darts", skip_cap=cap).derive(arch, space)
        return [[name == "skip_connect" for name, _ in node] for node in genotype.normal]

    assert sum(map(sum, skips(8))) == 8
    for cap in range(8):
        assert sum(map(sum, skips(cap))) <= cap
    # The most probable skips are on edges 1 and 13. Where that of edge 12 is taken, those of 11, 10
    # and 9 come in its place and are taken as well.
    assert skips(2) == [[False, True], [False, False], [False, False], [False, True]]
    assert skips(0) == [[False, False]] * 4
    findings = get_strategy("p-darts").findings(arch, space)["genotype_by_skip_cap"]
    assert list(findings) == [str(cap) for cap in range(8, -1, -1)]
    assert findings["8"].count("skip_connect") - findings["0"].count("skip_connect") == 8


def test_a_freed_edge_may_bring_another_skip():
    """The edge that takes the place of one whose skip was taken has a skip itself: it goes on."""
    rows = [[1e-9, 0.02, 0.98]] * 14
    rows[2], rows[3], rows[4] = [1e-9, 0.6, 0.4], [1e-9, 0.7, 0.3], [1e-9, 0.55, 0.45]
    space, arch = weighed(NAMES, rows)
    assert [e for _, e in get_strategy("p-darts", skip_cap=2).derive(arch, space).normal[1]] == [
        0,
        1,
    ]
    (node,) = get_strategy("p-darts", skip_cap=1).derive(arch, space).normal[1:2]
    # Edge 2 loses its skip (0.6), edge 4 comes with one (0.55) and loses it as well.
    assert sorted(node) == [("sep_conv_3x3", 2), ("skip_connect", 1)]


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"space": "nb201"}, "method p-darts chooses which edges a node keeps"),
        ({"space": "S2"}, "stage_operations is '5,3'; falling numbers below 2 are needed"),
        ({"stage_operations": "5"}, "stage_operations is '5'; 2 numbers, 1 to 64, with commas"),
        ({"stage_layers": "0,6,a"}, "stage_layers is '0,6,a'; 3 numbers, 0 to 200, with commas"),
        ({"stage_layers": "0,6.5,12"}, "stage_layers is '0,6.5,12'; 3 numbers"),
        ({"skip_dropout": "0,1,0"}, "skip_dropout is '0,1,0'; 3 numbers, 0 to below 1"),
    ],
)
def test_what_is_refused(settings, text):
    with pytest.raises(ConfigError, match=text.replace(".", r"\.")):
        make_config(SearchConfig, {"method": "p-darts", **settings})
    with pytest.raises(ConfigError, match="epochs is 2; at least 3, one a stage, are needed"):
        Searcher(make_config(SearchConfig, {"method": "p-darts", "epochs": 2, "layers": 1}))


TINY = {
    "method": "p-darts", "channels": 2, "layers": 1, "stage_layers": "0,1,2", "images": 64,
    "batch_size": 16, "epochs": 3, "arch_start_epoch": 0, "train_epochs": 1, "train_channels": 2,
    "train_layers": 1, "tensorboard": False, "compare_steps": 1, "arch_lr": 0.1,
    "skip_dropout": "0.1,0.4,0.7",
}  # fmt: skip


def test_a_search_by_stages(tmp_path):
    config = make_config(SearchConfig, {**TINY, "out": str(tmp_path)})
    report = run_search(config, console=QUIET)
    texts = report["genotype_by_skip_cap"]
    assert report["genotype"] == texts["2"]
    written = json.loads((tmp_path / "report.json").read_text())
    assert written["genotype_by_skip_cap"] == texts
    assert "By the most skips" in (tmp_path / "report.md").read_text()
    searcher = Searcher(config)
    searcher.resume(tmp_path / "search.pt")
    assert [searcher.space.num_candidates(cell) for cell in ("normal", "reduce")] == [3, 3]
    assert len(searcher.network.cells) == 3
    assert [round(past["noise_amplitude"], 3) for past in searcher.history] == [0, 0, 0]


def test_the_gradient_of_the_logits_is_clipped():
    searcher = Searcher(make_config(SearchConfig, TINY))
    searcher.start_epoch()
    searcher.strategy.arch_grad_clip = 1e-3
    searcher.run_step()
    grads = torch.stack([a.grad.norm() for a in searcher.bilevel.alphas])
    assert grads.norm() == pytest.approx(1e-3, rel=1e-3)
