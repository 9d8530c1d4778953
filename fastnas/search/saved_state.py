"""Finds what is wrong with the state in a whole checkpoint that no such run has written."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

import torch

KINDS = {
    "run": dict,
    "epoch": int,
    "step": int,
    "seconds": float,
    "sums": dict,
    "history": list,
    "random": dict,
}
"""What every state holds besides the parts of its run."""
PLAIN = (bool, int, float, str, type(None))


def problem_of_state(
    state: Mapping[str, Any],
    parts: Collection[str],
    summed: Collection[str],
    remembered: Mapping[str, type],
    epochs: int,
    steps: int,
) -> str | None:
    """Tells what of a state no run can have saved, or None.

    Args:
        parts: names of the run's parts and generators.
        summed: names of its sums.
        remembered: figures of past epochs that it reads again, and their types.
        epochs: of the run.
        steps: of an epoch.
    """
    absent = next((name for name in (*KINDS, *parts) if name not in state), None)
    if absent is not None:
        return f"{absent} is missing"
    for name, kind in KINDS.items():
        # The exact type is asked for: to isinstance True is an int, and would pass for epoch 1.
        if type(state[name]) is not kind:
            return f"{name} is no {kind.__name__}"
    if not all(isinstance(value, PLAIN) for value in state["run"].values()):
        return "run holds what is no setting"
    epoch, step, history = state["epoch"], state["step"], state["history"]
    if not 0 <= epoch <= epochs or len(history) != epoch:
        return f"epoch is {epoch} of {epochs}, of which {len(history)} are told"
    # A run that is finished has no epoch under way in which a step could have been made.
    if not 0 <= step <= (steps if epoch < epochs else 0):
        return f"step is {step} of {steps}"
    numbers = [state["seconds"], *state["sums"].values()]
    if set(state["sums"]) != set(summed) or not all(map(_is_finite, numbers)):
        return "its sums are not finite numbers of this run"
    names: dict[str, Any] = {
        "epoch": int,
        **dict.fromkeys(summed, (float, type(None))),
        **remembered,
    }
    for index, figures in enumerate(history):
        told = figures.get("epoch") if isinstance(figures, dict) else None
        if type(told) is not int or told != index:
            return f"the figures of epoch {index} are not told"
        for name, kinds in names.items():
            if name not in figures or not isinstance(figures[name], kinds):
                return f"{name} of epoch {index} is {figures.get(name)!r}"
        for name, value in figures.items():
            if not isinstance(value, PLAIN) or (type(value) is float and not _is_finite(value)):
                return f"{name} of epoch {index} is no finite number or text"
    return None


def problem_of_optimizer(optimizer: torch.optim.Optimizer) -> str | None:
    """Tells what torch has loaded without a word and cannot step with, or None."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            for name, value in optimizer.state.get(parameter, {}).items():
                # A moment has the shape of its parameter; the step count of Adam is a tensor of
                # shape [].
                fits = isinstance(value, torch.Tensor) and value.shape in (
                    parameter.shape, torch.Size([]),
                )  # fmt: skip
                if value is not None and not fits:
                    return f"{name} does not fit its parameter of shape {list(parameter.shape)}"
    return None


def _is_finite(value: object) -> bool:
    return isinstance(value, float) and math.isfinite(value)
