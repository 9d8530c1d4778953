"""DARTS-PT: what is decided when and how, by hand; the step on what was decided, against eager."""

import pytest
import torch
from eager_cases import assert_gradients, batches, eager_loss, problem

from fastnas.nn import ArchParameters
from fastnas.spaces import get_space
from fastnas.strategies import get_strategy
from fastnas.strategies.base import Stage


def begun(name="S0", **options):
    """A strategy in its second stage, and logits."""
    strategy = get_strategy("darts-pt", **options)
    space = strategy.space(get_space(name))
    strategy.start_stage(1)
    return strategy, ArchParameters(space, 0.0), space


@pytest.mark.parametrize(
    ("name", "tune", "epochs"), [("S0", 5, 81), ("S2", 1, 17), ("nb201", 5, 26), ("nb201", 2, 11)]
)
def test_the_second_stage(name, tune, epochs):
    """14 edges and 3 nodes with more than two of them, or 6 edges: the last has an epoch after."""
    strategy = get_strategy("darts-pt", tune_epochs=tune)
    strategy.space(get_space(name))
    first, second = strategy.stages(8, 50)
    assert first == Stage(8, 50)
    assert second == Stage(8, epochs, continues=True, constant_rate=0.1)


def test_when_something_is_decided():
    strategy, arch, _ = begun("nb201")
    seen = []
    for epoch in (*range(26), 25):
        before = strategy._made
        strategy.decide(epoch, arch, lambda weights: 0.5)
        if strategy._made != before:
            seen.append(epoch)
    assert seen == [0, 5, 10, 15, 20, 25]
    assert strategy.operations == {"normal": [0] * 6}  # of equal ones the first


def test_nothing_is_decided_in_the_search():
    strategy, arch, _ = begun("nb201")
    strategy.start_stage(0)
    strategy.decide(0, arch, lambda weights: pytest.fail("asked"))
    assert strategy.operations == {"normal": [-1] * 6}


def test_an_epoch_that_is_begun_again_decides_nothing_more():
    strategy, arch, _ = begun("S2")
    strategy.decide(0, arch, lambda weights: 0.5)
    again, _, _ = begun("S2")
    again.load_state_dict(strategy.state_dict())
    again.decide(0, arch, lambda weights: pytest.fail("asked"))
    assert again.state_dict() == strategy.state_dict()


def test_an_edge_keeps_what_the_supernet_misses_most():
    """Each mask is of one entry; the worst is candidate 5, then the second cell type is asked on
    what the first has decided."""
    strategy, arch, _ = begun("S0")
    asked = []

    def accuracy(weights):
        asked.append({cell: w.clone() for cell, w in weights.items()})
        rows = {cell: (w == 0).nonzero().tolist() for cell, w in weights.items()}
        masked = [k for at in rows.values() if len(at) == 1 for _, k in at]
        return 0.2 if masked == [5] else 0.6

    torch.manual_seed(3)
    edges = [int(torch.randint(14, ())) for _ in range(2)]
    torch.manual_seed(3)
    strategy.decide(0, arch, accuracy)
    # `none` cannot be derived, so that it is never kept and not asked about.
    assert len(asked) == 2 * 7
    for i, weights in enumerate(asked[:7]):
        expected = torch.full((14, 8), 1 / 8)
        expected[edges[0], i + 1] = 0
        torch.testing.assert_close(weights["normal"], expected)
        torch.testing.assert_close(weights["reduce"], torch.full((14, 8), 1 / 8))
    assert strategy.operations["normal"][edges[0]] == 5
    one_hot = torch.zeros(8)
    one_hot[5] = 1
    for weights in asked[7:]:
        torch.testing.assert_close(weights["normal"][edges[0]], one_hot)
    decided = [row for row in strategy.operations.values() for k in row if k >= 0]
    assert len(decided) == 2
    torch.testing.assert_close(strategy.forward_weights(arch)["normal"][edges[0]], one_hot)


def test_none_is_a_candidate_where_cells_may_have_it():
    strategy, arch, space = begun("nb201")
    asked = []
    strategy.decide(0, arch, lambda weights: asked.append(weights) or 0.5)
    assert len(asked) == space.num_candidates("normal") == 5


def test_nodes_drop_the_edges_that_are_missed_least():
    """Edge e missing leaves an accuracy of quality[e]; nodes 1 to 3 keep the two lowest."""
    strategy, arch, space = begun("S2", tune_epochs=1)
    quality = [0, 0, 0.5, 0.4, 0.3, 0.1, 0.1, 0.1, 0.1, 0.2, 0.9, 0.1, 0.8, 0.3]
    strategy.operations = {cell: [1] * 14 for cell in space.cell_types}

    def accuracy(weights):
        gone = {cell: (w.sum(1) == 0).nonzero().flatten().tolist() for cell, w in weights.items()}
        new = {
            cell: [e for e in at if e not in strategy.dropped[cell]] for cell, at in gone.items()
        }
        (edge,) = [e for at in new.values() for e in at]
        return quality[edge]

    orders = []
    for epoch in (14, 15, 16):
        strategy.decide(epoch, arch, accuracy)
        orders.append(tuple(strategy.nodes_left["normal"]))
    assert strategy.nodes_left == {"normal": [], "reduce": []}
    # Of the equal ones of node 2 the last edges go first.
    expected = {2, 7, 8, 10, 12, 13}
    assert all(set(dropped) == expected for dropped in strategy.dropped.values())
    weights = strategy.forward_weights(arch)["normal"]
    assert {e for e in range(14) if not weights[e].any()} == expected
    genotype = strategy.derive(arch, space)
    kept = [sorted(source for _, source in node) for node in genotype.normal]
    assert kept == [[0, 1], [1, 2], [0, 1], [0, 2]]
    assert {op for node in genotype.normal for op, _ in node} == {"sep_conv_3x3"}
    assert {c.count for c in strategy.undecided(arch, space).values()} == {0}
    # The entropy of the history is of mixtures, also on edges that are gone.
    assert all(w.sum(-1).eq(1).all() for w in strategy.mixing_weights(arch).values())


@pytest.mark.parametrize("space", ["S3", "nb201"])
def test_the_step_on_what_was_decided_is_eagers(space):
    step, eager = problem("darts-pt", space)
    strategy = step.strategy
    strategy.start_stage(1)
    cells = step.network.space.cell_types
    for cell in cells:
        strategy.operations[cell][1] = 1
        strategy.operations[cell][4] = 2
        strategy.dropped[cell] = [4] if space == "S3" else []

    def weights():
        found = {}
        for cell, alpha in step.arch.alphas().items():
            w = torch.softmax(alpha, -1)
            rows = [w[e] for e in range(len(w))]
            rows[1] = torch.eye(w.shape[1], dtype=w.dtype)[1]
            rows[4] = torch.eye(w.shape[1], dtype=w.dtype)[2] * (space != "S3")
            found[cell] = torch.stack(rows)
        return found

    valid, train = batches()
    loss = eager_loss(eager, weights(), valid)
    expected = torch.autograd.grad(loss, step.alphas)
    found = step.arch_step(valid, train)
    torch.testing.assert_close(found, loss.detach(), rtol=1e-10, atol=0)
    assert_gradients(step.alphas, expected)
    assert all(not alpha.grad[[1, 4]].any() for alpha in step.alphas)
    loss = eager_loss(eager, weights(), train)
    loss.backward()
    found, _ = step.weight_step(train)
    torch.testing.assert_close(found, loss.detach(), rtol=1e-10, atol=0)
    assert_gradients(step.params, [p.grad for p in eager.parameters()])


def test_a_space_is_asked_for_first():
    with pytest.raises(RuntimeError, match="decides in a space; ask for it first"):
        get_strategy("darts-pt").stages(8, 50)
