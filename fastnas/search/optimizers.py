"""Makes the optimizers of a search: those on CUDA keep on the device all that they read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer
from torch.optim.sgd import sgd as fused_sgd

Kind = TypeVar("Kind", bound=Optimizer)


def capturable_on(device: torch.device) -> bool:
    """Tells whether a search on `device` has capturable optimizers (`sgd`, `adam`).

    The device decides, not the wish for CUDA graphs: with and without graphs a search makes the
    same steps.
    """
    return device.type == "cuda"


def sgd(params: Iterable[nn.Parameter], *, lr: float, capturable: bool, **settings: Any) -> SGD:
    """Makes an SGD whose step, if `capturable`, a CUDA graph can hold.

    Then torch's fused kernel updates (the foreach one reads a tensor's learning rate back to the
    host), the rate is a float32 tensor [] beside the parameters, and all state is there before the
    first step, so nothing is waited for and nothing is decided on the host.

    The state dict is the same with and without, and loads into either.

    Args:
        params: all on one device.
        settings: further arguments of `torch.optim.SGD`.
    """
    # On hundreds of small tensors the default, a loop, takes 7.1 ms for 4.9; the bits are the same.
    many = {} if capturable else {"foreach": True}
    return _build(SGD, params, lr, capturable, {**many, **settings})


def adam(params: Iterable[nn.Parameter], *, lr: float, capturable: bool, **settings: Any) -> Adam:
    """Makes an Adam, and the rest as in `sgd`."""
    return _build(Adam, params, lr, capturable, settings)


def is_capturable(optimizer: Optimizer) -> bool:
    """Tells whether the rate is read from memory; a number would be fixed by the capture."""
    return all(isinstance(group["lr"], torch.Tensor) for group in optimizer.param_groups)


@contextmanager
def being_captured(optimizer: Optimizer) -> Iterator[None]:
    """Sets the flag that torch's Adam needs in a captured step, and warns of in others."""
    for group in optimizer.param_groups:
        # Outside of a capture torch warns of the flag, so it is set for the moment of the capture
        # alone.
        group["capturable"] = True
    try:
        yield
    finally:
        for group in optimizer.param_groups:
            group["capturable"] = False


def step_where(optimizer: Optimizer, moved: Sequence[tuple[Sequence[Tensor], Tensor]]) -> None:
    """Makes a step in which some parameters stand still, as if their gradient were None.

    Args:
        optimizer: SGD of `sgd(capturable=True)`, with one group, where `moved` is not empty.
        moved: parameters, and bool [] on their device: whether they move. Others do.
    """
    sampled = {p: p.grad for params, _ in moved for p in params if p.grad is not None}
    for p in sampled:
        # SGD passes over what has no gradient, so this step moves everything but the sampled ones.
        p.grad = None
    optimizer.step()
    group = optimizer.param_groups[0]
    for params, moves in moved:
        params = [p for p in params if p in sampled]
        if not params:
            continue
        fused_sgd(
            params,
            [sampled[p] for p in params],
            [optimizer.state[p].get("momentum_buffer") for p in params],
            fused=True,
            found_inf=(~moves).to(torch.float32),  # of a scaled loss: nothing is written
            weight_decay=group["weight_decay"],
            momentum=group["momentum"],
            lr=group["lr"],
            dampening=group["dampening"],
            nesterov=group["nesterov"],
            maximize=group["maximize"],
        )
    for p, grad in sampled.items():
        p.grad = grad


def set_learning_rate(optimizer: Optimizer, lr: float) -> None:
    """Sets the rate of all groups; in place where it is a tensor, which captured steps read."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def state_tensors(optimizer: Optimizer) -> list[torch.Tensor]:
    """Returns what a step changes besides the parameters."""
    values = [value for state in optimizer.state.values() for value in state.values()]
    return [value for value in values if isinstance(value, torch.Tensor)]


def _build(
    kind: type[Kind],
    params: Iterable[nn.Parameter],
    lr: float,
    capturable: bool,
    settings: dict[str, Any],
) -> Kind:
    params = list(params)
    optimizer = kind(params, lr=lr, fused=capturable or None, **settings)  # type: ignore[call-arg]
    if capturable:
        for group in optimizer.param_groups:
            # A number would be part of the graph for good; a tensor is read anew at each replay.
            group["lr"] = torch.full((), lr, dtype=torch.float32, device=params[0].device)
        # SGD and Adam make their state at the first step. Inside of a capture that would be
        # recorded, and every replay would begin from moments of 0.
        _fill_state(optimizer)
        optimizer.register_load_state_dict_post_hook(_fill_state)
    optimizer.register_state_dict_post_hook(_rate_as_number)
    optimizer.register_load_state_dict_pre_hook(_keep_settings)
    return optimizer


def _fill_state(optimizer: Optimizer) -> None:
    """Adds what is missing of the state, with the values that a first step starts from."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            state = optimizer.state[p]
            if isinstance(optimizer, Adam):
                names = ["exp_avg", "exp_avg_sq"]
                if "step" not in state:
                    state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
            else:
                names = ["momentum_buffer"] if group["momentum"] else []
            for name in names:
                if state.get(name) is None:
                    state[name] = torch.zeros_like(p, memory_format=torch.preserve_format)


def _rate_as_number(optimizer: Optimizer, state: dict[str, Any]) -> None:
    for group in state["param_groups"]:
        # These groups are copies for the state dict. As a number the rate loads on any device.
        group["lr"] = float(group["lr"])


def _keep_settings(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """Keeps this run's settings: those of a checkpoint may be for another device.

    Groups that do not match this optimizer's are left for torch to refuse.
    """
    own, saved = optimizer.param_groups, state["param_groups"]
    if len(own) != len(saved):
        return state
    groups = [{**mine, "params": theirs["params"]} for mine, theirs in zip(own, saved)]
    return {**state, "param_groups": groups}
