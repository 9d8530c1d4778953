"""Checks the settings of a `ChoiceSearch`, and makes the optimizers that it is not given."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, Adam, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler

from fastnas.checks import check_choice, check_int, check_number, check_type, short
from fastnas.nn import Choice
from fastnas.nn.logits import Logits
from fastnas.processes import here
from fastnas.search.callbacks import Callback
from fastnas.strategies.precision import Precision

DECAYS = ("none", "cosine")


def check_batches(name: str, batches: Any) -> None:
    """Refuses what is exhausted after one epoch, so that the next would have no steps."""
    if not isinstance(batches, Iterable) or isinstance(batches, Iterator):
        raise TypeError(
            f"{name} is a {type(batches).__name__}; batches that can be iterated anew for each"
            " epoch, such as a DataLoader, are needed"
        )


def check_loss(loss: Any) -> None:
    """Refuses what is no function of (network, batch), such as a loss of logits and labels."""
    if isinstance(loss, nn.Module) or not callable(loss):
        raise TypeError(
            f"loss is {short(loss)}; a function of (network, batch) is needed, such as"
            " lambda network, batch: criterion(network(batch[0]), batch[1])"
        )


def check_callbacks(callbacks: Any) -> None:
    """Refuses what is no list of callbacks."""
    if not isinstance(callbacks, list | tuple):
        raise TypeError(f"callbacks is {short(callbacks)}; a list of callbacks is needed")
    for callback in callbacks:
        check_type("a callback", callback, Callback)


def checked_tau(tau: Any) -> tuple[float, float] | None:
    """Returns the temperatures of the first and the last epoch, or None."""
    if tau is None:
        return None
    if not isinstance(tau, tuple | list) or len(tau) != 2:
        raise ValueError(f"tau is {short(tau)}; a pair (first, last) is needed")
    for value in tau:
        check_number("tau", value)
        if not 0 < value < math.inf:
            raise ValueError(f"tau is {short(tau)}; finite numbers > 0 are needed")
    return float(tau[0]), float(tau[1])


def checked_precision(name: Any, device: torch.device, network: nn.Module) -> Precision:
    """Returns the precision of a search; of autocast only over parameters in float32."""
    found = Precision(name, device, here())
    if found.dtype is not None:
        # Gradients in 16 bits could not be unscaled, and moments would lose what they gather.
        for path, p in network.named_parameters():
            if p.dtype != torch.float32:
                raise ValueError(
                    f"precision is {name!r}, but the parameter {path!r} is {p.dtype};"
                    " torch.float32 is needed, which autocast casts by itself"
                )
    return found


def check_settings(
    choices: Mapping[str, Logits],
    *,
    order: int,
    samples: int,
    tau: tuple[float, float] | None,
    noise_decay: str,
    zero_one_weight: float,
) -> None:
    """Refuses settings that none of the choices would heed, or that one of them does not allow."""
    check_int("order", order, 1, 2)
    check_int("samples", samples, 1)
    check_choice("noise_decay", noise_decay, DECAYS)
    check_number("zero_one_weight", zero_one_weight)
    if not 0 <= zero_one_weight < math.inf:
        raise ValueError(f"zero_one_weight is {zero_one_weight}; a finite number >= 0 is needed")
    if not choices:
        raise ValueError(
            "network has no choice with logits; at least one is needed, such as"
            ' fastnas.nn.Choice(candidates, mixing="softmax")'
        )
    sampled = [name for name, choice in choices.items() if choice.mixing in choice.sampled]
    if order == 2 and sampled:
        raise ValueError(f"order is 2, but the choice {sampled[0]!r} samples; 1 is needed")
    for name, given, usual in (("samples", samples, 1), ("tau", tau, None)):
        if given != usual and not sampled:
            raise ValueError(f"{name} is {given}, but no choice samples; {usual} is needed")
    noisy = any(isinstance(choice, Choice) and choice.noise for choice in choices.values())
    if noise_decay != "none" and not noisy:
        raise ValueError(f"noise_decay is {noise_decay!r}, but no choice has noise")
    if zero_one_weight and all(choice.mixing != "sigmoid" for choice in choices.values()):
        raise ValueError(f"zero_one_weight is {zero_one_weight}, but no choice mixes by sigmoids")


def weight_optimizer_of(
    weights: Sequence[nn.Parameter],
    logits: Sequence[nn.Parameter],
    optimizer: Optimizer | None,
    scheduler: LRScheduler | None,
    epochs: int,
    order: int,
) -> tuple[Optimizer, LRScheduler | None]:
    """Returns the optimizer of the weights and its scheduler: those that are given, or DARTS'."""
    if optimizer is None:
        if scheduler is not None:
            raise ValueError("scheduler is given without the weight_optimizer that it moves")
        if not weights:
            raise ValueError("network has no parameters but its logits; weights are needed")
        optimizer = SGD(weights, lr=0.025, momentum=0.9, weight_decay=3e-4)
        scheduler = CosineAnnealingLR(optimizer, epochs, eta_min=0.001)
    elif scheduler is not None:
        check_type("scheduler", scheduler, LRScheduler)
        if scheduler.optimizer is not optimizer:
            raise ValueError("scheduler moves another optimizer than weight_optimizer")
    _check_held("weight_optimizer", optimizer, weights, logits)
    if order == 2 and not _is_plain_sgd(optimizer):
        raise ValueError(
            "order is 2, but weight_optimizer is no plain SGD with one group of parameters, whose"
            " step the unrolled gradient looks ahead to"
        )
    return optimizer, scheduler


def logit_optimizer_of(
    weights: Sequence[nn.Parameter], logits: Sequence[nn.Parameter], optimizer: Optimizer | None
) -> Optimizer:
    """Returns the optimizer of the logits: the one that is given, or DARTS'."""
    if optimizer is None:
        optimizer = Adam(logits, lr=3e-4, betas=(0.5, 0.999), weight_decay=1e-3)
    _check_held("logit_optimizer", optimizer, logits, weights)
    return optimizer


def _check_held(
    name: str, optimizer: Any, own: Sequence[nn.Parameter], others: Sequence[nn.Parameter]
) -> None:
    """Refuses an optimizer that lacks a parameter, or would move one of the other kind."""
    check_type(name, optimizer, Optimizer)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    lacking = sum(p.requires_grad and id(p) not in held for p in own)
    foreign = sum(id(p) in held for p in others)
    if lacking or foreign:
        kind, other = name.partition("_")[0] + "s", "weights" if name[0] == "l" else "logits"
        raise ValueError(
            f"{name} lacks {lacking} of the network's {kind} and holds {foreign} of its {other};"
            " `fastnas.nn.split_parameters` tells them apart"
        )


def _is_plain_sgd(optimizer: Optimizer) -> bool:
    group = optimizer.param_groups[0]
    plain = not (group.get("nesterov") or group.get("dampening") or group.get("maximize"))
    return type(optimizer) is SGD and len(optimizer.param_groups) == 1 and plain
