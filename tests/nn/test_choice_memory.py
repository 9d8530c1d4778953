"""What a Choice holds for backward, and at the peak of a step, beside its largest candidate."""

from __future__ import annotations

import pytest
import torch

from fastnas.benchmarks.choice import largest_alone, subject
from fastnas.benchmarks.choice_families import FAMILIES

COUNT, SCALE = 5, 0.1


@pytest.mark.parametrize("family", FAMILIES)
def test_the_memory_of_one_candidate(family: str, one_thread: None) -> None:
    def weighed(provider: str) -> tuple[int, int]:
        return subject(FAMILIES[family], COUNT, provider, torch.float32, SCALE).weighed()

    saved_alone, peak_alone = largest_alone(
        subject(FAMILIES[family], COUNT, "eager", torch.float32, SCALE)
    )
    saved, peak = weighed("recompute")
    assert saved <= 1.2 * saved_alone and peak <= 1.2 * peak_alone
    saved, peak = weighed("minimal")
    assert saved <= 0.2 * saved_alone and peak <= 1.2 * peak_alone
    # Of the whole mixture in one checkpoint, backward holds all candidates at once.
    for provider in ("eager", "checkpoint"):
        assert weighed(provider)[1] > 1.4 * peak_alone


def test_backward_frees_each_candidate_before_it_runs_another() -> None:
    """Of 3 and of 12 alike candidates the peak is the same, but for what is there in any case."""
    peaks = [
        subject(FAMILIES["transformer"], count, "minimal", torch.float32, SCALE).weighed()[1]
        for count in (3, 12)
    ]
    # The twelfth has four times the hidden layer of the third.
    assert peaks[1] < 2 * peaks[0]
