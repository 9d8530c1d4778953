"""Batch statistics of one path."""

import pytest
import torch
from step_cases import SINGLE_PATH, batches, build

from fastnas.search.recalibrate import recalibrated


@pytest.mark.parametrize("method", SINGLE_PATH)
def test_a_path_has_its_own_statistics(method):
    """On the images of its statistics it says what it says in training; the network stays."""
    step = build(method)
    for batch in batches(3):
        step.weight_step(batch)
    network, weights = step.network, step.strategy.validation_weights(step.arch)
    before = {name: t.clone() for name, t in network.state_dict().items()}
    images = batches(1, size=32)[0][0]
    with torch.no_grad():
        found = recalibrated(network, weights, [images]).eval()(images, weights)
    assert network.training
    after = network.state_dict()
    assert all(torch.equal(t, after[name]) for name, t in before.items())
    with torch.no_grad():
        sampled = network.eval()(images, weights)
        expected = network.train()(images, weights)
    assert (found - expected).norm() < 0.05 * expected.norm()  # the running variance is unbiased
    assert (sampled - expected).norm() > 0.2 * expected.norm()
