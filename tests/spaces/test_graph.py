"""Cells of NAS-Bench-Graph: one spelling of each, its key, its texts, its drawing."""

from itertools import product

import numpy as np
import pytest

from fastnas.blackbox.domains import Cells, Distributions
from fastnas.search.config import ConfigError, TrainConfig, make_config
from fastnas.search.genotype_file import read_genotype
from fastnas.spaces import GraphGenotype, Space, dump, parse, to_json
from fastnas.spaces.distribution import OperationDistribution
from fastnas.spaces.graph import GRAPH, GRAPH_OPS, SHAPES, GraphSlots

CELL = GraphGenotype((0, 1, 1, 2), ("gcn", "cheb", "gin", "fc"))
LINKS = list(product(*(range(node) for node in range(1, 5))))


def test_the_spellings_of_the_documentation_are_one_cell():
    """The README of the package has both; its third node reads the second, its fourth the first."""
    other = GraphGenotype([0, 1, 2, 1], ["gcn", "gin", "fc", "cheb"])
    assert other == GraphGenotype([0, 1, 1, 2], ["gcn", "gin", "cheb", "fc"])
    assert other.edges() == (("gcn", 1, 0), ("gin", 2, 1), ("cheb", 3, 1), ("fc", 4, 2))
    assert hash(other) == hash(parse(dump(other, "nas-bench-graph")))
    assert other.key == 61237


@pytest.mark.parametrize(
    ("links", "ops", "links_kept", "ops_kept"),
    [
        # A skip in a chain, one that only it reads what it reads, one from the input to the output.
        ((0, 1, 2, 3), "gcn skip gin fc", (0, 1, 2, 3), "skip gcn gin fc"),
        ((0, 1, 1, 1), "gcn skip gin fc", (0, 1, 1, 1), "gcn gin fc skip"),
        ((0, 0, 0, 1), "gcn skip gin skip", (0, 1, 2, 2), "skip skip gcn gin"),
        ((0, 0, 1, 1), "skip gat gin gcn", (0, 1, 1, 1), "skip gat gcn gin"),
        ((0, 0, 0, 3), "fc gin gat arma", (0, 0, 0, 1), "gat gin fc arma"),
        ((0, 0, 0, 0), "skip skip skip skip", (0, 1, 2, 3), "skip skip skip skip"),
    ],
)
def test_what_computes_the_same_is_kept_once(links, ops, links_kept, ops_kept):
    kept = GraphGenotype(links, ops.split())
    assert (kept.links, " ".join(kept.ops)) == (links_kept, ops_kept)
    assert GraphGenotype(kept.links, kept.ops) == kept


def test_keys():
    assert all(GraphGenotype(links, CELL.ops).links in SHAPES for links in LINKS)
    for key in (0, 61237, 88887, 88888):
        assert GraphGenotype.from_key(key).key == key
    # A digit is none, another spelling has the key, or there are too many digits.
    for key in (91111, 10099, 73221, 123456, 10**20):
        with pytest.raises(ValueError, match=f"key is {key}, under which NAS-Bench-Graph keeps no"):
            GraphGenotype.from_key(key)


def test_all_keys_are_those_of_the_package():
    architecture = pytest.importorskip("nas_bench_graph.architecture", reason="no nas-bench-graph")
    keys = set()
    for links, ops in product(LINKS, product(GRAPH_OPS, repeat=4)):
        genotype = GraphGenotype(links, ops)
        assert genotype.key == architecture.Arch(list(links), list(ops)).valid_hash()
        keys.add(genotype.key)
    assert len(keys) == 26_207  # all skips among them, which the benchmark did not train


@pytest.mark.parametrize("write", [to_json, lambda cell: dump(cell, "nas-bench-graph"), GRAPH.line])
def test_texts_are_read_back(write):
    assert parse(write(CELL)) == parse(f"  {write(CELL)}\n") == CELL
    assert read_genotype(write(CELL)) == CELL


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Arch([0, 1, 1], ['gcn', 'gcn', 'gcn', 'gcn'])", "links: expected 4, one for each node"),
        (
            "Arch([0, 1, 1, 4], ['gcn', 'gcn', 'gcn', 'gcn'])",
            "what node 4 reads is 4; at most 3 is allowed",
        ),
        ("Arch([0, 1, 1, 1], ['gcn', 'gcn', 'gcn', 'conv'])", "operation 'conv' of node 4 is not"),
        ("Arch([0, 1, 1, 1000], ['gcn', 'gcn', 'gcn', 'gcn'])", r"expected Arch\(\[links\], \[ops"),
        ("Arch([0 1, 1, 1], ['gcn', 'gcn', 'gcn', 'gcn'])", r"expected Arch\(\[links\], \[ops"),
        ("Arch(__import__('os'), [])", r"expected Arch\(\[links\], \[ops"),
        ('{"nas-bench-graph": "Arch()"}', r"expected Arch\(\[links\], \[ops"),
    ],
)
def test_what_is_no_cell_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse(text)


def test_slots_are_the_nodes():
    layout, rng = GraphSlots(), np.random.default_rng(0)
    assert np.prod(list(Cells(layout).sizes.values())) == 157_464
    assert Cells(layout).sizes["normal.node3"] == 4
    seen = set()
    for _ in range(200):
        cell = Cells(layout).cell(Cells(layout).random(rng))
        seen.add(cell)
        # What is kept has other places, never other operations.
        p = OperationDistribution.of(cell, layout)
        assert Distributions(layout).cell(Distributions(layout).point(p), rng).ops
        assert sorted(layout.slots(cell)["normal"]) == sorted(cell.ops)
        assert OperationDistribution.of(p.sample(layout, rng), layout) == p
    assert len(seen) > 190
    with pytest.raises(ValueError, match="length is 5; cells of NAS-Bench-Graph have 4 slots"):
        GraphSlots(length=5)


def test_it_is_drawn_but_not_built():
    [drawn] = GRAPH.drawn_cells(CELL)
    ends = [(source, target) for source, target, op in drawn.edges if op is None]
    assert ends == [(3, 5), (4, 5)] and len(drawn.edges) == 6
    assert GRAPH.genotype(GRAPH.cells(CELL)) == CELL
    with pytest.raises(ConfigError, match="genotype is a NAS-Bench-Graph cell, which is looked"):
        make_config(TrainConfig, {"genotype": GRAPH.line(CELL)}).completed(CELL)
    with pytest.raises(ValueError, match="has no candidates on edges; studies search it"):
        Space("own", (GRAPH_OPS,) * 4, layout="nas-bench-graph")
