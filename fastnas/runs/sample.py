"""Draws cells from the distribution in a search's report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from fastnas.bounds import whole
from fastnas.search.config import ConfigError
from fastnas.search.fields import SEEDS
from fastnas.spaces import LAYOUTS, Layout, strict_json
from fastnas.spaces.distribution import OperationDistribution
from fastnas.text_file import read_text

COUNTS = whole(1, 10**5)


def sampled_cells(report: Path, length: int | None, count: int, seed: int) -> list[str]:
    """Returns genotypes as one line of JSON each (of NAS-Bench-201 as its string).

    Args:
        length: operations of a cell; None: as the space of the search has them.

    Raises:
        ConfigError: the report has no distribution, or there are no such cells.
    """
    try:
        COUNTS.check("count", count)
        SEEDS.check("seed", seed)
        shares = strict_json.loads(read_text(report))["distribution"]
        if shares is None:
            raise ValueError("its search was not for a distribution")
        distribution = OperationDistribution.from_dict(shares)
        layout = _layout(distribution)
        slots = layout.slots(distribution.ops, length)
        rng = np.random.default_rng(seed)
        drawn = [distribution.sample(slots, rng) for _ in range(count)]
        return [" ".join(layout.line(cell).split()) for cell in drawn]
    # A report made by hand, or of another program, may lack any key and hold any type.
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{report} gives no cells: {error}") from error


def _layout(distribution: OperationDistribution) -> Layout[Any]:
    """Returns the layout whose cells are of these types and can have these operations."""
    alike = [layout for layout in LAYOUTS.values() if set(layout.cell_types) == set(distribution.p)]
    # A space of an open layout may have operations that fastnas does not know.
    found = (
        layout
        for layout in alike
        if not layout.is_closed or set(distribution.ops) <= set(layout.operations)
    )
    return next(found, next(iter(alike), LAYOUTS["darts"]))
