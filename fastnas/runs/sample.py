"""Draws cells from the distribution in a search's report."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fastnas.bounds import whole
from fastnas.search.config import ConfigError
from fastnas.search.fields import SEEDS
from fastnas.spaces import dump, strict_json
from fastnas.spaces.distribution import DartsSlots, NB201Slots, OperationDistribution
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
        if set(distribution.p) == {"normal"}:
            slots = 6 if length is None else length
            cells: NB201Slots | DartsSlots = NB201Slots(distribution.ops, length=slots)
        else:
            cells = DartsSlots(distribution.ops, 8 if length is None else length)
        rng = np.random.default_rng(seed)
        drawn = [distribution.sample(cells, rng) for _ in range(count)]
        kind = "nb201" if isinstance(cells, NB201Slots) else "json"
        return [" ".join(dump(cell, kind).split()) for cell in drawn]
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{report} gives no cells: {error}") from error
