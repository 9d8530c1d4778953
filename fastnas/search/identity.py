"""Tells what a run and its continuation must agree on, to have the results of one run."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

# Settings that may differ: they change no result. The threads that a run really has are compared.
FREE = {
    "out",
    "data_dir",
    "threads",
    "workers",
    "tensorboard",
    "checkpoint_every",
    "compare_steps",
    "cuda_graph",
    "budget",
    "table",
    "table_report",
}
# A search's last stage, the training of what it derived, has not begun without its checkpoint;
# until then its settings may change as well, so that one which fails there loses no search.
LAST_STAGE = {
    *("train_epochs", "train_channels", "train_layers", "train_batch_size", "train_lr"),
    *("squeeze", "activation"),
}


def differences(
    before: Mapping[str, Any], now: Mapping[str, Any], free: Collection[str] = ()
) -> dict[str, str]:
    """Returns name to what was and what is, of all that differs and may not."""
    return {
        name: f"{name} {before.get(name)!r} -> {now.get(name)!r}"
        for name in dict.fromkeys([*before, *now])
        if name not in free and before.get(name) != now.get(name)
    }
