"""Valid calls of fastnas.nn, and of the modules of fastnas.reference."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from wrong_values import (
    Argument,
    Call,
    choice,
    flag,
    instance,
    integer,
    number,
    one_of,
    sequence,
    tensor,
    text,
)

import fastnas
from fastnas import nn as fused
from fastnas import reference, spaces
from fastnas.reference import SkipNoise

NB201 = "|none~0|+|skip_connect~0|none~1|+|none~0|nor_conv_1x1~1|none~2|"
DARTS = (
    "Genotype(normal=[('sep_conv_3x3', 0), ('skip_connect', 1)], normal_concat=[2],"
    " reduce=[('max_pool_3x3', 0), ('sep_conv_5x5', 1)], reduce_concat=[2])"
)
SMALL = spaces.uniform_space("small", ("skip_connect", "sep_conv_3x3"), 1)

space = instance(lambda: SMALL)
nb201 = instance(lambda: spaces.get_space("nb201"))
noise = instance(SkipNoise, optional=True).plus(true=True)
channels, classes, layers = integer(4, 1), integer(3, 1), integer(2, 1)
candidates = (
    sequence(text("skip_connect"), 2)
    .but("with a list")
    .plus(**{"an unknown one": ["no-such"], "text": "skip_connect", "an empty name": [""]})
)
drop = number(0.0, 0.0, below=1.0)
image = tensor(2, 3, 8, 8).but("a larger first axis", "meta", "sparse")


def profile_of_a_mixed_op(network: Any, rounds: Any) -> Any:
    x, w = torch.rand(2, 3, 4, 4), torch.rand(2, requires_grad=True)
    return fastnas.profile(network, x, w, rounds=rounds)


def weights_of(rows: int, columns: int, *cells: str) -> Argument:
    def valid() -> dict[str, torch.Tensor]:
        return {cell: torch.full((rows, columns), 1 / columns) for cell in cells}

    wrong: dict[str, Any] = {
        "None": None, "a number": 3, "a tensor": torch.rand(rows, columns), "empty": {},
        "lists": {cell: [[0.5] * columns] * rows for cell in cells}, "other rows":
        {cell: torch.rand(rows + 1, columns) for cell in cells}, "other columns":
        {cell: torch.rand(rows, columns + 1) for cell in cells}, "None as w":
        dict.fromkeys(cells), "integers":
        {cell: torch.zeros(rows, columns, dtype=torch.int64) for cell in cells},
    }  # fmt: skip
    return one_of(valid, **wrong)


def networks(module: Any) -> list[Call]:
    """The constructors and forwards that fastnas.nn and the reference share."""
    own = module.__name__.rpartition(".")[2]
    options = {"noise": noise, "skip_drop_path": drop}
    return [
        Call("MixedOp", module.MixedOp, {
            "candidates": candidates, "C": channels, "stride": integer(1, 1, 2), **options},
            f"{own}.MixedOp"),
        Call("Cell", module.Cell, {
            "space": space, "cell_type": choice("normal"), "C_before_last": channels,
            "C_last": channels, "C": channels, "reduced_before": flag(False)}, f"{own}.Cell"),
        Call("SearchNetwork", module.SearchNetwork, {
            "space": space, "C": channels, "num_classes": classes, "layers": layers,
            "in_channels": integer(3, 1), "stem_multiplier": integer(3, 1), **options},
            f"{own}.SearchNetwork"),
        Call("NB201SearchNetwork", module.NB201SearchNetwork, {
            "space": nb201, "C": channels, "num_classes": classes, "layers": integer(1, 1),
            "in_channels": integer(3, 1)}, f"{own}.NB201SearchNetwork"),
        Call("MixedOp", lambda x, w: module.MixedOp(["skip_connect", "none"], 3, 1)(x, w), {
            "x": image, "w": tensor(2)}, f"{own}.MixedOp.forward"),
        Call("SearchNetwork", lambda x, weights: module.SearchNetwork(SMALL, 4, 3, 1)(x, weights), {
            "x": image, "weights": weights_of(2, 2, "normal", "reduce")},
            f"{own}.SearchNetwork.forward"),
    ]  # fmt: skip


def paths_of(*shape: int) -> Argument:
    """Paths of all cell types, wrong in one field."""

    def weights(**fields: Any) -> dict[str, Any]:
        paths = fused.Paths(torch.zeros(shape, dtype=torch.int64), torch.ones(shape))
        return dict.fromkeys(("normal", "reduce"), paths._replace(**fields))

    return one_of(
        weights, **{
            "lists": weights(choice=[0] * shape[-1]), "floats": weights(choice=torch.ones(shape)),
            "one edge more": weights(choice=torch.zeros(shape[-1] + 1, dtype=torch.int64)),
            "meta": weights(choice=torch.zeros(shape, dtype=torch.int64, device="meta")),
            "another candidate": weights(choice=torch.full(shape, 9)),
            "far below": weights(choice=torch.full(shape, -2)),
            "None as weight": weights(weight=None), "integers": weights(weight=torch.ones(1).int()),
            "another weight": weights(weight=torch.ones(7)), "siblings": weights(siblings="yes"),
        },
    ).called("choice")  # fmt: skip


def network(**options: Any) -> Any:
    return fused.SearchNetwork(SMALL, 4, 3, 1, **options)


def noisy() -> Any:
    return network(noise=SkipNoise())


def sampled() -> dict[str, reference.HardWeights]:
    """The first candidate on every edge."""
    h, choice = torch.tensor([[1.0, 0.0]] * 2), torch.zeros(2, dtype=torch.int64)
    return dict.fromkeys(("normal", "reduce"), reference.HardWeights(h, choice))


def step(train: Any, valid: Any, alphas: Any, grad_clip: Any) -> Any:
    net = reference.SearchNetwork(SMALL, 4, 3, 1)
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.1) for _ in range(2)]
    return reference.search_step(net, alphas, *optimizers, train, valid, grad_clip)


def single_path_step(train: Any, valid: Any, samples: Any, grad_clip: Any) -> Any:
    net = reference.SinglePathNetwork(SMALL, 4, 3, 1)
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.1) for _ in range(2)]
    return reference.single_path_step(
        net, sampled, *optimizers, train, valid, samples=samples, grad_clip=grad_clip
    )


batch = one_of(
    lambda: (torch.rand(2, 3, 8, 8), torch.tensor([0, 1])),
    **{"None": None, "a number": 3, "images": (torch.rand(2, 3, 8, 8),), "lists": ([0], [1])},
)
clip = number(5.0, above=0.0)
hard = one_of(sampled, **{
    "None": None, "a number": 3, "mixing weights": {"normal": torch.rand(2, 2)},
    "none of a cell": {"normal": sampled()["normal"]},
    "lists": dict.fromkeys(("normal", "reduce"), ([[1.0, 0.0]] * 2, [0, 0])),
    "one edge": {t: reference.HardWeights(w.h[:1], w.choice) for t, w in sampled().items()},
})  # fmt: skip

stream = tensor(1, 2, dtype=torch.int64).but("another rank", "a larger first axis", "meta")
draw = instance(lambda: noisy().draw(), optional=True)
three_draws = instance(lambda: noisy().draw(paths=3), optional=True)
three_draws = three_draws.plus(short=noisy().draw())
CALLS = [
    Call("Cell", lambda s0, s1, w, draw: fused.Cell(SMALL, "normal", 3, 3, 4, False)(
        s0, s1, w, draw), {"s0": image, "s1": image, "w": tensor(2, 2), "draw": draw},
        "nn.Cell.forward"),
    Call("Cell", lambda s0, s1, w: reference.Cell(SMALL, "normal", 3, 3, 4, False)(s0, s1, w),
        {"s0": image, "s1": image, "w": tensor(2, 2)}, "reference.Cell.forward"),
    Call("NB201Cell", lambda x, w, draw: fused.NB201Cell(spaces.get_space("nb201"), 3)(
        x, w, draw), {"x": image, "w": tensor(6, 5), "draw": three_draws}, "nn.NB201Cell.forward"),
    Call("search_step", step, {
        "train": batch, "valid": batch, "grad_clip": clip, "alphas": one_of(
            lambda: {t: torch.zeros(2, 2, requires_grad=True) for t in ("normal", "reduce")},
            **{"None": None, "a number": 3, "lists": {"normal": [[0.0]]}})}),
    Call("single_path_step", single_path_step, {
        "train": batch, "valid": batch, "samples": integer(1, 1), "grad_clip": clip}),
    Call("SinglePathNetwork", lambda x, weights: reference.SinglePathNetwork(SMALL, 4, 3, 1)(
        x, weights), {"x": image, "weights": hard}, "SinglePathNetwork.forward"),
    Call("SinglePathNetwork", reference.SinglePathNetwork, {
        "space": space, "C": channels, "num_classes": classes, "layers": layers}),
    Call("NB201SinglePathNetwork", reference.NB201SinglePathNetwork, {
        "space": nb201, "C": channels, "num_classes": classes, "layers": integer(1, 1)}),
    Call("NB201Cell", fused.NB201Cell, {"space": nb201, "C": channels}),
    Call("SearchNetwork", lambda x, weights, draw: noisy()(x, weights, draw), {
        "x": image, "weights": weights_of(2, 2, "normal", "reduce"), "draw": draw},
        "nn.SearchNetwork.forward with a draw"),
    Call("Paths", lambda x, weights: network()(x, weights), {
        "x": image, "weights": paths_of(2)}, "nn.SearchNetwork.forward of a path"),
    Call("Paths", lambda x, weights: network()(x, weights), {
        "x": image, "weights": paths_of(3, 2)}, "nn.SearchNetwork.forward of paths"),
    Call("SearchNetwork", lambda batch, size: network().memory_report(batch, size), {
        "batch": integer(2, 1), "size": integer(8, 1).but("a list")}, "memory_report"),
    Call("SearchNetwork", lambda memory: network().set_memory(memory), {
        "memory": choice("fast")}, "set_memory"),
    Call("SearchNetwork", lambda amplitude: noisy().set_noise_amplitude(amplitude), {
        "amplitude": number(1.0, 0.0)}, "set_noise_amplitude"),
    Call("SearchNetwork", lambda paths: noisy().draw(paths=paths), {
        "paths": integer(1, 1)}, "draw"),
    Call("SearchNetwork", lambda memory: network(memory=memory), {
        "memory": choice("fast")}, "nn.SearchNetwork with a memory"),
    Call("NoiseDraw", fused.NoiseDraw, {
        "level": tensor(2, dtype=torch.float64).but("another rank", "meta", "sparse"),
        "rng": stream.but("sparse")}),
    Call("EvalNetwork", lambda drop_path, in_channels: fused.EvalNetwork(
        spaces.parse(DARTS), 4, 3, 2, drop_path=drop_path, in_channels=in_channels), {
        "drop_path": drop, "in_channels": integer(3, 1)}, "EvalNetwork with options"),
    Call("EvalNetwork", lambda drop_path: setattr(
        fused.EvalNetwork(spaces.parse(DARTS), 4, 3, 2), "drop_path", drop_path), {
        "drop_path": drop}, "EvalNetwork.drop_path"),
    Call("EvalNetwork", lambda x: fused.EvalNetwork(spaces.parse(DARTS), 4, 3, 2)(x), {
        "x": image}, "EvalNetwork.forward"),
    Call("NB201EvalNetwork", lambda x: fused.NB201EvalNetwork(spaces.parse(NB201), 4, 3, 1)(x), {
        "x": image}, "NB201EvalNetwork.forward"),
    *networks(fused),
    *networks(reference),
    Call("ArchParameters", fused.ArchParameters, {
        "space": space, "scale": number(1e-3), "topology": choice("none"), "tied": flag(False)}),
    Call("EvalNetwork", fused.EvalNetwork, {
        "C": channels, "num_classes": classes, "layers": layers, "auxiliary": flag(False),
        "genotype": instance(lambda: spaces.parse(DARTS))}),
    Call("NB201EvalNetwork", fused.NB201EvalNetwork, {
        "genotype": instance(lambda: spaces.parse(NB201)), "C": channels, "num_classes": classes,
        "layers": integer(1, 1)}),
    Call("accelerate", fastnas.accelerate, {
        "model": instance(lambda: nn.Sequential(reference.MixedOp(["none", "skip_connect"], 3, 1))),
        "backend": choice("eager", optional=True), "check": flag(True),
        "memory": choice("lean", optional=True)}),
    Call("decelerate", fastnas.decelerate, {
        "model": instance(lambda: nn.Sequential(nn.Conv2d(3, 3, 1)))}),
    Call("profile", profile_of_a_mixed_op, {
        "network": instance(lambda: reference.MixedOp(["none", "skip_connect"], 3, 1)),
        "rounds": integer(1, 1)}),
    Call("count_parameters", fused.count_parameters, {
        "module": instance(lambda: nn.Conv2d(3, 3, 1)), "exclude_auxiliary": flag(True)}),
]  # fmt: skip
