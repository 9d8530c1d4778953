"""A fixed part of the random mixed ops, the same on every machine."""

from __future__ import annotations

import pytest
from random_mixed_ops import wrong

COUNT = 40  # tests/dropin/random_mixed_ops.py makes as many as are asked for
PARTS = 4


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("part", range(PARTS))
def test_random_mixed_ops_are_as_by_their_own_forward(part):
    found = {seed: wrong(seed) for seed in range(part, COUNT, PARTS)}
    assert not any(found.values()), {seed: what for seed, what in found.items() if what}
