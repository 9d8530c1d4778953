"""The picture of a landscape: axes, colours, what is not finite."""

from __future__ import annotations

import numpy as np
import pytest

from fastnas.report.landscape_drawing import draw_landscape, landscape_figure

OFFSETS = [-1.0, 0.0, 2.0]
LOSS = np.arange(9.0).reshape(3, 3)


def panels(figure):
    return [axes for axes in figure.axes if axes.get_title()]


def test_the_first_direction_is_drawn_to_the_right():
    loss, accuracy = panels(landscape_figure(OFFSETS, LOSS, -LOSS))
    assert (loss.get_title(), accuracy.get_title()) == ("loss", "accuracy")
    for axes, sign in ((loss, 1), (accuracy, -1)):
        values = axes.collections[0].get_array()
        # Rows of the mesh are upwards: LOSS[2, 0] is at the right end of the lowest row.
        assert np.array_equal(np.asarray(values).reshape(3, 3), sign * LOSS.T)
        assert axes.get_xlabel() == "first direction"
        [ring] = axes.lines
        assert ring.get_xydata().tolist() == [[0.0, 0.0]]


def test_what_is_not_finite_is_white_and_a_plain_has_no_lines():
    broken = LOSS.copy()
    broken[0, 0] = np.nan
    broken[1, 1] = np.inf
    loss, accuracy = panels(landscape_figure(OFFSETS, broken, np.zeros((3, 3))))
    assert np.ma.count_masked(loss.collections[0].get_array()) == 2
    assert len(loss.collections) == 2 and len(accuracy.collections) == 1
    landscape_figure(OFFSETS, np.full((3, 3), np.nan), LOSS)


def test_equal_landscapes_give_equal_files(tmp_path):
    for suffix in ("png", "svg"):
        paths = [tmp_path / f"{name}.{suffix}" for name in "ab"]
        for path in paths:
            draw_landscape(OFFSETS, LOSS, LOSS, path)
        assert paths[0].read_bytes() == paths[1].read_bytes()


@pytest.mark.parametrize(("offsets", "loss", "message"), [
    ([0.0], LOSS, "offsets are no two or more finite numbers that increase"),
    ([0.0, 1.0, 1.0], LOSS, "offsets are no two"),
    ([0.0, 1.0], LOSS, r"loss has shape \[3, 3\]; numbers of shape \[2, 2\] are needed"),
    (OFFSETS, np.array([["a"] * 3] * 3), r"loss has shape \[3, 3\]; numbers"),
])  # fmt: skip
def test_other_numbers_are_refused(offsets, loss, message):
    with pytest.raises(ValueError, match=message):
        landscape_figure(offsets, loss, LOSS)
