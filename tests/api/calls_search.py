"""Valid calls of the parts of fastnas.search that a program of one's own uses."""

from __future__ import annotations

import tempfile
from functools import cache, partial
from pathlib import Path

import nb201_tables
import torch
from nb201_tables import SEEN
from wrong_values import Call, choice, flag, instance, integer, number, one_of, tensor, text

from fastnas import spaces
from fastnas.blackbox.config import StudyConfig
from fastnas.data.augment import Augment
from fastnas.data.batches import Batches, split_indices
from fastnas.data.dataset import Images, resize
from fastnas.data.load import load_images
from fastnas.data.npz import divide
from fastnas.evaluators import TableEvaluator, read_table
from fastnas.search.config import SearchConfig, TrainConfig, config_text, make_config, read_settings
from fastnas.search.monitor import entropy, has_collapsed, observe

NB201 = "|none~0|+|skip_connect~0|none~1|+|none~0|nor_conv_1x1~1|none~2|"
SEED = integer(0, 0, 2**63 - 1)


def pixels(n: int = 6) -> torch.Tensor:
    return torch.randint(0, 255, (n, 1, 8, 8), dtype=torch.uint8)


def images() -> Images:
    labels = torch.tensor([0, 1, 0, 1, 0, 1])
    return Images("own", pixels(), labels, pixels(), labels, 2)


@cache
def table_file() -> Path:
    """A table of all cells."""
    return nb201_tables.write(Path(tempfile.mkdtemp()) / "table.csv")


def settings_file() -> Path:
    path = Path(tempfile.mkdtemp()) / "settings.yaml"
    path.write_text("lr: 0.1")
    return path


labels = tensor(6, dtype=torch.int64).but("a larger first axis", "meta", "sparse")
bytes_of_images = tensor(6, 1, 8, 8, dtype=torch.uint8).but("a larger first axis")
settings = {
    "channels": integer(16, 1, 4096), "epochs": integer(3, 1, 10**6), "seed": SEED,
    "lr": number(0.025, above=0.0, optional=True), "momentum": number(0.9, 0.0, 1.0),
    "out": text("runs/x"), "tensorboard": flag(True), "data": text("digits"),
}  # fmt: skip


def config(kind: type, **given: object) -> object:
    return make_config(kind, given)


CALLS = [
    Call("split_indices", split_indices, {
        "labels": labels.plus(negative=torch.tensor([-1, 0, 1])), "fraction": number(
            0.5, above=0.0, below=1.0).plus(**{"one": 1.0, "above": 2.0}), "seed": SEED}),
    Call("Batches", Batches, {
        "indices": labels, "batch_size": integer(2, 1, 6), "seed": SEED, "drop_last": flag(True)}),
    Call("Augment", Augment, {
        "crop": integer(1, 0), "flip": flag(True), "cutout": integer(2, 0)}),
    Call("Augment", lambda images, generator, fill: Augment(1)(images, generator, fill=fill), {
        "images": tensor(2, 3, 8, 8).but("a larger first axis", "meta", "sparse"),
        "generator": instance(torch.Generator), "fill": tensor(3, optional=True)},
        "Augment.__call__"),
    Call("Images", lambda batch: images().normalise(batch), {
        "batch": bytes_of_images.but("meta", "sparse", "another rank")}, "Images.normalise"),
    Call("Images", lambda size: images().resized(size), {
        "size": integer(4, 1)}, "Images.resized"),
    Call("Images", Images, {
        "name": text("own"), "train": bytes_of_images.but("meta", "sparse"), "train_labels":
        labels, "test": bytes_of_images.but("meta", "sparse"), "test_labels": labels,
        "classes": integer(2, 1)}),
    Call("resize", resize, {
        "images": bytes_of_images.but("meta", "sparse"), "size": integer(4, 1)}),
    Call("divide", divide, {
        "name": text("own"), "images": bytes_of_images.but("meta", "sparse"), "labels": labels}),
    Call("load_images", load_images, {
        "name_or_path": one_of(lambda: "digits", **{"None": None, "a number": 3, "a list": [],
            "unknown": "no-such", "empty": "", "missing": "missing.npz", "bytes": b"x.npz", "NUL":
            "a\0b.npz"}).called("data set", "data", "no such file", "cannot be read"),
        "image_size": integer(8, 1, optional=True)}),
    Call("entropy", entropy, {
        "w": tensor(3, 4).but("another rank", "a larger first axis", "meta")}),
    Call("observe", observe, {
        "weights": one_of(lambda: {"normal": torch.rand(6, 5)}, **{"None": None, "a number": 3,
            "a list": [], "lists": {"normal": [1.0]}, "None as w": {"normal": None}}),
        "genotype": instance(lambda: spaces.parse(NB201))}),
    Call("has_collapsed", has_collapsed, {
        "skips": one_of(lambda: [1.0, 2.0], **{"None": None, "a number": 3, "text": "abc",
            "texts": ["a", "b", "c"], "Nones": [None] * 4}),
        "edges": integer(8, 1), "share": number(0.5, 0.0, 1.0), "patience": integer(3, 1)}),
    Call("SearchConfig", partial(config, SearchConfig), {
        **settings, "device": choice("cpu").but("unknown", "empty"), "method": choice("darts")},
        "SearchConfig"),
    Call("TrainConfig", partial(config, TrainConfig), {
        **settings, "channels": integer(36, 1, 4096, optional=True),
        "epochs": integer(3, 1, 10**6, optional=True)}, "TrainConfig"),
    Call("StudyConfig", lambda **given: config(StudyConfig, evaluator="train:x.yaml", **given), {
        "method": choice("random"), "budget": integer(10, 1, 10**9), "seed": SEED,
        "length": integer(8, 1, 128, optional=True)}, "StudyConfig"),
    Call("config_text", config_text, {"config": instance(SearchConfig)}),
    Call("read_settings", read_settings, {
        "path": one_of(settings_file, **{"None": None, "a number": 3, "bytes": b"x.yaml",
            "missing": Path("missing.yaml"), "a folder": Path(".")}).called("config file")}),
    Call("read_table", lambda path, columns: read_table(path, columns), {
        "path": one_of(table_file, **{"None": None, "a number": 3, "missing": "missing.csv",
            "a folder": "."}).called("table"),
        "columns": one_of(lambda: SEEN, **{"None": None, "a number": 3, "unknown": "no-such"}
            ).called("column")}),
    Call("TableEvaluator", lambda cell, column: TableEvaluator(table_file(), SEEN).score(
        cell, column), {"cell": instance(lambda: spaces.parse(NB201)), "column": choice(SEEN)}),
    Call("make_config", make_config, {
        "kind": instance(lambda: SearchConfig), "settings": one_of(dict, **{"None": None,
            "a number": 3, "a list": [], "text": "lr", "an unknown one": {"lrr": 1}, "a number as"
            " a name": {3: 1}}).called("setting")}),
]  # fmt: skip
