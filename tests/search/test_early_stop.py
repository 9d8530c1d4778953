"""RobustDARTS' early stop: series worked out by hand, and its own 67 searches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fastnas.search.config import ConfigError, SearchConfig, make_config
from fastnas.search.early_stop import EarlyStop, early_stop, first_decision

SERIES = Path(__file__).resolve().parents[3] / "shared" / "data" / "robustdarts_eigenvalues.json"
"""Dominant eigenvalues computed from the Hessians in automl/RobustDARTS (Apache-2.0)."""

ABSENT = "RobustDARTS' eigenvalues are not beside this checkout"
MET = {
    ("s1", "0.0003"): [22, 22, 30], ("s1", "0.0009"): [22, 32, 32], ("s1", "0.0027"): [42, 40, 34],
    ("s1", "0.0081"): [None, None, 48], ("s1", "0.0243"): [None, None, None],
    ("s3", "0.0003"): [34, 30, 24], ("s3", "0.0009"): [48, 32, 36],
    ("s3", "0.0027"): [46, 46, 34, 22], ("s3", "0.0081"): [None, None, None],
    ("s3", "0.0243"): [None, None, None],
}  # fmt: skip
"""First epoch of a decision by space and weight decay, of each seed."""


def decided(series: dict[str, Any]) -> EarlyStop | None:
    """Without epoch 49, the last one, after which the rule is not asked."""
    return early_stop(series["epochs"][:-1], series["eigenvalue"][:-1])


@pytest.mark.skipif(not SERIES.exists(), reason=ABSENT)
def test_all_stored_searches_stop_where_they_should() -> None:
    every = json.loads(SERIES.read_text())
    assert len(every) == 67
    found: dict[tuple[str, str], list[int | None]] = {}
    for series in every:
        stop = decided(series)
        expected = series["early_stop"]
        assert (stop and {"decided": stop.decided, "rollback": stop.rollback}) == expected
        if series["drop_path"] == 0:
            key = series["space"], str(series["l2"])
            found.setdefault(key, []).append(stop and stop.decided)
    assert {key: sorted(found[key], key=str) for key in MET} == {
        key: sorted(epochs, key=str) for key, epochs in MET.items()
    }


def every_second(values: list[float]) -> EarlyStop | None:
    return early_stop([2 * i for i in range(len(values))], values)


def test_by_hand() -> None:
    """Twelve values: the mean of the last five is that of epoch 18, compared with epoch 10's."""
    flat = [1.0] * 7
    assert every_second([*flat, 1.0, 1.5, 1.5, 1.5, 1.5]) == EarlyStop(22, 10, pytest.approx(1.4))
    # Exactly 1.3 does not suffice: 6.5 / 5.
    assert every_second([*flat, 1.0, 1.375, 1.375, 1.375, 1.375]) is None
    assert every_second([*flat, 1.0, 1.375, 1.375, 1.375, 1.376]) is not None
    # A value that both windows have does not count twice.
    assert every_second([*flat, 9.0, 1.0, 1.0, 1.0, 1.0]) is None


def test_not_before_epoch_ten() -> None:
    """Eleven values have risen as far, but their earlier centre is epoch 8."""
    assert every_second([1.0] * 6 + [5.0] * 5) is None
    assert every_second([1.0] * 6 + [5.0] * 6) == EarlyStop(22, 10, pytest.approx(25 / 13))


def test_the_first_decision_stands() -> None:
    values = [1.0] * 8 + [1.5] * 4 + [9.0] * 5
    assert every_second(values) == every_second(values[:12])


def test_a_mean_that_is_not_positive_stops_nothing() -> None:
    assert every_second([-1.0] * 7 + [-2.0] * 5) is None
    assert every_second([0.0] * 7 + [1.0] * 1 + [1.0] * 4) == EarlyStop(22, 10, pytest.approx(5.0))
    assert every_second([0.0] * 8 + [1.0] * 4) is None


@pytest.mark.parametrize(("every", "first"), [(1, 16), (2, 22), (3, 30), (5, 40), (10, 80)])
def test_the_first_epoch_that_can_decide(every: int, first: int) -> None:
    assert first_decision(every) == first
    epochs = list(range(0, first + 1, every))
    rising = [2.0**i for i in range(len(epochs))]
    stop = early_stop(epochs, rising)
    assert stop is not None and stop.decided == first and stop.rollback == first - 6 * every
    assert early_stop(epochs[:-1], rising[:-1]) is None


def test_other_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="values has 1 entries, epochs 2"):
        early_stop([0, 2], [1.0])


@pytest.mark.parametrize(("settings", "message"), [
    ({"early_stop": "eigenvalue"}, "early_stop is 'eigenvalue', but eigenvalue_every is 0"),
    ({"eigenvalue_images": 8}, "eigenvalue_images is 8, but eigenvalue_every is 0"),
    ({"early_stop": "collapse"}, "early_stop is 'collapse'; allowed: none, eigenvalue"),
    ({"eigenvalue_every": 2, "early_stop": "eigenvalue", "epochs": 23}, "fewer than 24 epochs"),
    ({"eigenvalue_every": 1, "early_stop": "eigenvalue", "epochs": 17}, "fewer than 18 epochs"),
    ({"eigenvalue_every": 2, "method": "rome"}, "method rome samples paths"),
    ({"eigenvalue_every": 2, "method": "anasod-gdas"}, "allowed for anasod-darts, "),
    ({"eigenvalue_every": -1}, "eigenvalue_every is -1"),
    ({"eigenvalue_every": 1, "eigenvalue_images": 0}, "eigenvalue_images is 0"),
])  # fmt: skip
def test_settings_without_an_effect_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_config(SearchConfig, settings)


def test_settings_with_one_are_accepted() -> None:
    make_config(SearchConfig, {"eigenvalue_every": 2, "early_stop": "eigenvalue", "epochs": 24})
    make_config(SearchConfig, {"eigenvalue_every": 60, "method": "anasod-darts"})
