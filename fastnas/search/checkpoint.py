"""Writes and reads checkpoints: everything a run needs to go on as if it had never stopped."""

from __future__ import annotations

import hashlib
import io
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastnas.files import write_atomically

VERSION = 3
HEADER = f"fastnas checkpoint {VERSION}\n".encode()
HASH_BYTES = 32
ZIP = b"PK"
"""What checkpoints of version 1 begin with."""


class CheckpointError(ValueError):
    """Says in one line which checkpoint cannot be used, and why."""


def save_checkpoint(path: Path, kind: str, state: dict[str, Any]) -> None:
    """Writes atomically. The state is tensors, numbers, text and containers of them.

    The file is a line with the version, the hash of all that follows, and what torch.save writes.
    """
    # The hash stands before the content in the file, so the content is made in memory first.
    stream = io.BytesIO()
    torch.save({"kind": kind, **state}, stream)
    content = stream.getvalue()
    write_atomically(path, lambda file: file.write(HEADER + _hash(content) + content))


def load_checkpoint(path: Path, kind: str) -> dict[str, Any]:
    """Loads what `save_checkpoint` wrote with weights_only=True: no code in it is run.

    Raises:
        CheckpointError: there is none, a byte of it has changed, or it is of another version or
            kind.
    """
    try:
        whole = path.read_bytes()
    except FileNotFoundError:
        raise CheckpointError(f"no checkpoint at {path}") from None
    except (OSError, MemoryError) as error:
        raise CheckpointError(f"checkpoint {path} is broken: {_first_line(error)}") from error
    if whole.startswith(ZIP):
        raise CheckpointError(
            f"checkpoint {path} has version 1, without a hash, or is no fastnas checkpoint;"
            f" this fastnas reads version {VERSION}"
        )
    version = re.match(rb"fastnas checkpoint ([0-9]{1,9})\n", whole)
    if version is not None and int(version[1]) != VERSION:
        raise CheckpointError(
            f"checkpoint {path} has version {int(version[1])}; this fastnas reads version {VERSION}"
        )
    start = len(HEADER) + HASH_BYTES
    content = whole[start:]  # torch.load reads damaged tensors without a word
    if not whole.startswith(HEADER) or whole[len(HEADER) : start] != _hash(content):
        raise CheckpointError(f"checkpoint {path} is broken: its content does not match its hash")
    try:
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # a pickle made by hand raises anything
        raise CheckpointError(f"checkpoint {path} is broken: {_first_line(error)}") from error
    if not isinstance(state, dict) or "kind" not in state:
        raise CheckpointError(f"{path} is no fastnas checkpoint")
    if state["kind"] != kind:
        raise CheckpointError(f"checkpoint {path} is of a {state['kind']}, not of a {kind}")
    return state


def _hash(content: bytes) -> bytes:
    # The hash finds damage. It is no guard against forgery: weights_only=True is.
    return hashlib.blake2b(content, digest_size=HASH_BYTES).digest()


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def random_state() -> dict[str, Any]:
    """Returns the state of every global generator that a candidate may draw from."""
    legacy: Any = np.random.get_state()  # noqa: NPY002
    _, keys, position, has_gauss, cached = legacy
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": random.getstate(),
        # The keys are uint32, of which older releases of torch have no tensors.
        "numpy": [torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached],
    }


def restore_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    keys, position, has_gauss, cached = state["numpy"]
    legacy = ("MT19937", keys.numpy().astype(np.uint32), position, has_gauss, cached)
    np.random.set_state(legacy)  # noqa: NPY002
