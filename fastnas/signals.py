"""Says what Ctrl-C and SIGTERM do: a run saves its step first, everything else just ends.

Only the command line asks for this (`handled`); whoever uses the library keeps Python's handlers.
It imports nothing of fastnas, so that it is there before torch is imported, which takes seconds.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}
"""Signals, and the exit codes by which shells know them."""


class Stopped(SystemExit):
    """Ends the process because a signal asks for it; `code` is its exit code.

    Of `SystemExit`, not of `KeyboardInterrupt`: optuna counts an evaluation that a
    KeyboardInterrupt ends as one that has failed, and click turns it into an error of its own.

    Args:
        number: of the signal.
        saved: what the run has saved, and where; None: there was nothing to save.
    """

    def __init__(self, number: int, saved: str | None = None) -> None:
        super().__init__(CODES[signal.Signals(number)])
        self.number = number
        self.saved = saved


class Stop:
    """Tells a loop whether a signal has asked it to stop, and by which."""

    number: int | None = None

    def check(self, saved: str | None = None) -> None:
        """Raises `Stopped`, with what is saved by now, where a signal has asked for it."""
        if self.number is not None:
            raise Stopped(self.number, saved)


_loops: list[Stop] = []
"""The loops under way that stop by themselves, the innermost last."""
_is_starting = False


@contextmanager
def handled() -> Iterator[None]:
    """Lets the first signal stop the process as `_stop` says, and a second one end it at once.

    Outside the main thread nothing changes, as only there Python lets a handler be set. A signal
    that is ignored stays so: the caller (nohup, a shell's background job) has asked for it.
    """
    global _is_starting
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before: dict[signal.Signals, Any] = {s: signal.getsignal(s) for s in CODES}
    # None stands for a handler that was not set from Python, which could not be put back.
    before = {s: old for s, old in before.items() if old not in (signal.SIG_IGN, None)}
    for number in before:
        signal.signal(number, _stop)
    _is_starting = True
    try:
        yield
    finally:
        _is_starting = False
        for number, handler in before.items():
            signal.signal(number, handler)


def started() -> None:
    """Says that all is imported: from here on signals raise `Stopped`."""
    global _is_starting
    _is_starting = False


@contextmanager
def deferred() -> Iterator[Stop]:
    """Lets a loop stop by itself: it looks at its `Stop` after each step, and saves before it does.

    Raises:
        Stopped: at the end, where the loop has ended before it looked again.
    """
    stop = Stop()
    # A search inside of a study is a loop in a loop: both hear of the signal, and the inner one
    # ends first.
    _loops.append(stop)
    try:
        yield stop
    finally:
        _loops.remove(stop)
    stop.check()


def _stop(number: int, frame: FrameType | None) -> None:
    for each in CODES:  # the next signal ends the process, also in a call that takes minutes
        if signal.getsignal(each) is _stop:
            signal.signal(each, signal.SIG_DFL)
    if _is_starting:
        # Raised in the middle of an import, it may become an error of that module.
        _say("fastnas: stopped\n")
        # Nothing is open yet that would have to be written; `sys.exit` would only raise in the
        # import.
        os._exit(CODES[signal.Signals(number)])
    if not _loops:
        raise Stopped(number)
    for loop in _loops:
        loop.number = number
    if os.environ.get("WORLD_SIZE", "1") == "1":  # of several processes each would say it
        _say("fastnas: stopping after this step; once more stops at once\n")


def _say(line: str) -> None:
    """Writes to stderr, past Python's buffers, which the interrupted code may be writing to."""
    with suppress(OSError):  # closed
        os.write(2, line.encode())
