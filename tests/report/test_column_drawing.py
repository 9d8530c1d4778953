"""The picture of a column says of each block what it is."""

from __future__ import annotations

import pytest
from matplotlib.patches import Rectangle

from fastnas.report.column_drawing import column_figure, draw_column
from fastnas.spaces import MOBILE_ARCHITECTURES, MobileSpace

SMALL = MobileSpace(stages=((8, 2, 2), (16, 1, 1)), stem=8, first=8, head=24)


def test_each_block_is_a_box_of_its_kernel_and_expansion() -> None:
    figure = column_figure([(3, 6), "skip", (7, 3)], space=SMALL, title="found $x")
    (axes,) = figure.axes
    boxes = [patch for patch in axes.patches if isinstance(patch, Rectangle)]
    stem, first, last, head = boxes  # the skip is none
    assert first.get_width() == 2 * last.get_width() == stem.get_width() == head.get_width()
    assert len({box.get_facecolor() for box in boxes}) == 3
    tops = [box.get_y() for box in boxes]
    assert tops == sorted(tops, reverse=True)
    texts = [text.get_text() for text in axes.texts]
    assert texts == ["stem", "8", "3x3, 6", "8, stride 2", "skip", "7x7, 3", "16", "head", "24"]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["3x3", "5x5", "7x7"]


@pytest.mark.parametrize("name", MOBILE_ARCHITECTURES)
@pytest.mark.parametrize("suffix", [".svg", ".png"])
def test_published_architectures_are_drawn(name: str, suffix: str, tmp_path) -> None:
    paths = [tmp_path / f"{i}{suffix}" for i in range(2)]
    for path in paths:
        draw_column(MOBILE_ARCHITECTURES[name], path, title=name)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert paths[0].stat().st_size > 5000


def test_what_is_no_architecture_is_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match="architecture has 1 layers; the space has 3"):
        column_figure(["skip"], space=SMALL)
    with pytest.raises(ValueError, match=r"expected \.png or \.svg"):
        draw_column(MOBILE_ARCHITECTURES["FairNAS-A"], tmp_path / "column.pdf")
