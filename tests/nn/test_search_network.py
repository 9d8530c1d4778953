"""fastnas.nn against fastnas.reference: outputs, gradients, running statistics, names."""

import copy

import pytest
import torch

from fastnas import nn, reference
from fastnas.nn.mixed_op import select
from fastnas.ops import draw_rng
from fastnas.reference import SkipNoise
from fastnas.spaces import SPACES, get_space


def networks(space, **options):
    eager = reference.SEARCH_NETWORKS[space.layout](space, 4, 10, 3, **options).double()
    fused = nn.SEARCH_NETWORKS[space.layout](space, 4, 10, 3, **options).double()
    fused.load_state_dict(eager.state_dict())
    return eager, fused


def run(network, arch, x):
    weights = {cell: alpha.softmax(-1) for cell, alpha in arch.alphas().items()}
    y = network(x, weights)
    inputs = [*arch.parameters(), *network.parameters()]
    return y, torch.autograd.grad(y.square().sum(), inputs, allow_unused=True)


@pytest.mark.parametrize("name", [name for name in SPACES if name != "S4"])
def test_equals_the_reference(name):
    space = get_space(name)
    eager, fused = networks(space)
    arch = nn.ArchParameters(space, scale=1.0).double()
    x = torch.randn(2, 3, 9, 8, dtype=torch.float64)
    expected, expected_grads = run(eager, arch, x)
    y, grads = run(fused, arch, x)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-12)
    for g, e in zip(grads, expected_grads):
        torch.testing.assert_close(g, e, rtol=1e-10, atol=1e-11 * float(e.abs().max() + 1))
    state, expected_state = fused.state_dict(), eager.state_dict()
    assert list(state) == list(expected_state)
    for key, value in expected_state.items():
        torch.testing.assert_close(state[key], value, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("frozen", [False, True])
def test_constant_statistics_equal_the_reference(frozen):
    """In evaluation mode, and in training where all batch norms are frozen."""
    space = get_space("S0")
    pair = networks(space)
    arch = nn.ArchParameters(space, scale=1.0).double()
    weights = {cell: alpha.softmax(-1) for cell, alpha in arch.alphas().items()}
    x = torch.randn(2, 3, 9, 8, dtype=torch.float64, requires_grad=True)
    results = []
    for net in pair:
        run(net, arch, x)  # moves the running statistics
        constant(net, frozen)
        before = copy.deepcopy(net.state_dict())
        y = net(x, weights)
        inputs = [x, *arch.parameters(), *net.parameters()]
        results.append((y, *torch.autograd.grad(y.square().sum(), inputs, retain_graph=True)))
        assert all(torch.equal(t, before[key]) for key, t in net.state_dict().items())
    assert all(cell.why_not_fused(x) is None for cell in pair[1].cells)
    for expected, given in zip(*results):
        atol = 1e-10 * float(expected.abs().max())
        torch.testing.assert_close(given, expected, rtol=1e-10, atol=atol)


def test_frozen_norms_beside_noise_or_others_are_not_fused():
    x = torch.randn(2, 3, 9, 8, dtype=torch.float64)
    _, noisy = networks(get_space("S0"), noise=SkipNoise())
    constant(noisy, frozen=True)
    _, mixed = networks(get_space("S0"))
    constant(mixed, frozen=True)
    for cell in mixed.cells:
        cell.preprocess0.train()
    for cell in (*noisy.cells, *mixed.cells):
        assert "a batch norm is in another mode" in cell.why_not_fused(x)


def constant(network, frozen):
    """Makes all statistics constants: in evaluation mode, or only its batch norms."""
    network.train(frozen)
    for norm in network.modules():
        if isinstance(norm, torch.nn.BatchNorm2d):
            norm.eval()


def test_s4_draws_its_noise_candidate():
    space = get_space("S4")
    eager, fused = networks(space)
    arch = nn.ArchParameters(space).double()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    torch.manual_seed(3)
    expected, _ = run(eager, arch, x)
    torch.manual_seed(3)
    y, _ = run(fused, arch, x)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-12)


def test_the_weight_of_none_gets_gradient_zero():
    space = get_space("S0")
    _, fused = networks(space)
    arch = nn.ArchParameters(space).double()
    w = {cell: alpha.softmax(-1).detach().requires_grad_() for cell, alpha in arch.alphas().items()}
    fused(torch.randn(2, 3, 8, 8, dtype=torch.float64), w).sum().backward()
    assert torch.equal(w["normal"].grad[:, 0], torch.zeros(14, dtype=torch.float64))
    assert (w["normal"].grad[:, 1:] != 0).all()


def test_names_are_those_of_the_public_code():
    keys = set(nn.SearchNetwork(get_space("S0"), 4, 10, 3).state_dict())
    assert {
        "stem.0.weight",
        "stem.1.running_mean",
        "cells.0.preprocess0.op.1.weight",
        "cells.2.preprocess0.conv_1.weight",
        "cells.0._ops.0._ops.1.1.running_var",
        "cells.0._ops.13._ops.4.op.6.weight",
        "cells.1._ops.0._ops.3.conv_2.weight",
        "classifier.weight",
    } <= keys
    assert not any("alpha" in key for key in keys)


def test_edges_into():
    cell = nn.Cell(get_space("S2"), "normal", 8, 8, 4, False)
    assert [list(cell.edges_into(n)) for n in range(4)] == [
        [0, 1],
        [2, 3, 4],
        [5, 6, 7, 8],
        [9, 10, 11, 12, 13],
    ]


@pytest.mark.parametrize("form", ["gaussian", "uniform"])
def test_noise_reaches_every_skip_and_only_in_training(form):
    space = get_space("S2")
    _, quiet = networks(space)
    _, noisy = networks(space, noise=SkipNoise(form))
    noisy.load_state_dict(quiet.state_dict())
    arch = nn.ArchParameters(space).double()
    weights = {cell: alpha.softmax(-1) for cell, alpha in arch.alphas().items()}
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    draw = noisy.draw()
    assert draw is not None and draw.rng.shape == (3 * 4, 2)
    assert torch.equal(noisy(x, weights, draw), noisy(x, weights, draw))
    assert not torch.equal(noisy(x, weights), noisy(x, weights))
    noisy.set_noise_amplitude(0.0)
    torch.testing.assert_close(noisy(x, weights), quiet(x, weights), rtol=1e-9, atol=1e-10)
    noisy.set_noise_amplitude(1.0)
    assert not torch.allclose(noisy(x, weights), quiet(x, weights))
    noisy.eval(), quiet.eval()
    noisy.load_state_dict(quiet.state_dict())
    assert noisy.draw() is None
    torch.testing.assert_close(noisy(x, weights), quiet(x, weights))


@pytest.mark.parametrize(
    "index", [[0, 1, 2, 3, 4], [1, 2], [4], [0, 2, 3], [1, 2, 4], [4, 0, 1], [2, 2]], ids=str
)
def test_select_is_indexing(index):
    w = torch.randn(5, dtype=torch.float64, requires_grad=True)
    expected = w[torch.tensor(index)]
    dy = torch.randn(len(index), dtype=torch.float64)
    (dw,) = torch.autograd.grad(expected, w, dy)
    selected = select(w, index)
    assert torch.equal(selected, expected)
    assert torch.equal(torch.autograd.grad(selected, w, dy)[0], dw)
    assert (select(w, index) is w) == (len(index) == 5)


def test_a_draw_travels_in_one_piece():
    level, rng = SkipNoise(factor=0.3, mean=0.7).level(0.5), draw_rng(6)
    draw = nn.NoiseDraw.unpacked(nn.NoiseDraw(level, rng).packed().clone())
    assert torch.equal(draw.level, level) and torch.equal(draw.rng, rng)


def test_cell_draws_as_the_reference_formula():
    noise = SkipNoise(factor=0.5)
    op = nn.MixedOp(["skip_connect", "avg_pool_3x3"], 3, 1, noise=noise).double()
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    w = torch.tensor([0.3, 0.7], dtype=torch.float64)
    torch.manual_seed(7)
    y = op(x, w)
    torch.manual_seed(7)
    rng = draw_rng()[0]
    terms = [op._ops[0](x), op._ops[1](x)]
    expected = reference.mixed_sum(terms, w, [0], noise.form, noise.level(), rng)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)


def test_noise_sits_on_stride_2_skips_too():
    op = nn.MixedOp(["skip_connect"], 4, 2, noise=SkipNoise())
    x, w = torch.randn(2, 4, 8, 8), torch.ones(1)
    assert not torch.equal(op(x, w), op(x, w))
    op.eval()
    assert torch.equal(op(x, w), op(x, w))


def test_skip_drop_path_drops_whole_samples_and_keeps_the_mean():
    op = nn.MixedOp(["skip_connect"], 2, 1, skip_drop_path=0.3)
    x, w = torch.ones(4000, 2, 1, 1), torch.ones(1)
    y = op(x, w)
    dropped = (y == 0).all(dim=(1, 2, 3)) if hasattr(y, "all") else None
    values = y.unique()
    assert dropped is not None and 0.25 < float(dropped.double().mean()) < 0.35
    torch.testing.assert_close(values, torch.tensor([0.0, 1 / 0.7]))
    op.eval()
    assert torch.equal(op(x, w), x)


def test_drop_path_with_noise_drops_the_noise_too():
    op = nn.MixedOp(["skip_connect"], 2, 1, noise=SkipNoise(), skip_drop_path=0.5)
    x, w = torch.randn(200, 2, 3, 3), torch.ones(1)
    y = op(x, w)
    dropped = (y == 0).flatten(1).all(1)
    assert 60 < int(dropped.sum()) < 140
    kept = y[~dropped]
    assert not torch.allclose(kept, 2 * x[~dropped])


def test_candidates_by_module_and_by_own_name():
    own = {"halve": lambda C, stride: torch.nn.AvgPool2d(1, stride)}
    op = nn.MixedOp(["halve", torch.nn.Identity(), "none"], 3, 1, extra=own)
    x = torch.randn(2, 3, 4, 4)
    y = op(x, torch.tensor([1.0, 2.0, 5.0]))
    torch.testing.assert_close(y, 3 * x)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: nn.MixedOp([], 3, 1), "candidates is empty"),
        (lambda: nn.MixedOp(["sep_conv_4x4"], 3, 1), "sep_conv_4x4"),
        (lambda: nn.MixedOp(["none"], 3, 1, skip_drop_path=1.0), "skip_drop_path is 1.0"),
        (lambda: nn.MixedOp(["none"], 3, 1, skips=[2]), "skips"),
        (
            lambda: nn.MixedOp(["none"], 3, 1)(torch.ones(1, 3, 2, 2), torch.ones(2)),
            r"w has shape \[2\]; \[1\] is needed",
        ),
        (lambda: nn.SearchNetwork(get_space("S2"), 0, 10, 3), "C is 0"),
        (
            lambda: nn.SearchNetwork(get_space("S2"), 4, 10, 3)(torch.ones(1, 1, 8, 8), {}),
            r"x has shape \[1, 1, 8, 8\]; \[\*, 3, \*, \*\] is needed",
        ),
        (
            lambda: nn.SearchNetwork(get_space("S2"), 4, 10, 3)(torch.ones(1, 3, 8, 8), {}),
            "normal, reduce is missing",
        ),
        (
            lambda: nn.Cell(get_space("S2"), "normal", 8, 8, 4, False)(
                torch.ones(1, 8, 4, 4), torch.ones(1, 8, 4, 4), torch.ones(14, 3)
            ),
            r"w has shape \[14, 3\]; \[14, 2\] is needed",
        ),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_the_weight_step_saves_no_candidate_for_frozen_weights():
    op = nn.MixedOp(["skip_connect", "avg_pool_3x3"], 3, 1)
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    shapes = []

    def pack(t):
        shapes.append(tuple(t.shape))
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        outputs = op.terms(x).outputs
        shapes.clear()
        op.reduce(outputs, torch.ones(2), [], None)
    assert tuple(x.shape) not in shapes


def test_compiles_at_its_first_call():
    """Nothing that it keeps of its modules may be made while torch.compile traces."""
    space = get_space("S3")
    eager = reference.SearchNetwork(space, 2, 10, 1)
    fused = nn.SearchNetwork(space, 2, 10, 1)
    fused.load_state_dict(eager.state_dict())
    w = {cell: alpha.softmax(-1) for cell, alpha in nn.ArchParameters(space).alphas().items()}
    x = torch.randn(2, 3, 8, 8)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(fused, backend="eager")(x, w), eager(x, w))
