"""Guards the folder of a run: who may write there, and what a resumed run must agree with."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from fastnas.files import is_partial, write_text
from fastnas.processes import here
from fastnas.search.config import FolderConfig, config_text, make_config
from fastnas.search.identity import FREE, LAST_STAGE, differences
from fastnas.search.resumable import ResumableRun
from fastnas.text_file import file_path

CONFIG = "config.json"
LOCK = ".lock"
OWNER = ".owner"
LAST_CHECKPOINT = "train.pt"


class RunFolderError(ValueError):
    """Says in one line why the folder of a run cannot be used."""


@contextmanager
def claimed_folder(
    config: FolderConfig, resume: bool, run: ResumableRun | None = None
) -> Iterator[Path]:
    """Yields the run's folder, made if need be, with its config, locked while the run lives.

    Args:
        resume: go on with the run that it holds, if any.
        run: goes back to the checkpoint that the folder holds, where there is one.

    Raises:
        RunFolderError: it holds a run and `resume` is off, or one of other settings, threads or
            data, all of which are named; or it is no folder, cannot be written, or another run
            that lives has it. Nothing in it has been touched then.
        CheckpointError: as `ResumableRun.read`.
    """
    out, processes = file_path(config.out), here()
    if not processes.is_first:
        # The first one has the folder, for all of them, and says what it has found there.
        if processes.first_says(None) and run is not None:
            run.restore(run.read(out / run.checkpoint), out / run.checkpoint)
        yield out
        return
    with _locked(out):
        if os.path.lexists(out / CONFIG):  # pathlib raises for a name that is too long
            if not resume:
                raise RunFolderError(
                    f"{out} holds a run; continue it with --resume, or name another folder with"
                    " --out"
                )
            is_restored = _go_on(config, out, run)
        else:
            _check_empty(out)
            is_restored = False
            # Settings that change no result may differ from those of the last time.
            _keep(config, out)
        processes.first_says(is_restored)
        yield out


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Locks the folder; the system takes it back when the process dies, however it does."""
    try:
        # This comes before the lock file is made: a folder that is refused stays as it was.
        if not os.path.lexists(out / CONFIG):
            # It is asked again under the lock, as another process may have begun a run in between.
            _check_empty(out)
        out.mkdir(parents=True, exist_ok=True)
        lock = FileLock(out / LOCK, timeout=0)
        lock.acquire()
    except Timeout:
        raise RunFolderError(
            f"{out} is in use by another run{_owner(out)}; wait for its end, or name another folder"
            " with --out"
        ) from None
    except OSError as error:
        raise RunFolderError(f"{out} cannot hold a run: {error.strerror}") from error
    except NotImplementedError as error:  # older versions of filelock have no other way
        raise RunFolderError(f"{out} cannot hold a run: its disk has no locks") from error
    try:
        try:
            # A process that was killed while it wrote has left them. Nobody writes them now: the
            # lock is ours.
            for left in filter(is_partial, out.iterdir()):
                left.unlink()
            # This text is for the message to others only. The lock decides; the text of a process
            # that was killed stays behind and means nothing.
            (out / OWNER).write_text(f"process {os.getpid()} on {socket.gethostname()}")
        except OSError as error:
            raise RunFolderError(f"{out} cannot hold a run: {error.strerror}") from error
        yield
    finally:
        with suppress(OSError):  # the folder has vanished
            (out / OWNER).unlink()
        lock.release()


def _owner(out: Path) -> str:
    """Tells which process has the folder, as far as it has said so."""
    try:
        text = (out / OWNER).read_text()
    except (OSError, ValueError):
        return ""
    return f", {text}" if text else ""


def _go_on(config: FolderConfig, out: Path, run: ResumableRun | None) -> bool:
    """Compares the run in the folder with this one, and goes back to its checkpoint, if any."""
    # Everything is compared before anything is restored or written, so that a run which is refused
    # finds its folder untouched.
    differing = _differing_settings(config, out)
    checkpoint = None if run is None else out / run.checkpoint
    is_restored = checkpoint is not None and checkpoint.exists()
    if run is None or checkpoint is None or not is_restored:
        _refuse(out, differing)
    else:
        state = run.read(checkpoint)
        _refuse(out, differing | run.differences(state))
        run.restore(state, checkpoint)
    _keep(config, out)
    return is_restored


def _refuse(out: Path, differing: dict[str, str]) -> None:
    if differing:
        raise RunFolderError(f"{out} holds another run: {', '.join(differing.values())}")


def _keep(config: FolderConfig, out: Path) -> None:
    """Writes config.json, where it does not say that already."""
    path, text = out / CONFIG, config_text(config)
    try:
        if not path.exists() or path.read_text() != text:
            write_text(path, text)
    except OSError as error:
        raise RunFolderError(f"{out} cannot hold a run: {error.strerror}") from error


def _check_empty(out: Path) -> None:
    ours = {LOCK, OWNER}
    if out.exists() and any(not is_partial(p) and p.name not in ours for p in out.iterdir()):
        raise RunFolderError(f"{out} is not empty and holds no run; name another with --out")


def _differing_settings(config: FolderConfig, out: Path) -> dict[str, str]:
    """Compares with config.json, which is there before the first checkpoint is."""
    path = out / CONFIG
    try:
        settings = json.loads(path.read_text())
        before = make_config(type(config), settings)
    except (OSError, ValueError) as error:
        raise RunFolderError(f"{path} is broken, so its run cannot be resumed: {error}") from error
    free = FREE if (out / LAST_CHECKPOINT).exists() else FREE | LAST_STAGE
    return differences(before.settings(), config.settings(), free)
