"""Valid calls of fastnas.ops and fastnas.backends."""

from __future__ import annotations

from typing import Any

import torch
from wrong_values import (
    Argument,
    Call,
    choice,
    constants,
    flag,
    instance,
    integer,
    number,
    one_of,
    sequence,
    tensor,
)

from fastnas import backends, ops
from fastnas.reference import SkipNoise
from fastnas.spaces import Edge, EdgeTable, EdgeTerm

CHANNELS = 4
POOL = EdgeTerm("avg_pool", 1)
TABLE = EdgeTable(1, 1, 2, (Edge(0, 0, 1, (EdgeTerm("skip", 0), POOL)),))


def image() -> Argument:
    return tensor(2, CHANNELS, 4, 4)


def running(count: int) -> Argument:
    """(mean, variance) of each norm, or of none."""
    pair = (torch.zeros(CHANNELS), torch.ones(CHANNELS))
    wrong: dict[str, Any] = {
        "a number": 1, "text": "ab", "pairs too many": [pair] * (count + 1), "lists":
        [([0.0] * CHANNELS, [1.0] * CHANNELS)] * count, "other channels":
        [(torch.zeros(9), torch.ones(9))] * count, "one of a pair": [(pair[0],)] * count,
        "integers": [(pair[0].long(), pair[1].long())] * count,
    }  # fmt: skip
    return Argument(lambda: [(torch.zeros(CHANNELS), torch.ones(CHANNELS))] * count,
                    constants(**wrong))  # fmt: skip


backend = choice("eager", optional=True).called("fastnas backend")
momentum, eps = number(0.1, 0.0, 1.0), number(1e-5, 0.0)
noise = instance(lambda: SkipNoise(), optional=True).but("a list", "a dict").plus(true=True)
required_noise = instance(lambda: SkipNoise())
noisy = one_of(lambda: (0,), **{"a number": 1, "text": "0", "past the end": (2,), "negative":
               (-3,), "halves": (0.5,), "twice": (0, 0), "None": None})  # fmt: skip
level = tensor(2, dtype=torch.float64, optional=True).plus(**{"short": torch.zeros(1)})
rng = tensor(2, dtype=torch.int64, optional=True)
normed = one_of(lambda: (True, True), **{"None": None, "a number": 1, "text": "ab", "one": (True,),
                "three": (True,) * 3, "numbers": (1, 0)})  # fmt: skip
noises = {"noise": required_noise, "noisy": noisy, "level": level, "rng": rng}
weights = tensor(2)

CALLS = [
    Call("mixed_sum", ops.mixed_sum, {
        "x": sequence(tensor(2, 3), 2).plus(text="ab"), "w": weights, **noises,
        "backend": backend}),
    Call("mixed_norm_sum", ops.mixed_norm_sum, {
        "z": sequence(image(), 2).plus(text="ab"), "w": weights, "normed": normed, "eps": eps,
        "running": running(2), "momentum": momentum, "training": flag(True),
        "backend": backend}),
    Call("mixed_edges", ops.mixed_edges, {
        "x": sequence(image().but("a larger first axis"), 1, fixed=True), "w": tensor(1, 2),
        "params": one_of(list, **{"None": None, "a number": 1, "one more": [torch.zeros(1)]}),
        "table": instance(lambda: TABLE), "running": running(1), "momentum": momentum,
        "training": flag(True), "eps": eps, "noise": required_noise, "level": level,
        "rng": tensor(1, 2, dtype=torch.int64, optional=True), "memory": choice("lean"),
        "backend": backend}),
    Call("relu_conv_bn", ops.relu_conv_bn, {
        "x": image().but("a larger first axis"), "params": sequence(
            tensor(CHANNELS, CHANNELS, 1, 1), 1, fixed=True).but("with a larger first axis")
            .called("running"),
        "running": one_of(lambda: (torch.zeros(CHANNELS), torch.ones(CHANNELS)), **{"a number": 1,
            "text": "ab", "one": (torch.zeros(CHANNELS),), "lists": ([0.0] * 4, [1.0] * 4)}),
        "momentum": momentum, "training": flag(True), "eps": eps, "paths": integer(1, 1),
        "backend": backend}),
    Call("sample_paths", ops.sample_paths, {
        "alpha": tensor(4, 3), "beta": tensor(4), "nodes": sequence(integer(2, 1), 2, fixed=True),
        "tau": number(1.0, above=0.0).but("inf"), "topology": choice("top2"),
        "paths": integer(2, 1), "rng": tensor(2, dtype=torch.int64, optional=True),
        "backend": backend}),
    Call("draw_noise", ops.draw_noise, {"count": integer(1, 0)}),
    Call("draw_rng", ops.draw_rng, {"count": integer(1, 0)}),
    Call("use_backend", lambda name: backends.use_backend(name).__enter__(), {
        "name": choice("eager").called("use_backend")}, "use_backend"),
]  # fmt: skip
