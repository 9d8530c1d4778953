"""Every argument of every op given what it cannot be: one error of ours that names both."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from op_calls import FUNCTIONS, call, tensors

from fastnas import SkipNoise

HUGE = 10**5000
NUMBERS: list[Any] = [math.nan, math.inf, -math.inf, -1, -1e-3, HUGE, "0.1", None, True, [0.1],
                      torch.tensor(0.1), 1j]  # fmt: skip
LISTS: list[Any] = [None, 3, True, "x", b"x", {}, torch.ones(2, 2, 4, 3, 6)]
FLAGS: list[Any] = [1, 0, None, "True", torch.tensor(True), 0.0]
TEXTS: list[Any] = ["", "most", None, 3, True, ["lean"], ("none",), torch.ones(1), HUGE]
TENSORS: list[Any] = [None, 3, 0.5, True, "x", [0.0, 0.2], (1, 2), {}]

WRONG: dict[str, list[Any]] = {
    "x": [*LISTS, [], [None], [3.0]],
    "z": [*LISTS, [], [None], [3.0]],
    "params": [*LISTS, [], [None] * 6],
    "w": TENSORS,
    "alpha": TENSORS,
    "beta": TENSORS,
    "choice": TENSORS[1:],
    "level": TENSORS[1:],
    "rng": TENSORS[1:],
    "normed": [*LISTS, [], [1, 0, 1], [True, False, None], [True]],
    "running": [3, True, "x", torch.ones(2, 4), [True] * 4, [(1, 2)] * 4, {}, [None] * 9, [()] * 3],
    "training": FLAGS,
    "momentum": [*NUMBERS, 1.0001, 2],
    "eps": NUMBERS,
    "tau": [n for n in [*NUMBERS, 0, 0.0] if not isinstance(n, torch.Tensor)],
    "memory": TEXTS,
    "topology": TEXTS,
    "backend": [*TEXTS[:2], *TEXTS[3:]],
    "noise": [True, False, "gaussian", 0.2, SkipNoise, torch.ones(2)],
    "noisy": [None, 1, "1", [1.0], [True], [9], [-1], [1, 1], [None], ["1"], torch.tensor([1])],
    "nodes": [*LISTS, (), (2.0, 1), (True, 2), (0, 3), (-3,), (3, 3), ("3",), (None,), (HUGE,)],
    "paths": [True, 0, -1, 1.5, "2", None, [1], HUGE, 10**30, torch.tensor(1), math.nan],
    "table": [None, 3, [], "table", {}, (2, 1, 3)],
}
KEYWORDS = {
    "mixed_sum": ("backend",),
    "mixed_norm_sum": ("training", "momentum", "eps", "backend"),
    "mixed_edges": ("training", "momentum", "eps", "memory", "backend"),
    "mixed_edges along paths": ("training", "momentum", "eps", "memory", "backend"),
    "relu_conv_bn": ("training", "momentum", "eps", "paths", "backend"),
    "relu_conv_bn at stride 2": (),
    "sample_paths": ("backend", "paths"),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_wrong_arguments(name: str) -> None:
    op, tried = name.split()[0], 0
    for argument in {*call(name), *KEYWORDS[name]}:
        for wrong in WRONG[argument]:
            if argument == "x" and op == "relu_conv_bn" and torch.is_tensor(wrong):
                wrong = wrong[0, 0]
            given = call(name) | {argument: wrong}
            before = [t.clone() for place, t in tensors(given) if place[0] == "running"]
            prefix = "" if argument == "backend" else f"{op}: "
            pattern = rf"^{prefix}.*\b{re.escape(argument)}\b"
            with pytest.raises((TypeError, ValueError)) as caught:
                FUNCTIONS[name](**given)
            message = str(caught.value)
            assert re.search(pattern, message), f"{argument}={type(wrong)}: {message}"
            assert len(message) < 300
            after = [t for place, t in tensors(given) if place[0] == "running"]
            assert all(torch.equal(a, b) for a, b in zip(before, after)), "running was updated"
            tried += 1
    assert tried > 10
