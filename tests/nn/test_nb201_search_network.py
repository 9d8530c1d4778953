"""The NAS-Bench-201 search network against its eager reference, mixed and on sampled paths.

That mixed it equals the reference in fp64 tests/nn/test_search_network.py shows, with all spaces.
"""

import pytest
import torch
import torch.nn.functional as F

import fastnas
from fastnas import nn, reference
from fastnas.nn import Paths
from fastnas.ops import sample_paths
from fastnas.reference import HardWeights, SkipNoise
from fastnas.reference.gumbel import gumbel_draw
from fastnas.spaces import NB201_OPS, Space, get_space

SPACE = get_space("nb201")
TAU = 2.0


def networks(layers=2, dtype=torch.float64, eager_kind=reference.NB201SearchNetwork, **options):
    eager = eager_kind(SPACE, 4, 5, layers, **options).to(dtype)
    ours = nn.NB201SearchNetwork(SPACE, 4, 5, layers, **options).to(dtype)
    ours.load_state_dict(eager.state_dict())
    return eager, ours


def outcome(network, weights, x, *inputs):
    """Logits, then the gradients of x, inputs and params, by name."""
    x = x.clone().requires_grad_()
    logits = network(x, weights)
    loss = (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum()
    named = dict(network.named_parameters())
    wanted = [*named.values(), x, *inputs]
    found = torch.autograd.grad(loss, wanted, allow_unused=True)
    return {"logits": logits.detach(), **dict(zip([*named, "x", "alpha"], found))}


def test_in_fp32_at_most_twice_as_wrong_as_eager():
    exact, _ = networks()
    eager, ours = (
        kind(SPACE, 4, 5, 2) for kind in (reference.NB201SearchNetwork, nn.NB201SearchNetwork)
    )
    state = {
        key: t.float() if t.is_floating_point() else t for key, t in exact.state_dict().items()
    }
    x, alpha = torch.randn(4, 3, 12, 12), torch.randn(6, 5)
    found = []
    for network in (exact, eager, ours):
        network.load_state_dict(state)
        dtype = network.classifier.weight.dtype
        own = alpha.to(dtype).requires_grad_()
        weights = {"normal": own.softmax(-1)}
        found.append(outcome(network, weights, x.to(dtype), own))
    for name, truth in found[0].items():
        errors = [float((other[name].double() - truth).abs().max()) for other in found[1:]]
        assert errors[1] <= 2 * errors[0] + 1e-5 * float(truth.abs().max()), name


@pytest.mark.parametrize("computed", ["auto", "eager"])
@pytest.mark.parametrize("paths", [1, 3])
@pytest.mark.parametrize("siblings", [False, True])
def test_paths_equal_eager_single_paths(paths, siblings, computed):
    """Logits, gradients of params, images and alpha, statistics; None where eager has None."""
    eager, ours = networks(eager_kind=reference.NB201SinglePathNetwork)
    eager.set_siblings(siblings)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    rng = torch.randint(2**62, (2,))
    start = torch.randn(1, 6, 5, dtype=torch.float64)
    found = []
    for network in (ours, eager):
        alpha = start.clone().requires_grad_()
        sample = sample_paths(alpha, None, nodes=(1, 2, 3), tau=TAU, paths=paths, rng=rng)
        if network is ours:
            assert len(sample.op.unique()) > 1
            weights = {"normal": Paths(sample.op[:, 0], sample.weight[:, 0], siblings)}
            with fastnas.use_backend(computed):
                found.append(outcome(ours, weights, x, alpha))
            continue
        logits = alpha.log_softmax(-1) + gumbel_draw(rng, 0, (paths, 1, 6, 5))
        P = torch.softmax(logits / TAU, -1)
        h = F.one_hot(P.argmax(-1), 5) + (P - P.detach())
        each = [{"normal": HardWeights(h[p, 0], sample.op[p, 0])} for p in range(paths)]
        found.append(outcome(_OneByOne(eager), each, x, alpha))
    for name, expected in found[1].items():
        assert (found[0][name] is None) == (expected is None), name
        if expected is not None:
            torch.testing.assert_close(
                found[0][name], expected, rtol=1e-10, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}"
            )
    state, expected = ours.state_dict(), eager.state_dict()
    for key, value in expected.items():
        torch.testing.assert_close(state[key], value, rtol=1e-10, atol=1e-12, msg=key)


class _OneByOne(torch.nn.Module):
    """A network on one path after the other: [paths, N, classes]."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def named_parameters(self):
        return self.network.named_parameters()

    def forward(self, x, weights):
        return torch.stack([self.network(x, w) for w in weights])


def test_a_path_runs_what_it_samples_and_nothing_else():
    _, ours = networks(1)
    op = torch.tensor([NB201_OPS.index("nor_conv_3x3"), 1, 0, 0, 4, 2])
    ran = []
    for name, module in ours.named_modules():
        if isinstance(module, torch.nn.Conv2d) and "_ops" in name:
            module.register_forward_hook(lambda *_, name=name: ran.append(name))
    ours(
        torch.randn(2, 3, 8, 8, dtype=torch.float64), {"normal": Paths(op, torch.ones(6).double())}
    )
    cells = [0, 2, 4]
    assert ran == [f"cells.{c}._ops.{e}._ops.{op[e]}.op.1" for c in cells for e in (0, 5)]


def test_a_state_is_pooled_and_rectified_once_for_all_its_edges(monkeypatch):
    _, ours = networks(1)
    calls = {torch.nn.AvgPool2d: 0, torch.nn.ReLU: 0}
    for kind in calls:

        def counted(self, x, kind=kind, forward=kind.forward):
            calls[kind] += 1
            return forward(self, x)

        monkeypatch.setattr(kind, "forward", counted)
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    ours.cells[0](x, torch.rand(6, 5, dtype=torch.float64))
    assert list(calls.values()) == [3, 3]


def test_noise_is_on_the_skips_and_only_in_training():
    noise = SkipNoise(factor=0.5)
    _, ours = networks(1, noise=noise)
    _, quiet = networks(1)
    quiet.load_state_dict(ours.state_dict())
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    weights = {"normal": torch.rand(6, 5, dtype=torch.float64)}
    draw = ours.draw()
    assert draw.rng.shape == (3 * 3, 2)
    assert torch.equal(ours(x, weights, draw), ours(x, weights, draw))
    assert not torch.allclose(ours(x, weights), ours(x, weights))
    for stream in range(9):  # each is drawn by one node of one cell
        rng = draw.rng.clone()
        rng[stream] += 1
        assert not torch.equal(
            ours(x, weights, nn.NoiseDraw(draw.level, rng)), ours(x, weights, draw)
        )
    without = {"normal": weights["normal"].clone()}
    without["normal"][:, NB201_OPS.index("skip_connect")] = 0
    torch.testing.assert_close(ours(x, without), quiet(x, without), rtol=1e-9, atol=1e-10)
    ours.eval(), quiet.eval()
    quiet.load_state_dict(ours.state_dict())
    torch.testing.assert_close(ours(x, weights), quiet(x, weights))


def test_batch_norms_of_cells_have_no_scale_those_around_them_do():
    _, ours = networks(2)
    assert not [key for key, _ in ours.named_parameters() if "_ops" in key and ".op.2." in key]
    pool = NB201_OPS.index("avg_pool_3x3")
    assert not ours.cells[0]._ops[0]._ops[pool].state_dict()
    names = {key for key, _ in ours.named_parameters()}
    assert {
        "stem.1.weight",
        "cells.0._ops.5._ops.3.op.1.weight",
        "cells.2.conv_a.op.2.weight",
        "cells.5.downsample.1.weight",
        "lastact.0.bias",
        "classifier.bias",
    } <= names


def test_logits_and_layers_of_other_sizes():
    space = SPACE.without("none")
    arch = nn.ArchParameters(space)
    assert list(arch.state_dict()) == ["normal"] and arch.normal.shape == (6, 4)
    assert arch.nodes == (1, 2, 3)
    network = nn.NB201SearchNetwork(space, 2, 7, 1, in_channels=1)
    weights = {cell: alpha.softmax(-1) for cell, alpha in arch.alphas().items()}
    assert network(torch.randn(2, 1, 9, 7), weights).shape == (2, 7)


def test_accelerate_leaves_it_as_it_is():
    eager, ours = networks(1)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    weights = {"normal": torch.rand(6, 5, dtype=torch.float64)}
    expected = eager(x, weights)
    fastnas.accelerate(eager)
    torch.testing.assert_close(eager(x, weights), expected, rtol=1e-10, atol=1e-11)
    assert not fastnas.accelerate(ours).replaced


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: nn.NB201SearchNetwork(SPACE, 4, 10, 0), "layers is 0; at least 1"),
        (lambda: nn.NB201SearchNetwork(get_space("S2"), 4, 10, 1), "has layout darts; nb201 is"),
        (lambda: nn.SearchNetwork(SPACE, 4, 10, 1), "space nb201 has layout nb201; darts is"),
        (
            lambda: nn.NB201SearchNetwork(SPACE, 4, 10, 1)(torch.ones(1, 3, 8, 8), {}),
            "normal is missing",
        ),
        (
            lambda: nn.NB201SearchNetwork(SPACE, 4, 10, 1)(
                torch.ones(1, 3, 8, 8), {"normal": torch.ones(6, 4)}
            ),
            r"weights\['normal'\] has shape \[6, 4\]; \[6, 5\] is needed",
        ),
        (
            lambda: nn.NB201SearchNetwork(SPACE, 4, 10, 1).memory_report(8, 32),
            "what the residual blocks of NAS-Bench-201 hold is not known",
        ),
        (lambda: Space("x", (("nor_conv_5x5",),) * 6, layout="nb201"), "nor_conv_5x5 in layout"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_cell_is_one_op_and_a_step_holds_a_quarter_of_eagers_bytes():
    """Inner nodes and the outputs of 3x3 convolutions are all that is held beside the input."""
    eager, ours = networks(5)
    x, alpha = torch.randn(2, 3, 8, 8, dtype=torch.float64), torch.rand(6, 5).double()
    assert ours.cells[0].why_not_fused(torch.randn(2, 4, 8, 8).double()) is None
    weights = {"normal": alpha.requires_grad_()}
    held = []
    for network in (eager, ours):
        kept = {}

        def pack(t, kept=kept):
            storage = t.untyped_storage()
            kept[storage.data_ptr()] = storage  # alive, so that no address comes again
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            network(x, weights)
        parameters = {p.untyped_storage().data_ptr() for p in network.parameters()}
        held.append(sum(s.nbytes() for at, s in kept.items() if at not in parameters))
    assert held[1] <= held[0] / 4, held


def test_a_foreign_candidate_runs_beside_the_fused_ones():
    eager, ours = networks(1)
    for network in (eager, ours):
        network.cells[0]._ops[2]._ops[3].op[1].register_forward_hook(lambda *_: None)
    assert "hooks" in ours.cells[0].why_not_fused(torch.randn(2, 4, 8, 8).double())
    x, alpha = torch.randn(2, 3, 8, 8, dtype=torch.float64), torch.rand(6, 5).double()
    found = [outcome(n, {"normal": a.softmax(-1)}, x, a) for n in (eager, ours)
             for a in [alpha.clone().requires_grad_()]]  # fmt: skip
    for name, expected in found[0].items():
        torch.testing.assert_close(found[1][name], expected, rtol=1e-10, atol=1e-11, msg=name)
