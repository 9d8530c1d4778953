"""A few of what `make stress` does hundreds of times."""

import damage
import disk_full
import interruptions
import pairs
import pytest

pytestmark = pytest.mark.slow


def test_damaged_checkpoints():
    assert damage.check(6, 0) == []


def test_interruptions():
    assert interruptions.check(3, 0) == []


def test_simultaneous_runs():
    assert pairs.check(1, 0) == []


@pytest.mark.skipif(not disk_full.is_possible(), reason="this user cannot mount a disk")
def test_a_full_disk():
    assert disk_full.inside(["--count=1"]) == 0
