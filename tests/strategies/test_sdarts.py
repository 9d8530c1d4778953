"""SmoothDARTS: the radius, the simplex and the attack by hand, its step against eager."""

import pytest
import torch
from eager_cases import assert_gradients, batches, eager_loss, problem, softmax
from torch.nn import functional as F

from fastnas.ops import draw_rng
from fastnas.reference.skip_noise import philox_draw
from fastnas.strategies import get_strategy
from fastnas.strategies.sdarts import onto_simplex

METHODS = ("sdarts-rs", "sdarts-adv")


@pytest.mark.parametrize("method", METHODS)
def test_the_radius_grows_by_epoch(method):
    """0.03 + (0.3 - 0.03) e / 50, as the code has it."""
    strategy, found = get_strategy(method), []
    for epoch in (0, 10, 25, 49):
        strategy.start_epoch(epoch, 50)
        found.append(strategy.figures()["perturbation"])
    assert found == pytest.approx([0.03, 0.084, 0.165, 0.2946])


def test_weights_are_brought_back_to_a_mixture():
    given = torch.tensor([[0.5, 0.7, -0.2], [-0.3, -0.1, -0.2], [1.5, 0.5, 0.5], [0.2, 0.3, 0.5]])
    expected = torch.tensor([[5 / 12, 7 / 12, 0], [0, 1, 0], [0.5, 0.25, 0.25], [0.2, 0.3, 0.5]])
    torch.testing.assert_close(onto_simplex(given), expected)


def clipped(rows):
    """The code's `clip`, row by row."""
    for row in rows:
        best = int(row.argmax())
        row.clamp_(0, 1)
        if row.sum() == 0:
            row[best] = 1.0
        row.div_(row.sum())
    return rows


def drawn_uniforms(centre):
    """What the strategy would draw next."""
    streams = draw_rng(2)
    return {
        cell: philox_draw("uniform_additive", rng, 0, w)
        for (cell, w), rng in zip(centre.items(), streams)
    }


def attacked(eager, centre, eps, train, steps):
    """The attack of the code, written in its order on the eager network in eval mode."""
    eager.eval()
    w = {cell: clipped(c + eps * drawn) for (cell, c), drawn in
         zip(centre.items(), drawn_uniforms(centre).values())}  # fmt: skip
    with torch.no_grad():
        before = eager_loss(eager, centre, train)
    for _ in range(steps):
        for each in w.values():
            each.requires_grad_()
        slopes = torch.autograd.grad(-eager_loss(eager, w, train), list(w.values()))
        for (cell, c), slope in zip(centre.items(), slopes):
            stepped = w[cell].detach() - (2 * eps / steps) * slope.sign()
            w[cell] = clipped((stepped - c).clamp(-eps, eps) + c)
    with torch.no_grad():
        after = eager_loss(eager, w, train)
    eager.train()
    return centre if before > after else {cell: each.detach() for cell, each in w.items()}


@pytest.mark.parametrize("space", ["S1", "S3", "nb201"])
@pytest.mark.parametrize(
    ("method", "options"),
    [("sdarts-rs", {}), ("sdarts-adv", {}), ("sdarts-adv", {"attack_steps": 2})],
)
def test_the_weights_get_the_gradient_on_perturbed_mixtures(method, options, space):
    step, eager = problem(method, space, **options)
    step.strategy.start_epoch(30, 50)
    eps = 0.03 + 0.27 * 0.6
    _, train = batches()
    step.network(train[0], softmax(step.arch))  # statistics that the eval mode can use
    eager.load_state_dict(step.network.state_dict())
    before = {name: b.clone() for name, b in step.network.named_buffers()}
    centre = {cell: w.detach() for cell, w in softmax(step.arch).items()}
    torch.manual_seed(9)
    if method == "sdarts-rs":
        used = {cell: clipped(centre[cell] + eps * u) for cell, u in drawn_uniforms(centre).items()}
    else:
        used = attacked(eager, centre, eps, train, options.get("attack_steps", 7))
        assert all((used[cell] - w).abs().max() > 0.05 for cell, w in centre.items())
    loss = eager_loss(eager, used, train)
    loss.backward()
    torch.manual_seed(9)
    found, logits = step.weight_step(train)
    torch.testing.assert_close(found, loss.detach(), rtol=1e-10, atol=0)
    torch.testing.assert_close(F.cross_entropy(logits, train[1]), found)
    assert_gradients(step.params, [p.grad for p in eager.parameters()])
    # The passes of the attack leave the running statistics alone: they moved once.
    for name, buffer in step.network.named_buffers():
        expected = dict(eager.named_buffers())[name]
        torch.testing.assert_close(buffer, expected, rtol=1e-10, atol=1e-12)
        assert not torch.equal(buffer, before[name])
    assert step.network.training and all(p.requires_grad for p in step.params)


def test_an_attack_that_is_weaker_than_nothing_is_dropped(monkeypatch):
    """Descent in place of ascent: the weights are trained on softmax(alpha) itself."""
    step, _ = problem("sdarts-adv")
    step.strategy.start_epoch(30, 50)
    monkeypatch.setattr(torch.Tensor, "sign", lambda slope: -torch.sgn(slope))
    seen = []
    step.network.register_forward_pre_hook(
        lambda _, given: seen.append((step.network.training, given[1]))
    )
    step.weight_step(batches()[1])
    *attack, (trained, used) = seen
    assert trained and len(attack) == 7 + 2 and not any(training for training, _ in attack)
    for cell, w in softmax(step.arch).items():
        assert torch.equal(used[cell], w)


@pytest.mark.parametrize("method", METHODS)
def test_the_logits_move_as_in_darts(method):
    """Before and after a weight step: the perturbation is the other half's."""
    step, eager = problem(method)
    valid, train = batches()
    alphas = list(step.arch.parameters())
    for _ in range(2):
        eager.load_state_dict(step.network.state_dict())
        expected = torch.autograd.grad(eager_loss(eager, softmax(step.arch), valid), alphas)
        step.arch_step(valid, train)
        assert_gradients(alphas, expected)
        step.weight_step(train)
    for cell, w in step.strategy.validation_weights(step.arch).items():
        assert torch.equal(w, softmax(step.arch)[cell])
