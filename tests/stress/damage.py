"""Damages a checkpoint at a random place: resuming is one clear error, or the undamaged run."""

from __future__ import annotations

import random
import shutil
import tempfile
from pathlib import Path

from rich.console import Console
from tiny_runs import SETTINGS, difference, main, results

from fastnas.runs.search import run_search
from fastnas.search.checkpoint import CheckpointError
from fastnas.search.config import SearchConfig, make_config

SECTOR = 512


def damaged(content: bytes, draw: random.Random) -> bytes:
    """With a bit turned, a byte replaced, a sector zeroed, or the end cut off."""
    found, at = bytearray(content), draw.randrange(len(content))
    kind = draw.choice(["bit", "byte", "sector", "end"])
    if kind == "bit":
        found[at] ^= 1 << draw.randrange(8)
    elif kind == "byte":
        found[at] = draw.randrange(256)
    elif kind == "sector":
        start = at - at % SECTOR
        found[start : start + SECTOR] = bytes(len(found[start : start + SECTOR]))
    else:
        del found[at:]
    return bytes(found)


def check(count: int, seed: int) -> list[str]:
    """The faults of so many damages."""
    draw, faults, quiet = random.Random(seed), [], Console(quiet=True)
    settings = {**SETTINGS, "tensorboard": False}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        config = make_config(SearchConfig, {**settings, "out": str(out)})
        run_search(config, console=quiet)
        expected = results(out)
        for i in range(count):
            again = Path(folder) / f"again{i}"
            shutil.copytree(out, again)
            name = draw.choice(["search.pt", "train.pt"])
            whole = (again / name).read_bytes()
            bad = damaged(whole, draw)
            (again / name).write_bytes(bad)
            try:
                changed = make_config(SearchConfig, {**settings, "out": str(again)})
                run_search(changed, resume=True, console=quiet)
                where = difference(results(again), expected)
                if where is not None or bad != whole:
                    faults.append(f"damage {i} of {name}: resumed, differs at {where}")
            except CheckpointError as error:
                if "\n" in str(error) or (again / name).read_bytes() != bad:
                    faults.append(f"damage {i} of {name}: {error!r}")
            except Exception as error:  # what this looks for
                faults.append(f"damage {i} of {name}: {error!r}")
            shutil.rmtree(again)
    return faults


if __name__ == "__main__":
    main(__doc__, 200, check)
