"""The networks of the MobileNet-like space: exact counts, one result whatever is kept."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from mixture_cases import MEMORIES, assert_same
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from fastnas.layers.inverted_residual import InvertedResidual
from fastnas.nn import (
    MobileNetEvalNetwork,
    MobileNetSearchNetwork,
    Paths,
    count_parameters,
    mobilenet,
    split_parameters,
)
from fastnas.reference import SkipNoise
from fastnas.saved_bytes import saved_bytes
from fastnas.spaces import MOBILE_ARCHITECTURES, MobileSpace, format_column

SMALL = MobileSpace(stages=((8, 2, 2), (16, 1, 1)), stem=8, first=8, head=16)
MIXINGS = ("softmax", "sigmoid", "gdas")
NOISE = {"skip": SkipNoise()}
PUBLISHED = {
    "NoisyDARTS-A": (4_882_184, 446.01, 5_547_124),
    "FairNAS-A": (4_651_352, 388.12, None),
    "FairNAS-B": (4_506_272, 345.30, None),
}
"""Parameters and millions of multiply-adds at 224x224, and parameters with a squeeze."""


def images(count: int = 4, size: int = 12) -> Tensor:
    return torch.randn(count, 3, size, size, dtype=torch.float64)


def network(memory: str = "eager", **given) -> MobileNetSearchNetwork:
    torch.manual_seed(0)
    return MobileNetSearchNetwork(3, space=SMALL, memory=memory, **given).double()


def results(net: nn.Module, call: Callable[[], Tensor]) -> dict[str, Tensor]:
    """Output, gradients and buffers after a step."""
    torch.manual_seed(1)
    y = call()
    F.cross_entropy(y, torch.arange(len(y)) % 3).backward()
    grads = {f"d {name}": p.grad for name, p in net.named_parameters() if p.grad is not None}
    return {"y": y.detach(), **grads, **dict(net.named_buffers())}


def written_out(net: MobileNetSearchNetwork, x: Tensor) -> Tensor:
    x = net.stem(x)
    for choice in net.layers:
        w = choice.logits.softmax(-1)
        ops = choice.candidates.values()
        terms = [
            op(x) if isinstance(op, nn.Identity) else InvertedResidual.forward(op, x) for op in ops
        ]
        x = sum(w_k * term for w_k, term in zip(w, terms))
    return net.classifier(net.head(x))


def test_a_search_from_python_derives_it() -> None:
    from fastnas.search.choice_search import ChoiceSearch

    torch.manual_seed(0)
    space = MobileSpace(stem_stride=1).scaled(0.25)
    network = MobileNetSearchNetwork(3, space=space, noise={"skip": SkipNoise()})
    batches = [(torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 2, 0]))]
    search = ChoiceSearch(network, batches, batches, epochs=1, noise_decay="cosine")
    search.run()
    found = search.derived_network()
    assert " ".join(search.derive().values()) == format_column(network.derive())
    assert found.eval()(batches[0][0]).shape == (4, 3)
    assert len(list(found.parameters())) < len(list(network.parameters())) / 4


def test_the_supernet_has_the_parameters_of_its_blocks() -> None:
    with torch.device("meta"):
        net = MobileNetSearchNetwork(1000)
    weights, logits = split_parameters(net)
    assert sum(p.numel() for p in weights) == 15_992_600
    assert sum(p.numel() for p in logits) == 13 * 7 + 6 * 6


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_networks_count_as_published(name: str) -> None:
    plain, macs, squeezed = PUBLISHED[name]
    with torch.device("meta"):
        net = MobileNetEvalNetwork(MOBILE_ARCHITECTURES[name], 1000).eval()
        other = MobileNetEvalNetwork(
            MOBILE_ARCHITECTURES[name], 1000, squeeze=True, activation="swish"
        )
        with FlopCounterMode(display=False) as counter:
            net(torch.empty(1, 3, 224, 224))
    assert count_parameters(net) == plain
    # Two flops are a product and its sum.
    assert round(counter.get_total_flops() / 2e6, 2) == macs
    assert squeezed is None or count_parameters(other) == squeezed


@pytest.mark.parametrize("cheap", [40, 0], ids=["first part again", "first part kept"])
@pytest.mark.parametrize("memory", MEMORIES)
def test_it_is_the_mixture_written_out(memory: str, cheap: int, one_thread, monkeypatch) -> None:
    monkeypatch.setattr(mobilenet, "CHEAP", cheap)
    net = network(memory)
    other = copy.deepcopy(net)
    x = images()
    for _ in range(2):
        assert_same(results(net, lambda: net(x)), results(other, lambda: written_out(other, x)))


@pytest.mark.parametrize("memory", MEMORIES[1:])
@pytest.mark.parametrize("mixing", MIXINGS)
def test_what_is_kept_changes_no_result(mixing: str, memory: str, one_thread) -> None:
    """Of each method, with the noise of NoisyDARTS, in training and in evaluation."""
    eager = network("eager", mixing=mixing, noise=NOISE)
    net = network(memory, mixing=mixing, noise=NOISE)
    x = images()
    for mode in (True, False):
        eager.train(mode)
        net.train(mode)
        assert_same(results(net, lambda: net(x)), results(eager, lambda: eager(x)))
    assert net.state_dict().keys() == eager.state_dict().keys()


def test_noise_is_drawn_on_skips_alone_and_can_be_turned_down() -> None:
    x = images()
    plain = results(one := network(), lambda: one(x))["y"]
    noisy = network(noise=NOISE)
    assert [choice.noise.keys() for choice in noisy.choices] == [set(), {"skip"}, set()]
    assert not torch.allclose(results(noisy, lambda: noisy(x))["y"], plain)
    noisy.set_noise_amplitude(0.0)
    assert torch.allclose(results(noisy, lambda: noisy(x))["y"], plain)


def test_each_setting_holds_less(one_thread) -> None:
    """Of the whole network at 64x64: a sixth and two fifths of what eager's forward holds."""
    torch.manual_seed(0)
    net, x = MobileNetSearchNetwork(10, memory="eager"), torch.randn(2, 3, 64, 64)
    held = {}
    for memory in MEMORIES:
        net.memory = memory
        held[memory] = saved_bytes(lambda: net(x), [x, *net.parameters(), *net.buffers()])
    assert held["lean"] <= held["eager"] / 2.5
    assert held["recompute"] <= held["eager"] / 6
    assert held["minimal"] <= held["recompute"] / 4


def test_weights_and_paths_of_each_call() -> None:
    x = images()
    net, own = network("recompute", mixing=None), network()
    own.load_state_dict(net.state_dict(), strict=False)
    w = [choice.logits.detach().softmax(-1) for choice in own.choices]
    assert torch.allclose(net(x, w), own(x))
    paths = [Paths(torch.tensor(k), torch.ones((), dtype=torch.float64)) for k in (2, 6, 0)]
    net(x, paths).sum().backward()
    for choice, k in zip(net.choices, (2, 6, 0)):
        for i, op in enumerate(choice.candidates.values()):
            assert all((p.grad is not None) == (i == k) for p in op.parameters())


def test_what_is_derived_is_what_the_supernet_computes() -> None:
    """With all weight on the derived candidates, and their parameters in the evaluation network."""
    net = network()
    with torch.no_grad():
        for choice, k in zip(net.choices, (4, 6, 1)):
            choice.logits[k] = 1.0
    assert net.derive() == ((5, 3), "skip", (5, 6))
    net(images())
    derived = MobileNetEvalNetwork(net.derive(), 3, space=SMALL).double()
    state = net.state_dict()
    for i, choice in enumerate(net.choices):
        prefix = f"layers.{i}.candidates.{choice.best()[0]}."
        found = {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}
        state |= {f"layers.{i}.{name}": t for name, t in found.items()}
    derived.load_state_dict({name: state[name] for name in derived.state_dict()})
    w = [F.one_hot(c.logits.argmax(), len(c.logits)).double() for c in net.choices]
    x = images()
    net.eval()
    derived.eval()
    assert torch.allclose(derived(x), net(x, w), rtol=1e-10)


@pytest.mark.parametrize("given", [{}, {"squeeze": True, "activation": "swish"}])
def test_the_evaluation_network_trains(given, one_thread) -> None:
    torch.manual_seed(0)
    net = MobileNetEvalNetwork([(3, 6), "skip", (7, 3)], 3, space=SMALL, **given).double()
    x, labels = images(12), torch.arange(12) % 3
    optimizer, losses = torch.optim.SGD(net.parameters(), lr=0.1), []
    for _ in range(8):
        loss = F.cross_entropy(net(x), labels)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    assert all(p.grad is not None for p in net.parameters())


def test_small_images_keep_their_size_in_the_stem() -> None:
    space = MobileSpace(stem_stride=1).scaled(0.25)
    x = torch.randn(2, 3, 32, 32)
    sizes = []
    with torch.no_grad():
        net = MobileNetSearchNetwork(10, space=space)
        net.layers[0].register_forward_pre_hook(lambda _, args: sizes.append(args[0].shape[-1]))
        assert net(x).shape == (2, 10)
    assert sizes == [32]


def test_temperature_is_set_in_all_layers() -> None:
    net = network(mixing="gdas", tau=10.0)
    net.set_tau(0.5)
    assert [choice.tau for choice in net.choices] == [0.5] * 3
    with pytest.raises(ValueError, match="tau is given, but mixing is 'softmax'"):
        network().set_tau(0.5)
    for wrong in (0, -1.0):
        with pytest.raises(ValueError, match=r"tau is .*; a number > 0 is needed"):
            net.set_tau(wrong)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"memory": "fast"}, "memory is 'fast'; allowed: eager, lean, recompute, minimal"),
        ({"mixing": "none"}, "mixing is 'none'; allowed: softmax, sigmoid, gdas"),
        ({"noise": {"k9_e6": SkipNoise()}}, "a name in noise is 'k9_e6'; allowed: k3_e6"),
        ({"noise": SkipNoise()}, "noise is .*; Mapping is needed"),
        ({"tau": 1.0}, "tau is 1.0, but mixing is 'softmax'"),
        ({"in_channels": 0}, "in_channels is 0; at least 1 is needed"),
    ],
)
def test_other_supernets_are_refused(given, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        network(**given)


def test_other_inputs_are_refused() -> None:
    net = network(mixing=None)
    with pytest.raises(TypeError, match="w is None and mixing is None; weights of each layer"):
        net(images())
    with pytest.raises(TypeError, match=r"w is .*; a list of 3 is needed, one for each layer"):
        net(images(), torch.ones(3))
    with pytest.raises(ValueError, match=r"x has shape .*; \[\*, 3, \*, \*\] is needed"):
        net(images()[:, :2])
    with pytest.raises(ValueError, match="mixing is None, so it has no logits"):
        net.derive()
    with pytest.raises(ValueError, match="architecture has 1 layers; the space has 3"):
        MobileNetEvalNetwork(["skip"], 3, space=SMALL)


def test_a_supernet_runs_without_values() -> None:
    """On the device "meta", which has no autocast: what it would hold can be counted so."""
    with torch.device("meta"):
        net, x = MobileNetSearchNetwork(3, space=SMALL, memory="eager"), torch.empty(4, 3, 12, 12)
        counted = saved_bytes(lambda: net(x), [x, *net.parameters(), *net.buffers()])
    same, x = network().float(), torch.randn(4, 3, 12, 12)
    exclude = [x, *same.parameters(), *same.buffers()]
    assert counted == saved_bytes(lambda: same(x), exclude) > 0
