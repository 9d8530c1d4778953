"""What a folder of pictures may look like, and what is said about folders that do not."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pictures import write_class, write_folder

from fastnas.data.listing import Pictures, list_folder
from fastnas.data.source import DataError


def names(pictures: Pictures) -> list[str]:
    return [pictures.name(i) for i in range(len(pictures))]


@pytest.mark.parametrize("held", ["test", "val", "valid", "validation", "Test"])
@pytest.mark.parametrize("train", ["train", "Training"])
def test_train_and_what_tests(held: str, train: str, tmp_path: Path) -> None:
    listing = list_folder(write_folder(tmp_path, (train, held), count=2))
    assert listing.classes == ("cat", "dog")
    assert listing.test is not None
    for part, pictures in ((train, listing.train), (held, listing.test)):
        assert names(pictures) == [f"{part}/{c}/00{i}.png" for c in ("cat", "dog") for i in (0, 1)]
        assert pictures.labels.tolist() == [0, 0, 1, 1]
        sizes = [os.path.getsize(pictures.path(i)) for i in range(4)]
        assert pictures.sizes.tolist() == sizes


def test_imagenet_is_such_a_folder(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Its classes are WordNet's numbers, its suffix in capitals, and its test has no labels."""
    classes = ("n01440764", "n01443537")
    write_folder(tmp_path, ("train", "val"), classes, 2, "JPEG")
    (tmp_path / "test").mkdir()
    shutil.copy(tmp_path / "val/n01440764/000.JPEG", tmp_path / "test/a.JPEG")
    listing = list_folder(tmp_path)
    assert listing.classes == classes
    assert listing.test is not None and names(listing.test)[0] == "val/n01440764/000.JPEG"
    assert f"{tmp_path}: not read: test/" in caplog.text


def test_classes_alone_and_train_alone_are_left_to_be_split(tmp_path: Path) -> None:
    listing = list_folder(write_folder(tmp_path / "a", ("",), ("dog", "Cat", "cat"), 2))
    assert listing.classes == ("Cat", "cat", "dog")
    assert listing.test is None
    assert names(listing.train)[0] == "Cat/000.png"
    listing = list_folder(write_folder(tmp_path / "b", ("train",)))
    assert listing.test is None and names(listing.train)[0] == "train/cat/000.png"


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    listing = list_folder(write_folder(tmp_path, ("",), ("car", "test", "train"), 2))
    assert listing.classes == ("car", "test", "train") and listing.test is None


def test_pictures_may_lie_one_folder_deeper(tmp_path: Path) -> None:
    write_folder(tmp_path, ("train/cat", "train/dog"), ("images",), 2)
    listing = list_folder(tmp_path)
    assert names(listing.train)[:2] == ["train/cat/images/000.png", "train/cat/images/001.png"]
    assert listing.train.labels.tolist() == [0, 0, 1, 1]


def test_what_is_not_read_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_folder(tmp_path, ("train", "test", "val"), count=1)
    for name in ("train/cat/boxes.txt", "train/labels.csv", "readme", "val/cat/x.GIF"):
        (tmp_path / name).write_text("text")
    for hidden in (".DS_Store", "train/.cache", "train/cat/._000.png"):
        (tmp_path / hidden).write_text("hidden")
    (tmp_path / "train/.thumbnails").mkdir()
    listing = list_folder(tmp_path)
    assert names(listing.train) == ["train/cat/000.png", "train/dog/000.png"]
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    expected = "readme, val/, train/labels.csv, train/cat/boxes.txt"
    assert record.getMessage() == f"fastnas: {tmp_path}: not read: {expected}"
    for i in range(9):
        (tmp_path / f"train/dog/{i}.txt").write_text("text")
    caplog.clear()
    list_folder(tmp_path)
    assert caplog.text.rstrip().endswith("train/dog/0.txt and 8 more")


def test_a_name_cannot_move_the_cursor(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_folder(tmp_path)
    (tmp_path / "a\x1b[2J.txt").write_text("text")
    list_folder(tmp_path)
    assert r"not read: a\x1b[2J.txt" in caplog.records[0].getMessage()


def test_all_is_read_where_nothing_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    list_folder(write_folder(tmp_path))
    assert not caplog.records


def test_links_count_as_what_they_lead_to(tmp_path: Path) -> None:
    write_folder(tmp_path / "real", ("",), ("cat", "dog"), 2)
    root = tmp_path / "links"
    (root / "dog").mkdir(parents=True)
    (root / "cat").symlink_to(tmp_path / "real/cat")
    (root / "dog/a.png").symlink_to(tmp_path / "real/dog/000.png")
    listing = list_folder(root)
    assert names(listing.train) == ["cat/000.png", "cat/001.png", "dog/a.png"]
    assert listing.train.sizes[2] == os.path.getsize(tmp_path / "real/dog/000.png")
    (root / "dog/b.png").symlink_to(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"dog/b\.png: cannot be read: No such file"):
        list_folder(root)


def test_a_circle_of_links_ends(tmp_path: Path) -> None:
    write_folder(tmp_path, ("",))
    (tmp_path / "cat/again").symlink_to(tmp_path)
    with pytest.raises(DataError, match="cat/again/cat: a folder so deep"):
        list_folder(tmp_path)


def test_names_need_not_be_text(tmp_path: Path) -> None:
    write_folder(tmp_path, ("",), ("caf\udce9", "zoo é"), 2)
    listing = list_folder(tmp_path)
    assert sorted(listing.classes) == sorted(("caf\udce9", "zoo é"))
    assert all(os.path.exists(listing.train.path(i)) for i in range(4))


def test_some_of_them_are_chosen(tmp_path: Path) -> None:
    pictures = list_folder(write_folder(tmp_path, ("",), count=3)).train
    chosen = pictures.chosen(torch.tensor([4, 0]))
    assert names(chosen) == ["dog/001.png", "cat/000.png"]
    assert chosen.labels.tolist() == [1, 0]
    assert chosen.sizes.tolist() == pictures.sizes[[4, 0]].tolist()


def empty_class(root: Path) -> None:
    for file in (root / "train/dog").iterdir():
        file.unlink()


def other_class(root: Path) -> None:
    (root / "val/dog").rename(root / "val/fox")


def further_class(root: Path) -> None:
    write_class(root / "train/fox", 2, 9)


def no_train(root: Path) -> None:
    shutil.rmtree(root / "train")


def one_class(root: Path) -> None:
    shutil.rmtree(root / "train/dog")


def nothing(root: Path) -> None:
    shutil.rmtree(root)
    root.mkdir()


def loose_pictures(root: Path) -> None:
    nothing(root)
    write_class(root / "x", 2, 0)
    for file in (root / "x").iterdir():
        file.rename(root / file.name)
    (root / "x").rmdir()


def empty_file(root: Path) -> None:
    (root / "val/cat/001.png").write_bytes(b"")


def two_trains(root: Path) -> None:
    shutil.copytree(root / "train", root / "Train")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (empty_class, r"train/dog: no picture; expected at least one"),
        (other_class, r"val: other classes than in train \(dog, fox\); expected the same folders"),
        (further_class, r"val: other classes than in train \(fox\)"),
        (no_train, r"a folder val of classes, but no folder train; expected both, or one folder"),
        (one_class, r"train: one class, cat; expected at least two"),
        (nothing, r"no folder in it; expected train and test \(or val\), or one folder for each"),
        (loose_pictures, r"no folder in it; expected"),
        (empty_file, r"val/cat/001\.png: an empty file; expected a picture"),
        (two_trains, r"folders Train, train; expected one of them"),
        (shutil.rmtree, r": cannot be read: No such file or directory"),
    ],
)
def test_other_folders_are_refused_in_one_line(
    spoil: Callable[[Path], None], message: str, tmp_path: Path
) -> None:
    root = write_folder(tmp_path / "set", count=2)
    spoil(root)
    with pytest.raises(DataError, match=message) as caught:
        list_folder(root)
    assert str(root) in str(caught.value) and "\n" not in str(caught.value)
