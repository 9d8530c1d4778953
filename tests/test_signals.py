"""Signals: what the command line does with them, and that the library leaves them alone."""

import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time

import pytest
from tiny_runs import answer_signals

from fastnas import extras, signals

SEARCH = ["search", "--data=digits", "--space=S2", "--channels=2", "--layers=1", "--images=128",
          "--batch-size=16", "--epochs=500", "--train-epochs=0", "--compare-steps=0",
          "--threads=1", "--no-tensorboard", "--out=run"]  # fmt: skip
START = [sys.executable, "-m", "fastnas"]


def start(folder, *arguments, **options):
    return subprocess.Popen(
        [*START, *arguments], cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        text=True, **{"preexec_fn": answer_signals, **options},
    )  # fmt: skip


def wait_for(path, process):
    ends = time.monotonic() + 60
    while not path.exists():
        assert process.poll() is None and time.monotonic() < ends
        time.sleep(0.02)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_search_saves_its_step_and_says_how_to_go_on(tmp_path, number, code):
    process = start(tmp_path, *SEARCH)
    wait_for(tmp_path / "run/search.pt", process)
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == code
    said, line = error.splitlines()
    assert said == "fastnas: stopping after this step; once more stops at once"
    found = re.fullmatch(
        rf"fastnas: stopped by {number.name}; run/search.pt, after \d+ epochs and \d+ steps, is"
        r" saved; this goes on: (.*)",
        line,
    )
    assert found and shlex.split(found[1]) == ["fastnas", *SEARCH, "--resume"]
    assert not list(tmp_path.rglob("*.partial")) and not (tmp_path / "run/.owner").exists()


LONG_STEP = """
import time
from fastnas import extras, signals
with signals.handled():
    signals.started()
    with signals.deferred():
        print("ready", flush=True)
        time.sleep(60)
"""


def test_the_second_signal_ends_a_step_at_once():
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(
        [sys.executable, "-c", LONG_STEP], text=True, preexec_fn=answer_signals, **pipes
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    assert process.stderr.readline().startswith("fastnas: stopping after this step; once more")
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=20) == ("", "")
    assert process.returncode == -signal.SIGINT  # which shells call 130


def test_a_signal_in_an_import_is_not_taken_for_a_missing_package(monkeypatch):
    """Modules in C turn what a handler raises into an ImportError."""

    def interrupted(module):
        try:
            os.kill(os.getpid(), signal.SIGTERM)  # SIGINT is ignored in a background job
        except SystemExit as stopped:
            raise ImportError("initialization failed") from stopped

    monkeypatch.setattr(extras.importlib, "import_module", interrupted)
    with signals.handled():
        signals.started()
        with pytest.raises(signals.Stopped):
            extras.require("sklearn")


@pytest.mark.parametrize("after", [0.3, 0.8, 1.5])
def test_while_it_imports_there_is_no_traceback(tmp_path, after):
    process = start(tmp_path, *SEARCH)
    time.sleep(after)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 143 and "Traceback" not in error
    assert "fastnas: stopped" in error


def test_a_signal_that_is_ignored_stays_ignored(tmp_path):
    """As nohup and shells want it of what runs in the background."""
    ignoring = start(tmp_path, *SEARCH, preexec_fn=lambda: signal.signal(2, signal.SIG_IGN))
    wait_for(tmp_path / "run/search.pt", ignoring)
    ignoring.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert ignoring.poll() is None
    ignoring.send_signal(signal.SIGTERM)
    assert "fastnas: stopped by SIGTERM" in ignoring.communicate(timeout=60)[1]


def test_the_library_sets_no_handler():
    before = [signal.getsignal(number) for number in signals.CODES]
    with signals.deferred() as stop:
        assert [signal.getsignal(number) for number in signals.CODES] == before
        assert stop.number is None


def test_handlers_are_those_of_the_caller_again():
    before = [signal.getsignal(number) for number in signals.CODES]
    with signals.handled():
        signals.started()
        with signals.deferred() as stop:
            os.kill(os.getpid(), signal.SIGTERM)  # the loop goes on to the end of its step
            with pytest.raises(signals.Stopped) as caught:
                stop.check("half of it")
            stop.number = None
    assert (caught.value.code, caught.value.saved) == (143, "half of it")
    assert [signal.getsignal(number) for number in signals.CODES] == before


def test_another_thread_than_the_main_one_handles_none():
    done = []

    def work():
        with signals.handled():
            done.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [True]
