"""accelerate on the layouts of public code bases: the numbers of their own forwards, fused."""

from __future__ import annotations

import copy
import functools
import pickle

import pytest
import torch
from compared import MODES, assert_same_state, differences, state_after
from torch import Tensor, nn
from two_processes import differ

import fastnas
from fastnas.benchmarks.layouts import LAYOUTS, Layout
from fastnas.benchmarks.layouts.counting import layers_of

C, LAYERS, NODES = 4, 3, 2
LEAST_SHARE = 0.95
COMPILED = ("darts", "drnas", "noisy-darts", "xautodl-nb201")
DISTRIBUTED = ("darts", "fair-darts-noise")
"""What `torch.compile` (of one cell) and two processes are tried on; all_layouts.py tries all."""

every_layout = pytest.mark.parametrize("name", LAYOUTS)
pytestmark = pytest.mark.usefixtures("one_thread")


def images(batch: int = 3) -> Tensor:
    return torch.randn(batch, 3, 16, 16, generator=torch.Generator().manual_seed(3)).double()


def own(layout: Layout, layers: int = LAYERS) -> nn.Module:
    """The network as the code base has it, in fp64, with logits that tell candidates apart."""
    torch.manual_seed(5)
    network = layout.build(C, layers, NODES).double()
    for alphas in layout.alphas(network):
        alphas.data = torch.randn_like(alphas, dtype=torch.float64)
    return network


@functools.cache
def _accelerated(name: str, layers: int) -> nn.Module:
    network = own(LAYOUTS[name], layers)
    fastnas.accelerate(network)
    return network


def accelerated(name: str, layers: int = LAYERS) -> nn.Module:
    """A copy of the network that was accelerated once in this process."""
    return copy.deepcopy(_accelerated(name, layers))


def state(layout: Layout, network: nn.Module, mode: str = "training", x: Tensor | None = None):
    def call(x: Tensor) -> Tensor:
        return layout.call(network, x)

    return state_after(call, network, layout.alphas(network), images() if x is None else x, mode)


@every_layout
def test_every_mode_is_as_by_its_own_forward(name):
    layout = LAYOUTS[name]
    eager, fused = own(layout), accelerated(name)
    # Twice in training: what the first call has read is used again.
    for mode in ("training", *MODES, "training"):
        assert_same_state(state(layout, fused, mode), state(layout, eager, mode))


# Biases have gradients of their own where statistics are given.
BIASED = [(name, "evaluation with gradients") for name in LAYOUTS if name.startswith("xautodl")]


@pytest.mark.parametrize(("name", "mode"), [(name, "training") for name in LAYOUTS] + BIASED)
def test_candidates_are_fused(name, mode):
    layout = LAYOUTS[name]
    eager = own(layout)
    fused = accelerated(name)
    state(layout, fused, mode)  # what is read once is not in the steps that follow
    asked, left = (
        layers_of(layout.candidates(network), lambda network=network: state(layout, network, mode))
        for network in (eager, fused)
    )
    assert asked > 0 and 1 - left / asked >= LEAST_SHARE, f"{left} of {asked} layers are not fused"


@every_layout
def test_frozen_weights_and_frozen_alphas(name):
    layout = LAYOUTS[name]
    eager, fused = own(layout), accelerated(name)
    for network in (eager, fused):
        network.requires_grad_(False)
        for alphas in layout.alphas(network):
            alphas.requires_grad_()
    assert_same_state(state(layout, fused), state(layout, eager))
    for network in (eager, fused):
        network.requires_grad_(True)
        for alphas in layout.alphas(network):
            alphas.requires_grad_(False)
    assert_same_state(weights_step(layout, fused), weights_step(layout, eager))


def weights_step(layout: Layout, network: nn.Module):
    """As `state`, where the alphas are constants."""
    return state_after(lambda x: layout.call(network, x), network, (), images())


@every_layout
def test_copies_and_checkpoints(name):
    layout = LAYOUTS[name]
    eager, fused = own(layout), accelerated(name)
    assert list(fused.state_dict()) == list(eager.state_dict())
    again = pickle.loads(pickle.dumps(fused))
    fused.load_state_dict(eager.state_dict())
    expected = state(layout, copy.deepcopy(eager))
    assert_same_state(state(layout, fused), expected)
    assert_same_state(state(layout, again), expected)


@every_layout
def test_channels_last_images(name):
    layout = LAYOUTS[name]
    eager, fused = own(layout), accelerated(name)
    x = images().contiguous(memory_format=torch.channels_last)
    assert_same_state(state(layout, fused, x=x), state(layout, eager, x=x))


def compiled_differs(
    layout: Layout, mode: str, layers: int = LAYERS, both: bool = False
) -> list[str]:
    """What two compiled calls of the accelerated network do not do as the untouched one.

    That is compiled as well where `both` is true: of random numbers, torch.compile by itself draws
    others than eager does.
    """
    eager, fused = own(layout, layers), accelerated(layout.name, layers)
    torch._dynamo.reset()

    def compiled(network: nn.Module):
        return torch.compile(lambda x: layout.call(network, x), backend="aot_eager")

    call = compiled(eager) if both else lambda x: layout.call(eager, x)
    found = []
    for _ in range(2):
        given = state_after(compiled(fused), fused, layout.alphas(fused), images(), mode)
        found += differences(given, state_after(call, eager, layout.alphas(eager), images(), mode))
    return found


@pytest.mark.parametrize("mode", ["training", "evaluation"])
@pytest.mark.parametrize("name", COMPILED)
def test_compiled(name, mode):
    assert not compiled_differs(LAYOUTS[name], mode, layers=1)


def test_two_processes_average_the_same_gradients(tmp_path):
    assert not differ(list(DISTRIBUTED), tmp_path)
