"""Pictures: everything drawn, nothing hidden, and the right file written."""

from __future__ import annotations

from collections import Counter
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch
from matplotlib.text import Text
from numpy.typing import NDArray
from PIL import Image

from fastnas.report.cell_drawing import draw_genotype, genotype_figure
from fastnas.report.cell_layout import NODE_RADIUS, arrange, curve
from fastnas.report.curves import draw_history, history_figure
from fastnas.report.figures import save_figure
from fastnas.report.simplex import JITTER, draw_simplex, simplex_figure
from fastnas.spaces import CELL_TYPES, Genotype, NB201Genotype, from_nb201

S3, S5, D3, SKIP, AVG, MAX = (
    "sep_conv_3x3",
    "sep_conv_5x5",
    "dil_conv_3x3",
    "skip_connect",
    "avg_pool_3x3",
    "max_pool_3x3",
)

DARTS_V2 = Genotype(
    normal=((S3, 0), (S3, 1), (S3, 0), (S3, 1), (S3, 1), (SKIP, 0), (SKIP, 0), (D3, 2)),
    normal_concat=(2, 3, 4, 5),
    reduce=((MAX, 0), (MAX, 1), (SKIP, 2), (MAX, 1), (MAX, 0), (SKIP, 2), (SKIP, 2), (MAX, 1)),
    reduce_concat=(2, 3, 4, 5),
)
# Both edges of nodes 1, 3 and 4 come from one node; twice with the same operation.
PARALLEL = Genotype(
    normal=(
        *((S5, 1), (S3, 0)),
        *((S5, 0), (S3, 0)),
        *((AVG, 1), (SKIP, 0)),
        *((AVG, 0), (AVG, 0)),
        *((S3, 1), (SKIP, 1)),
    ),
    normal_concat=(2, 3, 4, 5, 6),
    reduce=((S3, 0), (S3, 0), (S3, 1), (S3, 1)),
    reduce_concat=(2, 3),
)
# Node 1 has no edges, so its state does not exist; node 0 has many.
UNEVEN = Genotype(
    normal=(
        ((S3, 0), (D3, 0), (S5, 0), (MAX, 0), (SKIP, 1), (S3, 1), (D3, 1)),
        (),
        ((SKIP, 3), (S3, 0)),
        ((SKIP, 3),),
    ),
    normal_concat=(2, 3, 4, 5),
    reduce=(((S3, 0),), ((S3, 1),)),
    reduce_concat=(3,),
)
CROWDED = Genotype(
    normal=tuple(
        tuple((op, source) for source in range(node) for op in (S3, SKIP)) for node in range(2, 6)
    ),
    normal_concat=(2, 3, 4, 5),
    reduce=((("conv_7x1_1x7", 0), ("my_operation", 1)),),
    reduce_concat=(2,),
)
NB201 = from_nb201(
    "|nor_conv_3x3~0|+|nor_conv_3x3~0|none~1|+|skip_connect~0|nor_conv_1x1~1|avg_pool_3x3~2|"
)
GENOTYPES = {
    "darts": DARTS_V2,
    "parallel": PARALLEL,
    "uneven": UNEVEN,
    "crowded": CROWDED,
    "nb201": NB201,
}
each_genotype = pytest.mark.parametrize("genotype", GENOTYPES.values(), ids=GENOTYPES)


@cache
def rendered(genotype: Genotype | NB201Genotype) -> Figure:
    figure = genotype_figure(genotype, title="a title")
    FigureCanvasAgg(figure).draw()
    return figure


def operations(genotype: Genotype | NB201Genotype) -> list[Counter[str]]:
    if isinstance(genotype, NB201Genotype):
        return [Counter(op for node in genotype.nodes for op, _ in node)]
    return [Counter(op for op, _, _ in genotype.edges(cell)) for cell in CELL_TYPES]


def split_texts(axes: Axes) -> tuple[list[Text], list[Text]]:
    """The labels of the edges and of the nodes."""
    texts = [text for text in axes.texts if text.get_text()]
    labels = [text for text in texts if text.get_bbox_patch() is not None]
    return labels, [text for text in texts if text.get_bbox_patch() is None]


def arrows(axes: Axes) -> list[FancyArrowPatch]:
    return [patch for patch in axes.patches if isinstance(patch, FancyArrowPatch)]


def centre(text: Text) -> NDArray[np.float64]:
    box = text.get_window_extent()
    return np.array([(box.x0 + box.x1) / 2, (box.y0 + box.y1) / 2])


@each_genotype
def test_each_edge_has_an_arrow_and_a_label(genotype: Genotype | NB201Genotype) -> None:
    figure = rendered(genotype)
    assert figure.get_suptitle() == "a title"
    expected = operations(genotype)
    assert len(figure.axes) == len(expected)
    for axes, ops in zip(figure.axes, expected, strict=True):
        labels, names = split_texts(axes)
        assert Counter(label.get_text() for label in labels) == ops
        assert len(axes.collections[0].get_offsets()) == len(names)
        outputs = [arrow for arrow in arrows(axes) if arrow.get_linewidth() == 1]
        assert len(arrows(axes)) - len(outputs) == ops.total()
    if isinstance(genotype, Genotype):
        for axes, cell in zip(figure.axes, CELL_TYPES, strict=True):
            live = set(genotype.concat(cell)) & set(genotype.live_nodes(cell))
            outputs = [arrow for arrow in arrows(axes) if arrow.get_linewidth() == 1]
            assert len(outputs) == len(live)


@each_genotype
def test_nothing_covers_a_label(genotype: Genotype | NB201Genotype) -> None:
    figure = rendered(genotype)
    for axes in figure.axes:
        labels, names = split_texts(axes)
        boxes = [label.get_window_extent() for label in labels]
        for k, box in enumerate(boxes):
            assert not any(box.overlaps(other) for other in boxes[:k]), labels[k].get_text()
            for name in names:
                x, y = centre(name)
                gap = np.hypot(max(box.x0 - x, 0, x - box.x1), max(box.y0 - y, 0, y - box.y1))
                assert gap > 0.98 * NODE_RADIUS * figure.dpi, labels[k].get_text()
            assert box.x0 > 0
            assert box.y0 > 0
            assert box.x1 < figure.bbox.width
            assert box.y1 < figure.bbox.height


@each_genotype
def test_no_two_edges_lie_on_each_other(genotype: Genotype | NB201Genotype) -> None:
    figure = rendered(genotype)
    for axes in figure.axes:
        paths = [arrow.get_path().cleaned().interpolated(8).vertices[:-1] for arrow in arrows(axes)]
        for k, one in enumerate(paths):
            for other in paths[:k]:
                apart = np.linalg.norm(one[:, None] - other[None], axis=-1).min(axis=1)
                assert apart.max() > 0.04


@each_genotype
def test_no_edge_runs_through_a_foreign_node(genotype: Genotype | NB201Genotype) -> None:
    figure = rendered(genotype)
    for axes in figure.axes:
        nodes = np.asarray(axes.collections[0].get_offsets())
        for arrow in arrows(axes):
            start, end = (np.array(point) for point in arrow._posA_posB)
            points = curve(start, end, arrow.get_connectionstyle().rad, np.linspace(0, 1, 200))
            apart = np.linalg.norm(points[:, None] - nodes, axis=-1).min(axis=0)
            assert (apart < NODE_RADIUS).sum() == 2


def test_edges_are_kept_apart_without_labels_too() -> None:
    layout = arrange(1, 3, [(0, 1), (0, 1), (0, 1), (1, 2)], [None] * 4)
    middle = np.array([0.5])
    heights = sorted(
        curve(layout.nodes[0], layout.nodes[1], bend, middle)[0, 1] for bend in layout.bends[:3]
    )
    assert np.diff(heights).min() > 0.1


@each_genotype
def test_labels_sit_on_their_edges_and_share_their_colour(
    genotype: Genotype | NB201Genotype,
) -> None:
    figure = rendered(genotype)
    for axes in figure.axes:
        labels, _ = split_texts(axes)
        edges = [arrow for arrow in arrows(axes) if arrow.get_linewidth() > 1]
        for label, arrow in zip(labels, edges, strict=True):
            start, end = (np.array(point) for point in arrow._posA_posB)
            bend = arrow.get_connectionstyle().rad
            points = curve(start, end, bend, np.linspace(0, 1, 400))
            at = np.array(label.get_position())
            assert np.linalg.norm(points - at, axis=1).min() < 0.02
            colour = matplotlib.colors.to_rgb(label.get_color())
            assert colour == pytest.approx(arrow.get_edgecolor()[:3])


def test_curve_is_what_matplotlib_draws() -> None:
    start, end = np.array([10.0, 20.0]), np.array([200.0, 90.0])
    arrow = FancyArrowPatch(start, end, connectionstyle="arc3,rad=0.3")
    path = arrow.get_connectionstyle()(start, end, shrinkA=0, shrinkB=0)
    at = np.linspace(0, 1, 11)
    weights = np.stack([(1 - at) ** 2, 2 * at * (1 - at), at**2], axis=1)
    np.testing.assert_allclose(curve(start, end, 0.3, at), weights @ path.vertices, atol=1e-9)


def test_families_have_colours_of_their_own() -> None:
    figure = rendered(UNEVEN)
    colours = {
        label.get_text(): label.get_color()
        for axes in figure.axes
        for label in split_texts(axes)[0]
    }
    assert colours[S3] == colours[S5]
    assert len({colours[op] for op in (S3, D3, MAX, SKIP)}) == 4
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [
        "separable convolution",
        "dilated convolution",
        "pooling",
        "skip",
    ]


def test_what_leaves_a_node_without_state_is_pale() -> None:
    labels, _ = split_texts(rendered(UNEVEN).axes[0])
    ops = list(UNEVEN.edges("normal"))
    assert [label.get_alpha() < 1 for label in labels] == [source == 3 for _, _, source in ops]


@pytest.mark.parametrize("name", ["cell.png", "cell.PNG", "cell.svg"])
def test_suffix_chooses_the_format(name: str, tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        draw_genotype(NB201, tmp_path / folder / name, title="x")
    content = (tmp_path / "a" / name).read_bytes()
    assert content == (tmp_path / "b" / name).read_bytes()
    if name == "cell.svg":
        assert b"<svg" in content
    else:
        with Image.open(tmp_path / "a" / name) as picture:
            assert picture.format == "PNG"
            assert min(picture.size) > 500


@pytest.mark.parametrize("name", ["cell.pdf", "cell", "png"])
def test_other_suffixes_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected \.png or \.svg"):
        draw_genotype(DARTS_V2, tmp_path / name)
    with pytest.raises(ValueError, match=r"expected \.png or \.svg"):
        draw_history(HISTORY, tmp_path / name)
    assert not list(tmp_path.iterdir())


HISTORY = [
    {
        "epoch": epoch,
        "train_loss": 2.0 / epoch,
        "valid_loss": 2.2 / epoch,
        "train_accuracy": 10.0 * epoch,
        "valid_accuracy": 9.0 * epoch,
        "skips_normal": epoch % 4,
        "skips_reduce": epoch % 3,
        "entropy_normal": 1.9 - epoch / 100,
        "entropy_reduce": 1.8 - epoch / 100,
        "seconds": 12.0,
    }
    for epoch in range(1, 8)
]


def drawn(figure: Figure) -> dict[str, list[list[tuple[float, float]]]]:
    return {
        axes.get_title(): [
            [(float(x), float(y)) for x, y in line.get_xydata()] for line in axes.get_lines()
        ]
        for axes in figure.axes
    }


def test_history_has_every_curve(tmp_path: Path) -> None:
    def points(key: str) -> list[tuple[float, float]]:
        return [(entry["epoch"], entry[key]) for entry in HISTORY]

    assert drawn(history_figure(HISTORY)) == {
        "loss": [points("train_loss"), points("valid_loss")],
        "accuracy": [points("train_accuracy"), points("valid_accuracy")],
        "skip connections": [points("skips_normal"), points("skips_reduce")],
        "alpha entropy": [points("entropy_normal"), points("entropy_reduce")],
    }
    for name in ("history.png", "history.svg"):
        draw_history(HISTORY, tmp_path / name)
        assert (tmp_path / name).stat().st_size > 10_000


def test_what_the_history_lacks_is_left_out() -> None:
    history: list[dict[str, float | None]] = [
        {"epoch": 1, "train_loss": 2.0, "valid_loss": None, "skips_normal": 1},
        {"epoch": 2, "train_loss": 1.0, "valid_loss": 1.5},
    ]
    assert drawn(history_figure(history)) == {
        "loss": [[(1, 2.0), (2, 1.0)], [(2, 1.5)]],
        "skip connections": [[(1, 1)]],
    }


def test_the_eigenvalue_is_drawn_where_it_was_measured() -> None:
    history = [{"epoch": epoch, "train_loss": 1.0} for epoch in range(5)]
    for epoch, value in ((0, 0.2), (2, 0.3), (4, 0.5)):
        history[epoch]["eigenvalue"] = value
    found = drawn(history_figure(history))
    assert found["dominant eigenvalue"] == [[(0, 0.2), (2, 0.3), (4, 0.5)]]
    assert "dominant eigenvalue" not in drawn(history_figure(history[1:2]))


def test_a_history_of_nothing_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "h.png"
    with pytest.raises(ValueError, match="history is empty"):
        draw_history([], path)
    with pytest.raises(ValueError, match=r"history\[1\] has no epoch; it has train_loss"):
        draw_history([HISTORY[0], {"train_loss": 1.0}], path)
    with pytest.raises(ValueError, match="nothing to draw; expected any of train_loss"):
        draw_history([{"epoch": 1}], path)


def test_pictures_leave_no_global_figures(tmp_path: Path) -> None:
    from matplotlib import pyplot

    before = pyplot.get_fignums()
    save_figure(genotype_figure(NB201), tmp_path / "c.png")
    save_figure(history_figure(HISTORY), tmp_path / "h.png")
    assert pyplot.get_fignums() == before


def test_a_distribution_lies_between_its_operations():
    """A pure one at its corner, an even one in the middle; the best ringed, and every op named."""
    ops = ("none", "skip", "conv")
    shares = {"normal": [(1, 0, 0), (0, 1, 0), (1 / 3,) * 3], "reduce": [(0, 0, 1)] * 3}
    figure = simplex_figure(shares, ops, [0.1, 0.9, 0.5])
    for axes, rows in zip(figure.axes, shares.values()):
        corners = axes.patches[0].get_xy()[:3]
        expected = np.asarray(rows) @ corners
        (dots, best) = axes.collections[0].get_offsets(), axes.lines[0].get_xydata()
        assert np.abs(dots - expected).max() < 5 * JITTER
        assert best[0] == pytest.approx(dots[1])
        assert axes.collections[0].get_array().tolist() == [0.1, 0.9, 0.5]
        assert [text.get_text() for text in axes.texts] == list(ops)


def test_a_simplex_is_written(tmp_path):
    """Of two operations too, which lie above each other; equal accuracies in equal colours."""
    shares = {"normal": [(0.5, 0.5)], "reduce": [(1, 0)]}
    draw_simplex(shares, ("a", "b"), [0.3], tmp_path / "simplex.png")
    assert Image.open(tmp_path / "simplex.png").width > 300
    panels = simplex_figure(shares, ("a", "b"), [0.3]).axes[:2]
    assert all(axes.get_xlim() == (-1.2, 1.2) for axes in panels)
    colours = [axes.collections[0].get_facecolor().tolist() for axes in panels]
    assert colours[0] == colours[1]


def test_entropy_is_drawn_from_0_to_1():
    history = [{"epoch": e, "entropy_normal": 0.9999, "train_loss": 2.0 - e} for e in range(3)]
    axes = {a.get_title(): a for a in history_figure(history).axes}
    assert axes["alpha entropy"].get_ylim() == (0.0, 1.0)
    assert axes["loss"].get_ylim() != (0.0, 1.0)


def test_a_picture_that_cannot_be_written_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(descriptor: int) -> None:
        raise OSError(28, "No space left")

    path = tmp_path / "cell.png"
    path.write_text("before")
    monkeypatch.setattr("os.fsync", refuse)
    with pytest.raises(OSError, match="No space left"):
        save_figure(Figure(), path)
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]
