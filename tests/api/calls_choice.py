"""Valid calls of the choices of fastnas.nn."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from wrong_values import Argument, Call, choice, flag, instance, integer, number, one_of, tensor

from fastnas.nn import (
    Choice,
    InputChoice,
    MobileNetEvalNetwork,
    MobileNetSearchNetwork,
    Paths,
    derived_network,
    split_parameters,
)
from fastnas.reference import SkipNoise
from fastnas.search.choice_search import ChoiceSearch, cross_entropy
from fastnas.spaces import MobileSpace


def candidates() -> dict[str, nn.Module]:
    return {"skip": nn.Identity(), "linear": nn.Linear(3, 3)}


modules: Argument = one_of(candidates, **{
    "None": None, "a number": 3, "text": "skip", "a module": nn.Identity(), "none": [],
    "names": ["skip", "linear"], "a number as a name": {1: nn.Identity()},
    "a method's name": {"items": nn.Identity()}, "a dot": {"a.b": nn.Identity()},
    "an empty name": {"": nn.Identity()},
})  # fmt: skip
noise: Argument = one_of(lambda: {"skip": SkipNoise()}, **{
    "a number": 0.2, "of all": SkipNoise(), "of another": {"conv": SkipNoise()},
    "a factor": {"skip": 0.2},
})  # fmt: skip
logits: Argument = one_of(lambda: nn.Parameter(torch.zeros(2)), **{
    "a tensor": torch.zeros(2), "a number": 0.0, "another size": nn.Parameter(torch.zeros(3)),
    "another rank": nn.Parameter(torch.zeros(1, 2)),
})  # fmt: skip
path: Argument = one_of(lambda: Paths(torch.tensor(1), torch.ones(())), **{
    "a list": Paths([1], torch.ones(())), "two": Paths(torch.tensor([1, 0]), torch.ones(2)),
    "beyond": Paths(torch.tensor(2), torch.ones(())), "a number": 1,
    "below": Paths(torch.tensor(-1), torch.ones(())),
    "no weight": Paths(torch.tensor(1), None), "floats": Paths(torch.tensor(1.0), torch.ones(())),
    "siblings": Paths(torch.tensor(1), torch.ones(()), "yes"),
}).called("w")  # fmt: skip
temperature = number(1.0, above=0.0, optional=True)
states: Argument = one_of(lambda: [torch.ones(2), torch.ones(2)], **{
    "None": None, "a tensor": torch.ones(2, 2), "one": [torch.ones(2)],
    "numbers": [1.0, 2.0], "of different shapes": [torch.ones(2), torch.ones(3)],
}).called("input")  # fmt: skip


COLUMN = MobileSpace(stages=((8, 2, 1), (8, 1, 1)), stem=8, first=8, head=8)
column = instance(lambda: COLUMN)
architecture: Argument = one_of(lambda: [(3, 6), "skip"], **{
    "None": None, "a number": 3, "text": "skip", "empty": [], "one": [(3, 6)],
    "a skip that halves": ["skip", "skip"], "an even kernel": [(4, 6), "skip"],
    "another name": [(3, 6), "none"], "three numbers": [(3, 6, 1), "skip"],
})  # fmt: skip
image = tensor(2, 3, 8, 8).but("a larger first axis", "meta", "sparse")
in_layers: Argument = one_of(lambda: [torch.rand(6), torch.rand(7)], **{
    "None": None, "a tensor": torch.rand(2, 7), "one": [torch.rand(6)], "a number": 3,
    "lists": [[0.5] * 6, [0.5] * 7], "of another size": [torch.rand(7), torch.rand(7)],
}).called("w")  # fmt: skip


def supernet(mixing: str | None = None) -> MobileNetSearchNetwork:
    return MobileNetSearchNetwork(3, space=COLUMN, mixing=mixing)


def of_column(classes: Any, in_channels: Any, memory: Any, mixing: Any, noise: Any) -> Any:
    return MobileNetSearchNetwork(
        classes, space=COLUMN, in_channels=in_channels, memory=memory, mixing=mixing, noise=noise
    )


batches: Argument = one_of(list, **{
    "None": None, "a number": 3, "an iterator": iter([]), "a generator": (b for b in ()),
})  # fmt: skip
losses: Argument = one_of(lambda: cross_entropy, **{"None": None, "text": "mse", "a number": 0})


def searched(network: Any, train: Any, valid: Any, **given: Any) -> Any:
    return ChoiceSearch(network, train, valid, **given)


def mixed(w: Any) -> Any:
    return Choice(candidates())(torch.rand(2, 3), w=w)


CALLS = [
    Call("Choice", Choice, {
        "candidates": modules, "mixing": choice("gdas", optional=True),
        "memory": choice("lean"), "noise": noise, "tau": temperature, "logits": logits},
        "nn.Choice"),
    Call("Choice", mixed, {"w": tensor(2)}, "nn.Choice.forward"),
    Call("Choice", mixed, {"w": path}, "nn.Choice.forward of a path"),
    Call("InputChoice", InputChoice, {
        "inputs": integer(2, 2), "mixing": choice("top2"), "tau": temperature, "logits": logits},
        "nn.InputChoice"),
    Call("InputChoice", lambda inputs: InputChoice(2)(inputs), {"inputs": states},
        "nn.InputChoice.forward"),
    Call("MobileNetSearchNetwork", of_column, {
        "classes": integer(3, 1), "in_channels": integer(3, 1), "memory": choice("lean"),
        "mixing": choice("gdas", optional=True), "noise": noise}),
    Call("MobileNetSearchNetwork", lambda space: MobileNetSearchNetwork(3, space=space), {
        "space": column}, "nn.MobileNetSearchNetwork of a space"),
    Call("MobileNetSearchNetwork", lambda x, w: supernet()(x, w), {"x": image, "w": in_layers},
        "nn.MobileNetSearchNetwork.forward"),
    Call("MobileNetSearchNetwork", lambda tau: supernet("gdas").set_tau(tau), {
        "tau": number(1.0, above=0.0)}, "nn.MobileNetSearchNetwork.set_tau"),
    Call("MobileNetSearchNetwork", lambda amplitude: supernet().set_noise_amplitude(amplitude), {
        "amplitude": number(1.0, 0.0)}, "nn.MobileNetSearchNetwork.set_noise_amplitude"),
    Call("MobileNetEvalNetwork", lambda **given: MobileNetEvalNetwork(space=COLUMN, **given), {
        "architecture": architecture, "classes": integer(3, 1), "in_channels": integer(3, 1),
        "squeeze": flag(True), "activation": choice("swish")}),
    Call("MobileNetEvalNetwork", lambda x: MobileNetEvalNetwork(
        [(3, 6), "skip"], 3, space=COLUMN)(x), {"x": image}, "nn.MobileNetEvalNetwork.forward"),
    Call("derived_network", derived_network, {
        "network": instance(lambda: nn.Linear(1, 1)), "keep_weights": flag(True)}),
    Call("ChoiceSearch", searched, {
        "network": instance(lambda: Choice(candidates(), mixing="softmax")),
        "train": batches, "valid": batches, "epochs": integer(1, 1), "loss": losses,
        "order": integer(1, 1, 2), "samples": integer(1, 1), "noise_decay": choice("none"),
        "zero_one_weight": number(0.0, 0.0), "grad_clip": number(5.0, above=0.0)}),
    Call("split_parameters", split_parameters, {"network": instance(lambda: nn.Linear(1, 1))}),
]  # fmt: skip
