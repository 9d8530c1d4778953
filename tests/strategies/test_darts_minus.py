"""DARTS-: the auxiliary skip beside the mixture, folded or not; its schedule; its step."""

import re

import pytest
import torch
from eager_cases import LAYERS, assert_gradients, batches, eager_loss, problem, softmax

from fastnas import nn, reference
from fastnas.layers.primitives import FactorizedReduce, Identity
from fastnas.nn import ArchParameters
from fastnas.spaces import get_space
from fastnas.strategies import get_strategy

EPOCH = 20
BETA = 0.6  # of EPOCH of 50, linear


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [1.0, 0.98, 0.5, 0.02]),
        ({"auxiliary_skip": 0.5}, [0.5, 0.49, 0.25, 0.01]),
        ({"auxiliary_decay": "cosine"}, [1.0, 0.9990134, 0.5, 0.0009866]),
    ],
    ids=str,
)
def test_beta_falls_to_0(options, expected):
    strategy, found = get_strategy("darts-minus", **options), []
    for epoch in (0, 1, 25, 49):
        strategy.start_epoch(epoch, 50)
        found.append(strategy.figures()["auxiliary_skip"])
    assert found == pytest.approx(expected, abs=1e-7)


def test_where_the_skip_is_a_candidate_already():
    """At stride 1, if every edge of the cell type has it in one place: S1 has edges without."""
    folded = {}
    for name in ("S0", "S1", "S2", "S4", "nb201"):
        space = get_strategy("darts-minus").network_space(get_space(name))
        folded[name] = [space.folded(cell_type) for cell_type in space.cell_types]
        searched = get_space(name)
        assert [space.num_candidates(c) - searched.num_candidates(c) for c in space.cell_types] == [
            int(k is None) for k in folded[name]
        ]
    skip = get_space("nb201").candidates("normal")[0].index("skip_connect")
    assert folded == {"S0": [3, None], "S1": [None] * 2, "S2": [0, None], "S4": [None] * 2,
                      "nb201": [skip]}  # fmt: skip


def test_the_weights_by_hand():
    strategy, space = get_strategy("darts-minus"), get_space("S2")
    strategy.network_space(space)
    strategy.start_epoch(EPOCH, 50)
    weights = strategy.forward_weights(ArchParameters(space, 0.0))
    torch.testing.assert_close(weights["normal"], torch.tensor([[1.1, 0.5]] * 14))
    torch.testing.assert_close(weights["reduce"], torch.tensor([[0.5, 0.5, 0.6]] * 14))
    assert strategy.mixing_weights(ArchParameters(space, 0.0))["reduce"].shape == (14, 2)


def test_a_network_is_asked_for_before_its_weights():
    with pytest.raises(RuntimeError, match="weighs a network of its network_space"):
        get_strategy("darts-minus").forward_weights(ArchParameters(get_space("S2")))


class MixedOp(reference.MixedOp):
    """The paper's equation 4: the mixture, and beta times a skip."""

    def __init__(self, candidates, C, stride, **options):
        super().__init__(candidates, C, stride, **options)
        self.auxiliary = FactorizedReduce(C, C, affine=False) if stride == 2 else Identity()

    def forward(self, x, w):
        return super().forward(x, w) + BETA * self.auxiliary(x)


class Cell(reference.Cell):
    mixed_op = MixedOp


class NB201Cell(reference.NB201Cell):
    mixed_op = MixedOp


class Network(reference.SearchNetwork):
    cell = Cell


class NB201Network(reference.NB201SearchNetwork):
    cell = NB201Cell


def eager_twin(step, space):
    """The network of the equation, its auxiliary skips being the last candidates of ours."""
    kind = {"darts": Network, "nb201": NB201Network}[space.layout]
    eager = kind(space, 2, 4, LAYERS[space.layout]).double()
    last = {f"cells.{i}._ops.{e}._ops.{len(op._ops) - 1}.": f"cells.{i}._ops.{e}.auxiliary."
            for i, cell in enumerate(step.network.cells) if hasattr(cell, "_ops")
            for e, op in enumerate(cell._ops)
            if len(op._ops) > space.num_candidates(cell.cell_type)}  # fmt: skip

    def name(ours):
        start = re.match(r"cells\.\d+\._ops\.\d+\._ops\.\d+\.", ours)
        return ours if start is None else ours.replace(start[0], last.get(start[0], start[0]), 1)

    eager.load_state_dict({name(k): v for k, v in step.network.state_dict().items()})
    return eager, name


@pytest.mark.parametrize("name", ["S0", "S1", "S2", "S3", "S4", "nb201"])
def test_the_step_is_that_of_the_equation(name, monkeypatch):
    step, _ = problem("darts-minus", name)
    if name == "S4":  # its `noise` draws its own at every pass
        monkeypatch.setattr(torch, "randn_like", torch.ones_like)
    eager, renamed = eager_twin(step, get_space(name))
    step.strategy.start_epoch(EPOCH, 50)
    valid, train = batches()
    alphas = list(step.arch.parameters())
    loss = eager_loss(eager, softmax(step.arch), valid)
    expected = torch.autograd.grad(loss, alphas)
    found = step.arch_step(valid, train)
    assert_gradients(alphas, expected)
    torch.testing.assert_close(found, loss.detach(), rtol=1e-10, atol=0)
    loss = eager_loss(eager, softmax(step.arch), train)
    params = dict(eager.named_parameters())
    loss.backward()
    found, _ = step.weight_step(train)
    torch.testing.assert_close(found, loss.detach(), rtol=1e-10, atol=0)
    ours = dict(step.network.named_parameters())
    assert_gradients(ours.values(), [params[renamed(k)].grad for k in ours])


@pytest.mark.parametrize("name", ["S0", "S1", "nb201"])
def test_its_cells_are_fused(name):
    step, _ = problem("darts-minus", name)
    for cell in step.network.dags():
        assert cell.why_not_fused(torch.randn(2, 2, 8, 8, dtype=torch.float64)) is None


def test_the_cell_is_derived_without_the_auxiliary_skip():
    space = get_space("S0")
    strategy = get_strategy("darts-minus")
    strategy.network_space(space)
    strategy.start_epoch(0, 50)
    arch = ArchParameters(space, 0.0)
    with torch.no_grad():
        arch.normal[:, 4] = 1.0  # sep_conv_3x3; with beta 1 the skip has more weight
    genotype = strategy.derive(arch, space)
    assert {op for node in genotype.normal for op, _ in node} == {"sep_conv_3x3"}


def test_a_network_of_it_has_the_parameters_of_the_public_layout():
    """S0 with C=16 and 8 cells: 2 x 8 more factorized reductions than DARTS' 1,930,618."""
    space = get_strategy("darts-minus").network_space(get_space("S0"))
    network = nn.SearchNetwork(space, 16, 10, 8)
    # Edges out of the inputs of the reduction cells, of 32 and of 64 channels.
    more = 8 * (32 * 32 + 64 * 64)
    assert sum(p.numel() for p in network.parameters()) == 1_930_618 + more
