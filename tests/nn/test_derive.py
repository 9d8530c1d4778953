"""A derived network has what was chosen in the places of the choices, however deep they lie."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastnas.nn import Choice, InputChoice, derived_network


def candidates(C=4):
    return {"skip": nn.Identity(), "linear": nn.Linear(C, C)}


def test_derived_inputs_and_nested_choices():
    class Node(nn.Module):
        def __init__(self):
            super().__init__()
            inner = Choice([nn.Linear(3, 3), nn.Identity()], mixing="gdas")
            deep = nn.Sequential(inner)
            self.edges = nn.ModuleList(Choice([nn.Identity(), deep], mixing="gdas") for _ in "abc")
            self.node = InputChoice(3)

        def forward(self, x):
            return self.node([lambda edge=edge: edge(x) for edge in self.edges])

    torch.manual_seed(0)
    model = Node()
    with torch.no_grad():
        model.node.logits.copy_(torch.tensor([1.0, 0.0, 2.0]))
        for edge in model.edges:
            edge.logits.copy_(torch.tensor([0.0, 1.0]))
            edge.candidates["1"][0].logits.copy_(torch.tensor([1.0, 0.0]))
    found = derived_network(model)
    x = torch.randn(2, 3)
    linear = [edge.candidates["1"][0].candidates["0"] for edge in model.edges]
    torch.testing.assert_close(found(x), linear[0](x) + linear[2](x))
    assert not any(isinstance(m, Choice | InputChoice) for m in found.modules())


def test_a_choice_alone_and_one_whose_weights_are_given():
    given = Choice(candidates())
    assert isinstance(derived_network(given), Choice)
    own = Choice(candidates(), mixing="softmax")
    with torch.no_grad():
        own.logits.copy_(torch.tensor([0.0, 1.0]))
    assert isinstance(derived_network(own), nn.Linear)


def test_layers_that_cannot_begin_anew():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))

    model = nn.Sequential(Own())
    with pytest.raises(ValueError, match="0 is a Own, which holds parameters and has no reset_par"):
        derived_network(model, keep_weights=False)
