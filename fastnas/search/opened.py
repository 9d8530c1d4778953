"""Opens the search that a folder holds, at the state of its checkpoint."""

from __future__ import annotations

from pathlib import Path

from fastnas.search.config import ConfigError, SearchConfig, make_config, read_settings
from fastnas.search.gradient_run import CHECKPOINT
from fastnas.search.run_folder import CONFIG
from fastnas.search.searcher import Searcher


class NoSearchError(ConfigError):
    """Says in one line why a folder holds no search that can be opened."""


def open_search(folder: Path, device: str | None = None) -> Searcher:
    """Builds the search of a folder and goes to its checkpoint; nothing in the folder changes.

    Args:
        device: in place of the one that it ran on.

    Raises:
        NoSearchError: the folder holds no search, or one of other settings or data.
        CheckpointError: its checkpoint is not there, broken, or does not fit.
        ConfigError, DataError, BackendError: as `Searcher`.
    """
    try:
        settings = read_settings(folder / CONFIG)
        config = make_config(
            SearchConfig, settings | ({} if device is None else {"device": device})
        )
    except ConfigError as error:
        raise NoSearchError(f"{folder} holds no search for cells: {error}") from error
    searcher = Searcher(config)
    path = folder / CHECKPOINT
    state = searcher.read(path)
    differing = searcher.differences(state)
    # Its supernet can be looked at with any number of threads, and on another device.
    for name in ("threads", "device"):
        differing.pop(name, None)
    if differing:
        raise NoSearchError(f"{path} is of another run: {', '.join(differing.values())}")
    searcher.restore(state, path)
    return searcher
