"""The eager supernet of the MobileNet-like space makes the steps that `ChoiceSearch` makes."""

import pytest
import torch
from torch.optim import SGD, Adam

from fastnas import ChoiceSearch
from fastnas.nn import MobileNetSearchNetwork, split_parameters
from fastnas.reference import SkipNoise
from fastnas.reference import mobilenet as eager
from fastnas.spaces import MobileSpace

SPACE = MobileSpace(stages=((8, 2, 2), (16, 1, 2)), stem=8, first=8, head=16)


def batch(seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(6, 2, 8, 8, generator=generator).double(), torch.arange(6) % 3


def optimizers(network):
    weights, logits = [], []
    for name, parameter in network.named_parameters():
        (logits if name.endswith(".logits") else weights).append(parameter)
    return SGD(weights, lr=0.1, momentum=0.9), Adam(logits, lr=0.1)


@pytest.mark.parametrize("mixing", ["softmax", "sigmoid"])
def test_it_makes_the_same_steps(mixing):
    settings = {"space": SPACE, "mixing": mixing, "in_channels": 2}
    ours = MobileNetSearchNetwork(3, memory="minimal", **settings).double()
    network = eager.MobileNetSearchNetwork(3, **settings).double()
    network.load_state_dict(ours.state_dict())
    assert {id(p) for p in split_parameters(ours)[1]} == {id(c.logits) for c in ours.choices}
    weight_optimizer, logit_optimizer = optimizers(ours)
    search = ChoiceSearch(
        ours, [batch(0)], [batch(1)], epochs=1, grad_clip=0.5,
        weight_optimizer=weight_optimizer, logit_optimizer=logit_optimizer,
    )  # fmt: skip
    of_eager = optimizers(network)
    for turn in range(3):
        train, valid = batch(2 * turn), batch(2 * turn + 1)
        loss = search.step(train, valid)["train_loss"]
        found = eager.mobile_search_step(network, *of_eager, train, valid, grad_clip=0.5)
        torch.testing.assert_close(found, loss, rtol=1e-10, atol=1e-10)
    expected = ours.state_dict()
    for name, value in network.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-8, atol=1e-10, msg=name)


def test_noise_is_drawn_on_skips_in_training_alone():
    noisy, plain = (
        eager.MobileNetSearchNetwork(3, space=SPACE, noise=noise, in_channels=2).double()
        for noise in ({"skip": SkipNoise(factor=2.0)}, None)
    )
    noisy.load_state_dict(plain.state_dict())
    x, _ = batch(0)
    assert not torch.equal(noisy(x), plain(x))
    noisy.set_schedules(0.0, 1.0)
    noisy.load_state_dict(plain.state_dict())
    assert torch.equal(noisy(x), plain(x))
    noisy.set_schedules(1.0, 1.0)
    noisy.load_state_dict(plain.state_dict())
    assert torch.equal(noisy.eval()(x), plain.eval()(x))


def test_a_sampled_candidate_alone_is_run_and_moved():
    network = eager.MobileNetSearchNetwork(3, space=SPACE, mixing="gdas", in_channels=2).double()
    network.set_schedules(1.0, 0.5)
    for layer in network.layers:
        layer.logits.data[1] += 1000.0  # of k5_e6: no other is drawn
    before = {name: p.clone() for name, p in network.named_parameters()}
    eager.mobile_search_step(network, *optimizers(network), batch(0), batch(1), samples=2)
    moved = {name for name, p in network.named_parameters() if not torch.equal(p, before[name])}
    blocks = {name.split(".")[3] for name in moved if ".candidates." in name}
    assert blocks == {"k5_e6"}
    assert {name for name in moved if name.startswith("head")}
