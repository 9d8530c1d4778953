"""The folder of a run: who may write there, and what a resumed run must agree with."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from fastnas.search.config import FolderConfig, config_text, make_config
from fastnas.search.files import is_partial, write_text
from fastnas.search.text_file import file_path

CONFIG = "config.json"
LOCK = ".lock"
# May differ between a run and its continuation: they change no result.
FREE = {
    "out",
    "data_dir",
    "threads",
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
LAST_STAGE = {"train_epochs", "train_channels", "train_layers", "train_batch_size", "train_lr"}
LAST_CHECKPOINT = "train.pt"


class RunFolderError(ValueError):
    """The folder of a run cannot be used; one line says why."""


@contextmanager
def claimed_folder(config: FolderConfig, resume: bool) -> Iterator[Path]:
    """The run's folder, claimed as by `claim_folder` and locked while the run lives.

    Raises:
        RunFolderError: as `claim_folder`, or another run that lives has the folder.
    """
    out = file_path(config.out)
    try:
        if not os.path.lexists(out / CONFIG):
            _check_empty(out)
        out.mkdir(parents=True, exist_ok=True)
        # The system releases it when the process dies, however it dies.
        lock = FileLock(out / LOCK, timeout=0)
        lock.acquire()
    except Timeout:
        raise RunFolderError(
            f"{out} is in use by another run; wait for its end, or name another folder with --out"
        ) from None
    except OSError as error:
        raise RunFolderError(f"{out} cannot hold a run: {error.strerror}") from error
    try:
        yield claim_folder(config, resume)
    finally:
        lock.release()


def claim_folder(config: FolderConfig, resume: bool) -> Path:
    """Makes the run's folder and writes its config there.

    Raises:
        RunFolderError: it holds a run and `resume` is off, or one with other settings, or is no
            folder, or cannot be written. Nothing in it has been touched then.
    """
    out = file_path(config.out)
    path = out / CONFIG
    if os.path.lexists(path):  # pathlib raises for a name that is too long
        if not resume:
            raise RunFolderError(
                f"{out} holds a run; continue it with --resume, or name another folder with --out"
            )
        if _check_same(config, path):
            write_text(path, config_text(config))
        return out
    try:
        _check_empty(out)
        out.mkdir(parents=True, exist_ok=True)
        write_text(path, config_text(config))
    except OSError as error:
        raise RunFolderError(f"{out} cannot hold a run: {error.strerror}") from error
    return out


def _check_empty(out: Path) -> None:
    if out.exists() and any(not is_partial(p) and p.name != LOCK for p in out.iterdir()):
        raise RunFolderError(f"{out} is not empty and holds no run; name another with --out")


def _check_same(config: FolderConfig, path: Path) -> bool:
    """Refuses a run of other settings; returns whether those of the last stage have changed."""
    try:
        settings = json.loads(path.read_text())
        before = make_config(type(config), settings)
    except (OSError, ValueError) as error:
        raise RunFolderError(f"{path} is broken, so its run cannot be resumed: {error}") from error
    names = [name for name in settings if getattr(before, name) != getattr(config, name)]
    free = FREE if (path.parent / LAST_CHECKPOINT).exists() else FREE | LAST_STAGE
    differing = [
        f"{name} {getattr(before, name)!r} -> {getattr(config, name)!r}"
        for name in names
        if name not in free
    ]
    if differing:
        raise RunFolderError(f"{path.parent} was run with other settings: {', '.join(differing)}")
    return not LAST_STAGE.isdisjoint(names)
