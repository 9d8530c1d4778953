"""Counts calls of the fused ops."""

from __future__ import annotations

from collections import Counter

import pytest

from fastnas.nn import forwards


@pytest.fixture
def calls(monkeypatch):
    """How often each fused op was called; `calls.clear()` forgets the check of `accelerate`."""
    counts = Counter()

    def counted(name, function):
        def call(*args, **kwargs):
            counts[name] += 1
            return function(*args, **kwargs)

        return call

    for name in ("run_cell", "run_edge", "mixed_sum", "mixed_norm_sum"):
        monkeypatch.setattr(forwards, name, counted(name, getattr(forwards, name)))
    return counts
