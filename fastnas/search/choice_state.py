"""Writes and reads the checkpoints of a `ChoiceSearch`."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastnas.checks import short
from fastnas.nn import Choice
from fastnas.nn.logits import Logits
from fastnas.search.checkpoint import (
    CheckpointError,
    load_checkpoint,
    random_state,
    restore_random_state,
    save_checkpoint,
)

if TYPE_CHECKING:
    from fastnas.search.choice_search import ChoiceSearch

logger = logging.getLogger("fastnas")

KIND = "choice search"
LOADERS = {"train", "valid"}
"""Parts of which each process has another state."""


def parts_of(search: ChoiceSearch) -> dict[str, Any]:
    """Returns name to what has a state of its own."""
    parts = {
        "network": search.network,
        "weight_optimizer": search.weight_optimizer,
        "logit_optimizer": search.logit_optimizer,
        "scheduler": search.scheduler,
        "train": search.train,
        "valid": search.valid,
        "cost": search.cost,
        **search.precision.parts(),
    }
    return {name: part for name, part in parts.items() if hasattr(part, "state_dict")}


def identity_of(search: ChoiceSearch) -> dict[str, Any]:
    """Returns what a search that goes on must have as well."""
    return {
        "epochs": search.epochs,
        "order": search.order,
        "samples": search.samples,
        "tau": None if search.tau is None else list(search.tau),
        "noise_decay": search.noise_decay,
        "zero_one_weight": search.zero_one_weight,
        "grad_clip": search.grad_clip,
        "choices": {name: [c.mixing, _names(c)] for name, c in search.choices.items()},
        "precision": search.precision.name,
        "cost": None if search.cost is None else search.cost.identity(),
    }


def write_state(search: ChoiceSearch, path: Path) -> None:
    """Writes all that the rest of the search depends on, once for all processes."""
    state = {name: part.state_dict() for name, part in parts_of(search).items()}
    for name in LOADERS & state.keys():
        # Each process has loaders of its own.
        state[name] = search.processes.gathered(state[name])
    if search.processes.is_first:
        _write(search, path, state)
    search.processes.wait()


def _write(search: ChoiceSearch, path: Path, state: dict[str, Any]) -> None:
    own = {"search": identity_of(search), "epoch": search.epoch, "history": search.history}
    save_checkpoint(path, KIND, {**own, "random": random_state(), "parts": state})


def restore_state(search: ChoiceSearch, path: Path) -> None:
    """Goes to the state that a checkpoint holds.

    Raises:
        CheckpointError: it cannot be read, or is of another search.
    """
    state = load_checkpoint(path, KIND)
    mine, theirs = identity_of(search), state["search"]
    for name in mine:
        if mine[name] != theirs.get(name):
            raise CheckpointError(
                f"checkpoint {path} is of another search: {name} is {short(theirs.get(name))}"
                f" there and {short(mine[name])} here"
            )
    parts = parts_of(search)
    if parts.keys() != state["parts"].keys():
        raise CheckpointError(
            f"checkpoint {path} holds {', '.join(state['parts'])}; this search has"
            f" {', '.join(parts)}"
        )
    try:
        for name, part in parts.items():
            found = state["parts"][name]
            if name in LOADERS and len(found) != search.processes.size:
                logger.warning(
                    "fastnas: %s begins anew: its state is that of %d processes, and here are %d",
                    name, len(found), search.processes.size,
                )  # fmt: skip
                continue
            part.load_state_dict(found[search.processes.rank] if name in LOADERS else found)
    except Exception as error:  # state dicts of other networks raise anything
        text = " ".join(str(error).split())
        raise CheckpointError(f"checkpoint {path} does not fit this search: {text}") from error
    search.epoch, search.history = state["epoch"], state["history"]
    restore_random_state(state["random"])


def _names(choice: Logits) -> list[str] | int:
    return choice.names if isinstance(choice, Choice) else choice.own_logits().numel()
