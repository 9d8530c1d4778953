"""FairDARTS in one level: both gradients of one pass over the training batch, taken together."""

import pytest
import torch
from eager_cases import assert_gradients, batches, eager_loss, problem

from fastnas.nn import ArchParameters
from fastnas.strategies import get_strategy


def single_level(space="S3", **options):
    return problem("fair-darts", space, single_level=True, **options)


def eager_step(eager, arch, train):
    """The code's: one loss of all, its gradients for weights and logits at the same point."""
    sigma = {cell: torch.sigmoid(alpha) for cell, alpha in arch.alphas().items()}
    plain = eager_loss(eager, sigma, train)
    apart = torch.cat([s.flatten() for s in sigma.values()]) - 0.5
    loss = plain - 10 * (apart**2).mean()
    loss.backward()
    return plain.detach(), loss.detach()


@pytest.mark.parametrize("space", ["S1", "S3", "nb201"])
def test_both_gradients_are_eagers_at_the_same_point(space):
    step, eager = single_level(space)
    arch = ArchParameters(step.network.space).double()
    arch.load_state_dict(step.arch.state_dict())
    valid, train = batches()
    plain, loss = eager_step(eager, arch, train)
    found = step.arch_step(valid, train)
    torch.testing.assert_close(found, loss, rtol=1e-10, atol=0)
    assert_gradients(step.alphas, [alpha.grad for alpha in arch.parameters()])
    # The logits have moved, and the gradient of the weights is still that of where they were.
    assert not any(torch.equal(a, b) for a, b in zip(step.alphas, arch.parameters()))
    found, logits = step.weight_step(train)
    torch.testing.assert_close(found, plain, rtol=1e-10, atol=0)
    assert logits.shape == (3, 4)
    assert_gradients(step.params, [p.grad for p in eager.parameters()])
    for ours, theirs in zip(step.network.buffers(), eager.buffers()):  # of one pass
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_the_gradient_of_the_weights_is_clipped():
    step, _ = single_level()
    step.grad_clip = 0.1
    valid, train = batches()
    step.arch_step(valid, train)
    step.weight_step(train)
    norm = torch.linalg.vector_norm(torch.stack([p.grad.norm() for p in step.params]))
    assert float(norm) == pytest.approx(0.1, rel=1e-4)


def test_the_other_batch_is_not_looked_at():
    steps = [single_level()[0] for _ in "ab"]
    valid, train = batches()
    for step, other in zip(steps, (valid, train)):
        step.arch_step(other, train)
        step.weight_step(train)
    for a, b in zip(steps[0].params, steps[1].params):
        assert torch.equal(a, b)


def test_weights_alone_before_the_logits_start():
    """`arch_start_epoch`: a weight step without the other half is that of two levels."""
    steps = [single_level()[0], problem("fair-darts")[0]]
    _, train = batches()
    for step in steps:
        step.weight_step(train)
    for a, b in zip(steps[0].params, steps[1].params):
        assert torch.equal(a, b)


def test_what_is_refused():
    with pytest.raises(ValueError, match="single_level is true, but order is 2"):
        get_strategy("fair-darts", single_level=True, order=2)
    assert "leaves its gradients" in get_strategy("fair-darts", single_level=True).not_capturable()
    assert get_strategy("fair-darts").not_capturable() is None


def test_the_cost_is_in_the_gradient_of_the_logits():
    steps = [single_level()[0] for _ in "ab"]
    steps[1].cost = lambda arch: 0.25 * arch.normal.square().sum()
    valid, train = batches()
    losses = [step.arch_step(valid, train) for step in steps]
    logits = single_level()[0].arch.normal.detach()
    torch.testing.assert_close(losses[1] - losses[0], 0.25 * logits.square().sum())
    plain, costly = (step.arch.normal.grad for step in steps)
    torch.testing.assert_close(costly - plain, 0.5 * logits)
