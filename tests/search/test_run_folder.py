"""A run's folder is one run's at a time."""

import multiprocessing
import os
import signal

import pytest

from fastnas.search.config import SearchConfig, make_config
from fastnas.search.run_folder import RunFolderError, claimed_folder


def _config(out):
    return make_config(SearchConfig, {"data": "digits", "out": str(out)})


def _hold(out, resume, held):
    with claimed_folder(_config(out), resume=resume):
        held.send(True)
        signal.pause()


@pytest.mark.parametrize("resume", [False, True])
def test_a_living_run_refuses_another_and_a_killed_one_does_not(tmp_path, resume):
    out = tmp_path / "run"
    if resume:
        with claimed_folder(_config(out), resume=False):
            pass
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    process = context.Process(target=_hold, args=(out, resume, there))
    process.start()
    assert here.poll(30)
    with (
        pytest.raises(RunFolderError, match=f"another run, process {process.pid} on "),
        claimed_folder(_config(out), resume=True),
    ):
        pass
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    with claimed_folder(_config(out), resume=True) as folder:
        assert folder == out


def test_the_lock_goes_with_a_run_that_fails(tmp_path):
    for resume in (False, True):
        with (
            pytest.raises(ValueError, match="mine"),
            claimed_folder(_config(tmp_path / "run"), resume=resume),
        ):
            raise ValueError("mine")


def test_one_process_has_a_folder_once(tmp_path):
    """Programs that call the library are protected as the command line is."""
    with (
        claimed_folder(_config(tmp_path / "run"), resume=False),
        pytest.raises(RunFolderError, match=f"another run, process {os.getpid()} on "),
        claimed_folder(_config(tmp_path / "run"), resume=True),
    ):
        pass


def test_a_disk_without_locks_is_one_line(tmp_path, monkeypatch):
    def acquire(self):
        raise NotImplementedError("use SoftFileLock instead")

    monkeypatch.setattr("fastnas.search.run_folder.FileLock.acquire", acquire)
    with (
        pytest.raises(RunFolderError, match="cannot hold a run: its disk has no locks"),
        claimed_folder(_config(tmp_path / "run"), resume=False),
    ):
        pass
