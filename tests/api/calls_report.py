"""Valid calls of fastnas.report: the pictures."""

from __future__ import annotations

from pathlib import Path

from wrong_values import Call, number, one_of, sequence, text

from fastnas import spaces
from fastnas.report.cell_drawing import draw_genotype, genotype_figure
from fastnas.report.column_drawing import column_figure, draw_column
from fastnas.report.curves import draw_best_so_far, draw_history, history_figure
from fastnas.report.figures import picture_path, save_figure
from fastnas.report.landscape_drawing import draw_landscape, landscape_figure
from fastnas.report.simplex import draw_simplex, simplex_figure

NB201 = "|none~0|+|skip_connect~0|none~1|+|none~0|nor_conv_1x1~1|none~2|"

path = one_of(
    lambda: Path("picture.svg"),
    **{"None": None, "a number": 3, "bytes": b"x.png", "no suffix": "x", "a list": [], "empty": "",
       "another suffix": "x.pdf"},
)  # fmt: skip
title = text("a cell")
genotype = one_of(
    lambda: spaces.parse(NB201),
    **{"None": None, "a number": 3, "text": NB201, "a list": [], "a space": spaces.get_space("S0")},
)
history = one_of(
    lambda: [{"epoch": 0, "train_loss": 1.0}],
    **{"None": None, "a number": 3, "text": "abc", "empty": [], "numbers": [1], "no epoch":
       [{"train_loss": 1.0}], "nothing to draw": [{"epoch": 0}], "a text": [{"epoch": 0,
       "train_loss": "high"}], "a dict": {"epoch": 0}, "an epoch of text": [{"epoch": "first",
       "train_loss": 1.0}], "a list as a value": [{"epoch": 0, "train_loss": [1.0]}]},
)  # fmt: skip
accuracies = sequence(number(0.5).but("nan", "inf", "-inf"), 3, fixed=True).plus(text="abc")


row = (0.5, 0.5, 0.0)
shares = one_of(
    lambda: {"normal": [row] * 3},
    **{"None": None, "a number": 3, "a list": [row] * 3, "empty": {}, "too few operations":
       {"normal": [(1.0, 0.0)] * 3}, "too few cells": {"normal": [row]}, "text":
       {"normal": "abc"}, "no rows": {"normal": None}},
)  # fmt: skip
column = one_of(
    lambda: [(3, 6), "skip"],
    **{"None": None, "a number": 3, "text": "skip", "empty": [], "one": [(3, 6)],
       "another name": [(3, 6), "none"], "an even kernel": [(4, 6), "skip"]},
).called("architecture")  # fmt: skip
of_column = one_of(
    lambda: spaces.MobileSpace(stages=((8, 2, 1), (8, 1, 1)), stem=8, first=8, head=8),
    **{"None": None, "a number": 3, "text": "mobile", "another space": spaces.get_space("S0")},
)  # fmt: skip
grid = one_of(
    lambda: [[1.0, 2.0], [3.0, 4.0]],
    **{"None": None, "a number": 3, "text": "abc", "empty": [], "a row": [1.0, 2.0], "texts":
       [["a", "b"], ["c", "d"]], "ragged": [[1.0], [2.0, 3.0]], "a larger one": [[1.0] * 3] * 3},
)  # fmt: skip
offsets = one_of(
    lambda: [-1.0, 1.0],
    **{"None": None, "a number": 3, "text": "abc", "empty": [], "one": [1.0], "falling":
       [1.0, -1.0], "nan": [float("nan"), 1.0], "texts": ["a", "b"], "three": [1.0, 2.0, 3.0]},
)  # fmt: skip
ops = sequence(text("none"), 3, fixed=True).plus(text="none").but("with a list")

CALLS = [
    Call("draw_genotype", draw_genotype, {"genotype": genotype, "path": path, "title": title}),
    Call("genotype_figure", genotype_figure, {"genotype": genotype, "title": title}),
    Call("draw_column", draw_column, {
        "architecture": column, "path": path, "space": of_column, "title": title}),
    Call("column_figure", column_figure, {
        "architecture": column, "space": of_column, "title": title}),
    Call("draw_history", draw_history, {"history": history, "path": path}),
    Call("history_figure", history_figure, {"history": history}),
    Call("draw_best_so_far", draw_best_so_far, {
        "accuracies": accuracies.but("one more", "one less"), "path": path}),
    Call("draw_simplex", draw_simplex, {
        "shares": shares, "ops": ops, "accuracies": accuracies, "path": path}),
    Call("simplex_figure", simplex_figure, {
        "shares": shares, "ops": ops, "accuracies": accuracies}),
    Call("draw_landscape", draw_landscape, {
        "offsets": offsets, "loss": grid, "accuracy": grid, "path": path}),
    Call("landscape_figure", landscape_figure, {
        "offsets": offsets, "loss": grid, "accuracy": grid}),
    Call("picture_path", picture_path, {"path": path}),
    Call("save_figure", save_figure, {
        "figure": one_of(lambda: genotype_figure(spaces.parse(NB201)), **{"None": None, "a number":
            3, "text": "x", "a list": []}), "path": path}),
]  # fmt: skip
