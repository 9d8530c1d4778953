"""Every public layout under torch.compile, and in two processes: too slow for the suite.

    python tests/dropin/all_layouts.py [NAME ...]

Exits with 1 where an accelerated network does not do as the untouched one.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import torch
from test_layouts import compiled_differs
from two_processes import differ

from fastnas.benchmarks.layouts import LAYOUTS


def main(names: list[str]) -> int:
    torch.set_num_threads(1)
    failures = 0
    for name in names or LAYOUTS:
        for mode in ("training", "evaluation"):
            start = time.perf_counter()
            try:
                found = compiled_differs(LAYOUTS[name], mode)
                found = found and compiled_differs(LAYOUTS[name], mode, both=True)
            except Exception as error:  # a crash is a difference
                found = [f"{type(error).__name__}: {str(error).splitlines()[0]}"]
            seconds = time.perf_counter() - start
            said = "; ".join(found[:3]) or "same"
            print(f"{name}, compiled, {mode}, {seconds:.0f} s: {said}", flush=True)
            failures += bool(found)
    with tempfile.TemporaryDirectory() as folder:
        found = differ(list(names or LAYOUTS), Path(folder))
    print(f"two processes: {'; '.join(found) or 'same'}")
    return 1 if failures or found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
