"""Steps of single-path methods: gradients against eager, the memory dial, what must not move."""

import pytest
import torch
import torch.nn.functional as F
from step_cases import SINGLE_PATH, batches, build, search

from fastnas import reference
from fastnas.ops import draw_rng
from fastnas.reference import HardWeights
from fastnas.reference.gumbel import gumbel_draw
from fastnas.spaces import CELL_TYPES, SPACES


def step_in_float64(method, space="S2", **options):
    step = build(method, space, capturable=False, **options)
    step.network.double()
    step.arch.double()
    return step


def wide_batches(count):
    return [(images.double(), labels) for images, labels in batches(count)]


def eager_losses(step, batch):
    """Of each sample that the strategy would draw next, by eager single paths."""
    strategy, arch = step.strategy, step.arch
    rng = draw_rng(2)[0]
    alpha, beta = (
        torch.stack(list(some.values())) if some else None for some in (arch.alphas(), arch.betas())
    )
    K, tau = strategy.samples, strategy.tau
    op, weight = reference.sample_paths(
        alpha, beta, arch.nodes, strategy.topology, tau=tau, paths=K, rng=rng
    )
    h = F.one_hot(op.clamp(min=0), alpha.shape[-1]) * weight[..., None]
    if strategy.siblings:
        g = gumbel_draw(rng, 0, (K, *alpha.shape))
        P = torch.softmax((alpha.log_softmax(-1) + g) / tau, -1)
        h = F.one_hot(op, alpha.shape[-1]) + (P - P.detach())
    network = reference.SinglePathNetwork(step.network.space, 2, 4, 3).double()
    network.load_state_dict(step.network.state_dict())
    network.set_siblings(strategy.siblings)
    losses = []
    for k in range(K):
        weights = {c: HardWeights(h[k, i], op[k, i]) for i, c in enumerate(CELL_TYPES)}
        losses.append(F.cross_entropy(network(batch[0], weights), batch[1]))
    return losses, network


CASES = [
    ("rome", {"samples": 1}),
    ("rome", {"samples": 3, "paths_at_once": True}),
    ("rome", {"samples": 3, "arch_accumulation": "sum", "params_accumulation": "mean"}),
    ("rome-v1", {"samples": 3}),
    ("gdas", {}),
    ("gdas", {"gdas_gradient": "siblings", "samples": 3, "paths_at_once": True}),
    ("gdas", {"gdas_gradient": "siblings"}),
]


@pytest.mark.parametrize(("method", "options"), CASES, ids=str)
def test_the_logits_get_the_gradient_of_eager_single_paths(method, options):
    step = step_in_float64(method, tau_start=2.0, **options)
    valid, train = wide_batches(2)
    torch.manual_seed(9)
    losses, _ = eager_losses(step, valid)
    scale = 1 if options.get("arch_accumulation") == "sum" else 1 / len(losses)
    alphas = list(step.arch.parameters())
    expected = torch.autograd.grad(scale * sum(losses), alphas)
    torch.manual_seed(9)
    loss = step.arch_step(valid, train)
    torch.testing.assert_close(loss, (sum(losses) / len(losses)).detach(), rtol=1e-10, atol=0)
    for alpha, e in zip(alphas, expected):
        torch.testing.assert_close(alpha.grad, e, rtol=1e-10, atol=1e-10 * float(e.abs().max()))


@pytest.mark.parametrize(("method", "options"), CASES, ids=str)
def test_the_params_get_the_gradient_of_eager_single_paths(method, options):
    """None, as in eager, for what no sample runs."""
    step = step_in_float64(method, tau_start=2.0, **options)
    step.grad_clip = 1e9
    (train,) = wide_batches(1)
    torch.manual_seed(9)
    losses, network = eager_losses(step, train)
    scale = 1 / len(losses) if options.get("params_accumulation") == "mean" else 1
    (scale * sum(losses)).backward()
    torch.manual_seed(9)
    step.weight_step(train)
    largest = max(float(p.grad.abs().max()) for p in network.parameters() if p.grad is not None)
    for ours, eager in zip(step.network.parameters(), network.parameters()):
        assert (ours.grad is None) == (eager.grad is None)
        if eager.grad is not None:
            torch.testing.assert_close(ours.grad, eager.grad, rtol=1e-10, atol=1e-10 * largest)


@pytest.mark.parametrize("method", SINGLE_PATH)
def test_paths_at_once_are_a_dial_of_memory(method):
    """A whole step leaves the same parameters, logits, statistics and optimizers, to rounding."""
    left = []
    for at_once in (True, False):
        step = step_in_float64(method, samples=3, paths_at_once=at_once)
        torch.manual_seed(4)
        valid, train = wide_batches(2)
        step.arch_step(valid, train)
        loss, logits = step.weight_step(train)
        assert logits.shape == (3, 3, 4)
        left.append([loss, logits, *step.network.state_dict().values(),
                     *step.arch.state_dict().values()])  # fmt: skip
    for a, b in zip(*left):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("accumulation", ["sum", "mean"])
def test_clipping_of_each_sample(accumulation):
    options = {"samples": 3, "params_accumulation": accumulation}
    step = step_in_float64("rome", clip_samples="each", **options)
    step.grad_clip = 0.1
    (train,) = wide_batches(1)
    torch.manual_seed(9)
    losses, network = eager_losses(step, train)
    params = list(network.parameters())
    expected = [torch.zeros_like(p) for p in params]
    for loss in losses:
        found = torch.autograd.grad(loss, params, allow_unused=True)
        norm = torch.linalg.vector_norm(torch.stack([g.norm() for g in found if g is not None]))
        for total, g in zip(expected, found):
            if g is not None:
                total += g * min(1.0, 0.1 / (norm + 1e-6)) / (3 if accumulation == "mean" else 1)
    torch.manual_seed(9)
    step.weight_step(train)
    for p, e in zip(step.network.parameters(), expected):
        got = torch.zeros_like(p) if p.grad is None else p.grad
        torch.testing.assert_close(got, e, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("capturable", [True, False])
def test_what_is_not_sampled_does_not_move(capturable):
    """Neither momentum nor weight decay touch it, and its running statistics stand still."""
    step = build("rome", "S2", capturable=capturable, samples=1)
    moved, seen = 0, 0
    for train in batches(3):
        before = {name: t.clone() for name, t in step.network.state_dict().items()}
        step.weight_step(train)
        used = {name for name, p in step.network.named_parameters() if p.grad is not None}
        state = step.network.state_dict()
        for name, p in step.network.named_parameters():
            if name not in used:
                assert torch.equal(p, before[name]), name
                momentum = step.params_optimizer.state[p].get("momentum_buffer")
                seen += momentum is not None and bool(momentum.any())
            moved += name in used and not torch.equal(p, before[name])
        ran = {name.rpartition("._ops.")[0] + "._ops." + name.rpartition("._ops.")[2].split(".")[0]
               for name in used if "._ops." in name}  # fmt: skip
        for name, t in state.items():
            owner = [o for o in ran if name.startswith(f"{o}.")]
            if "_ops" in name and "running" in name and "bn" not in name:
                same = torch.equal(t, before[name])
                assert same != bool(owner), name
    assert moved > 0
    assert seen > 0  # some of what stood still had momentum


@pytest.mark.parametrize("space", [name for name in SPACES if name != "nb201"])
@pytest.mark.parametrize("method", SINGLE_PATH)
def test_every_space(method, space):
    step = build(method, space, **({"samples": 2} if method == "rome" else {}))
    seen, _ = search(1, step)
    assert all(torch.tensor(seen).isfinite())
    genotype = step.strategy.derive(step.arch, step.network.space)
    assert len(genotype.normal) == 4
    weights = step.strategy.validation_weights(step.arch)
    step.network.eval()
    with torch.no_grad():
        assert step.network(batches(1)[0][0], weights).isfinite().all()
