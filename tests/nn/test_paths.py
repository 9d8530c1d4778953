"""Sampled paths through cells and networks against eager single paths, straight-through."""

import pytest
import torch
import torch.nn.functional as F

import fastnas
from fastnas import nn, reference
from fastnas.nn import Paths
from fastnas.ops import draw_rng, sample_paths
from fastnas.reference import HardWeights, SkipNoise
from fastnas.reference.gumbel import gumbel_draw
from fastnas.spaces import CELL_TYPES, get_space

NODES = (2, 3, 4, 5)
SPACE = get_space("S0")
TOPOLOGIES = {"gdas": ("none", False), "siblings": ("none", True), "rome": ("top2", False),
              "rome-v1": ("pairs", False)}  # fmt: skip
EDGES = {"none": 0, "top2": 14, "pairs": 20}


def straight_through(paths, alpha, rng, tau):
    """h = onehot(argmax P) + P - sg(P), [paths, types, E, K], of the same draws."""
    P = torch.softmax(
        (alpha.log_softmax(-1) + gumbel_draw(rng, 0, (paths, *alpha.shape))) / tau, -1
    )
    return F.one_hot(P.argmax(-1), alpha.shape[-1]) + (P - P.detach())


def draws(name, paths, seed=0):
    topology, siblings = TOPOLOGIES[name]
    generator = torch.Generator().manual_seed(seed)
    alpha = torch.randn(2, 14, 8, generator=generator, dtype=torch.float64)
    beta = torch.randn(2, EDGES[topology], generator=generator, dtype=torch.float64)
    rng = torch.randint(2**62, (2,), generator=generator)
    return alpha, beta if EDGES[topology] else None, rng, topology, siblings


def fused_weights(alpha, beta, rng, topology, siblings, paths, axis=True):
    sample = sample_paths(
        alpha, beta, nodes=NODES, tau=2.0, topology=topology, paths=paths, rng=rng
    )
    return {
        cell: Paths(*(t[:, i] if axis else t[0, i] for t in sample), siblings)
        for i, cell in enumerate(CELL_TYPES)
    }


def eager_weights(alpha, beta, rng, topology, paths):
    """Path by path; the gates of the edges come from the op's own straight-through weights."""
    sample = sample_paths(
        alpha, beta, nodes=NODES, tau=2.0, topology=topology, paths=paths, rng=rng
    )
    h = straight_through(paths, alpha, rng, 2.0)
    if beta is not None:  # of what is not sampled eager single paths of ROME know nothing
        at = F.one_hot(sample.op.clamp(min=0), alpha.shape[-1])
        h = at * sample.weight[..., None]
    return [
        {cell: HardWeights(h[p, i], sample.op[p, i]) for i, cell in enumerate(CELL_TYPES)}
        for p in range(paths)
    ]


def networks(layers=3, **options):
    eager = reference.SinglePathNetwork(SPACE, 4, 5, layers).double()
    ours = nn.SearchNetwork(SPACE, 4, 5, layers, **options).double()
    ours.load_state_dict(eager.state_dict())
    return eager, ours


def gradients(loss, network, *inputs):
    names = [name for name, _ in network.named_parameters()]
    wanted = [*network.parameters(), *(t for t in inputs if t is not None)]
    found = torch.autograd.grad(loss, wanted, allow_unused=True)
    return dict(zip([*names, "x", "alpha", "beta"], found))


def assert_same(ours, expected):
    scale = max(float(g.abs().max()) for g in expected.values() if g is not None)
    for name, e in expected.items():
        assert (ours[name] is None) == (e is None), name
        if e is not None:
            torch.testing.assert_close(ours[name], e, rtol=1e-10, atol=1e-10 * scale, msg=name)


@pytest.mark.parametrize(
    ("fused", "paths"), [(True, 1), (True, 3), (False, 2)],
    ids=["fused-1", "fused-3", "by modules-2"],
)  # fmt: skip
@pytest.mark.parametrize("name", TOPOLOGIES)
def test_a_network_equals_eager_single_paths(name, paths, fused):
    """Logits, gradients of params, input, alpha and beta, statistics; None where eager has None."""
    eager, ours = networks()
    for cell in eager.cells:
        cell.siblings = TOPOLOGIES[name][1]
    images = torch.randn(2, 3, 9, 8, dtype=torch.float64)
    results = []
    for network in (ours, eager):
        alpha, beta, rng, topology, siblings = draws(name, paths)
        x = images.clone().requires_grad_()
        alpha.requires_grad_()
        if beta is not None:
            beta.requires_grad_()
        if network is ours:
            weights = fused_weights(alpha, beta, rng, topology, siblings, paths)
            with fastnas.use_backend("auto" if fused else "eager"):
                logits = network(x, weights)
        else:
            each = eager_weights(alpha, beta, rng, topology, paths)
            logits = torch.stack([network(x, weights) for weights in each])
        loss = (logits * torch.linspace(-1, 1, logits.numel(), dtype=torch.float64).view(
            logits.shape)).sum()  # fmt: skip
        results.append((logits, gradients(loss, network, x, alpha, beta)))
    (logits, ours_grads), (expected, expected_grads) = results
    torch.testing.assert_close(logits, expected, rtol=1e-10, atol=1e-10)
    assert_same(ours_grads, expected_grads)
    state = ours.state_dict()
    for key, value in eager.state_dict().items():
        torch.testing.assert_close(state[key], value, rtol=1e-10, atol=1e-12)


def test_the_gradient_to_siblings_changes_no_value():
    """Only alpha's gradient differs: by the sum of what each node gets."""
    _, ours = networks()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    found = []
    for siblings in (False, True):
        alpha, _, rng, topology, _ = draws("gdas", 1)
        alpha.requires_grad_()
        logits = ours(x, fused_weights(alpha, None, rng, topology, siblings, 1))
        found.append((logits, gradients(logits.square().sum(), ours, None, alpha)))
    (a, plain), (b, reached) = found
    assert torch.equal(a, b)
    assert not torch.allclose(plain["x"], reached["x"])  # the first input given is alpha
    for name, _ in ours.named_parameters():
        if plain[name] is not None:
            torch.testing.assert_close(plain[name], reached[name], rtol=1e-10, atol=1e-12)


def test_one_path_without_an_axis():
    _, ours = networks(layers=1)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    given = draws("rome", 1)
    one = ours(x, fused_weights(*given, 1, axis=False))
    assert one.shape == (2, 5)
    torch.testing.assert_close(ours(x, fused_weights(*given, 1))[0], one, rtol=0, atol=0)


@pytest.mark.parametrize("fused", [True, False])
def test_a_mixed_op_runs_one_candidate(fused):
    expected = reference.MixedOp(SPACE.normal[0], 4, 1).double()
    ours = nn.MixedOp(SPACE.normal[0], 4, 1).double()
    ours.load_state_dict(expected.state_dict())
    x = torch.randn(4, 4, 5, 5, dtype=torch.float64)
    for k in range(8):
        weight = torch.tensor([0.7, -1.2], dtype=torch.float64)
        with fastnas.use_backend("auto" if fused else "eager"):
            both = ours(x, Paths(torch.tensor([k, k]), weight))
            one = ours(x[:2], Paths(torch.tensor(k), weight[0]))
        y = torch.cat([w * expected._ops[k](g) for w, g in zip(weight, x.chunk(2))])
        torch.testing.assert_close(both, y, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(one, y[:2], rtol=1e-10, atol=1e-12)


def test_evaluation_uses_the_running_statistics():
    _, ours = networks(layers=2)
    ours.eval()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    weights = fused_weights(*draws("gdas", 2), 2)
    assert ours.cells[0].why_not_fused(x) is None

    def results():
        y = ours(x, weights)
        inputs = [x, *ours.parameters()]
        return y, *torch.autograd.grad(y.square().sum(), inputs, materialize_grads=True)

    fused = results()
    with fastnas.use_backend("eager"):
        assert ours.cells[0].why_not_fused(x) is not None
        by_modules = results()
    for given, expected in zip(fused, by_modules):
        torch.testing.assert_close(given, expected, rtol=1e-10, atol=1e-11)


def test_autocast():
    ours = nn.SearchNetwork(SPACE, 4, 5, 2)
    alpha, _, rng, _, _ = draws("gdas", 2)
    with torch.autocast("cpu", torch.bfloat16):
        logits = ours(torch.randn(2, 3, 8, 8), fused_weights(alpha.float(), None, rng, "none",
                                                             False, 2))  # fmt: skip
        assert ours.cells[0].why_not_fused(torch.randn(2, 12, 8, 8)) is None
    assert logits.shape == (2, 2, 5)
    assert logits.isfinite().all()


@pytest.mark.parametrize("fused", [True, False])
def test_noise_of_each_path(fused):
    """The same streams give the same noise, other streams another."""
    ours = nn.SearchNetwork(SPACE, 4, 5, 3, noise=SkipNoise(factor=0.5)).double()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    choice = torch.full((2, 14), SPACE.normal[0].index("skip_connect"))
    weights = dict.fromkeys(CELL_TYPES, Paths(choice, torch.ones(2, 14, dtype=torch.float64)))
    draw = ours.draw(paths=2)
    assert draw.rng.shape == (2 * 3 * 4, 2)
    with fastnas.use_backend("auto" if fused else "eager"):
        first, second = ours(x, weights, draw)
        assert not torch.equal(first, second)
        draw.rng[12:] = draw.rng[:12]
        first, second = ours(x, weights, draw)
        torch.testing.assert_close(first, second, rtol=1e-12, atol=1e-12)
        assert ours(x, weights).shape == (2, 2, 5)
    with pytest.raises(ValueError, match="draw has 12 streams; 24 are needed"):
        ours(x, weights, nn.NoiseDraw(draw.level, draw_rng(12)))


def test_bad_input():
    ours = nn.SearchNetwork(SPACE, 4, 5, 3)
    x = torch.randn(2, 3, 8, 8)

    def paths(*shape, weight=None):
        return Paths(torch.zeros(shape, dtype=torch.int64), torch.ones(weight or shape))

    with pytest.raises(ValueError, match=r"choice has shape \[13\]; \[14\] or \[paths, 14\]"):
        ours(x, dict.fromkeys(CELL_TYPES, paths(13)))
    with pytest.raises(ValueError, match=r"weight has shape \[14\]; that of choice, \[2, 14\]"):
        ours(x, dict.fromkeys(CELL_TYPES, paths(2, 14, weight=(14,))))
    with pytest.raises(ValueError, match="number of paths: normal 2, reduce no paths axis"):
        ours(x, {"normal": paths(2, 14), "reduce": torch.ones(14, 8)})
    op = nn.MixedOp(SPACE.normal[0], 4, 1)
    nowhere = Paths(torch.tensor(-1), torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"w.choice is \[-1\]; 0 to 7 is allowed"):
        op(x[:, :1].expand(-1, 4, -1, -1), nowhere)
