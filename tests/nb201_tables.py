"""Tables of NAS-Bench-201 made up of a formula, and where the measured one lies."""

import csv
import functools
from itertools import product
from pathlib import Path

import numpy as np

from fastnas.spaces import to_nb201
from fastnas.spaces.nb201 import NB201Slots

MEASURED = Path(__file__).parents[2] / "shared" / "data" / "nb201_table.csv"
SEEN, REPORTED = "c10_valid_12ep", "c10_test_200ep"
VALUES = dict(zip(NB201Slots().ops, (-12.0, 0.5, 3.0, 4.0, -1.0)))


def rows():
    """The rows of a table, each a copy that may be changed."""
    return [dict(row) for row in _rows()]


@functools.cache
def _rows():
    """Most of an accuracy depends on how often an operation is there, a little on where."""
    layout, rng, made = NB201Slots(), np.random.default_rng(0), []
    for index, ops in enumerate(product(layout.ops, repeat=layout.length)):
        ordered = sum(VALUES[op] for op in ops) + 0.3 * VALUES[ops[0]]
        noise = rng.normal(0, 0.4)
        made.append(
            {
                "index": index,
                "arch_str": to_nb201(layout.genotype({"normal": ops})),
                SEEN: f"{min(99.0, max(1.0, 60 + ordered + noise)):.4f}",
                REPORTED: f"{min(99.0, max(1.0, 65 + ordered)):.4f}",
            }
        )
    return made


def write(path, lines=None):
    lines = rows() if lines is None else lines
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)
    return path
