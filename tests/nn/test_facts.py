"""Facts of modules: which writes break them, and which leave them as they were."""

from __future__ import annotations

from collections import OrderedDict

import pytest
from torch import nn

from fastnas.nn.facts import Facts


def made():
    net = nn.Sequential(nn.Conv2d(2, 2, 1, bias=False), nn.BatchNorm2d(2, affine=False))
    return net, Facts(net.modules())


def hook(*_):
    pass


def replace_children(net):
    net._modules = {"0": net[0], "1": nn.ReLU()}


def replace_parameters(net):
    net[0]._parameters = {"weight": None, "bias": None}


CHANGES = {
    "a setting": lambda net: setattr(net[0], "stride", (2, 2)),
    "a mode": lambda net: net[1].eval(),
    "an attribute that is new": lambda net: setattr(net[1], "forward", hook),
    "an attribute that is gone": lambda net: delattr(net[1], "eps"),
    "a hook": lambda net: net[1].register_forward_hook(hook),
    "a child": lambda net: net.__setitem__(1, nn.ReLU()),
    "a tensor that is new": lambda net: net[1].register_buffer("more", net[1].running_mean),
    "a tensor that is gone": lambda net: net[1]._buffers.update(running_mean=None),
    "a class": lambda net: setattr(net[0], "__class__", type("Conv", (nn.Conv2d,), {})),
    "all children": replace_children,
    "all parameters": replace_parameters,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=list(CHANGES))
def test_a_change_is_seen(change):
    net, facts = made()
    assert facts.hold()
    change(net)
    assert not facts.hold()


@pytest.mark.parametrize("change", CHANGES.values(), ids=list(CHANGES))
def test_a_change_is_seen_after_a_write_that_changed_nothing(change):
    net, facts = made()
    net[0].stride = (1, 1)
    net[0]._parameters["weight"] = nn.Parameter(net[0].weight + 1)
    assert facts.hold()
    change(net)
    assert not facts.hold()


@pytest.mark.parametrize("name", ["_modules", "_parameters", "_buffers", "_forward_hooks"])
def test_what_takes_the_place_of_a_dict_is_not_trusted(name):
    """Its own content may change later, and nothing that was kept would tell."""
    net, facts = made()
    for module in net.modules():
        setattr(module, name, OrderedDict(getattr(module, name)))
    assert not facts.hold()
