"""Data sets: what good sources become, and what is said about bad ones."""

from __future__ import annotations

import io
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fastnas.data.load import DataError, Images, load_images
from fastnas.extras import MissingPackage

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (20, 6, 7, 3), dtype=np.uint8)
LABELS = np.arange(20) % 4


def save(path: Path, **arrays: Any) -> str:
    np.savez(path, **arrays)
    return str(path)


def assert_same(left: Images, right: Images) -> None:
    for field in ("train", "train_labels", "test", "test_labels"):
        assert torch.equal(getattr(left, field), getattr(right, field)), field
    assert left.classes == right.classes


def test_digits() -> None:
    from sklearn.datasets import load_digits

    digits = load_images("digits")
    assert digits.name == "digits"
    assert (digits.channels, digits.size, digits.classes) == (1, (8, 8), 10)
    assert digits.train.dtype == digits.test.dtype == torch.uint8
    assert digits.train_labels.dtype == torch.int64
    assert len(digits.train) == 1438
    assert len(digits.test) == 359
    assert len(digits.train_labels) == 1438

    source = load_digits()
    expected = sorted(
        (np.rint(image * 255 / 16).astype(np.uint8).tobytes(), int(label))
        for image, label in zip(source.images, source.target, strict=True)
    )
    found = sorted(
        (image.numpy().tobytes(), int(label))
        for images, labels in (
            (digits.train, digits.train_labels),
            (digits.test, digits.test_labels),
        )
        for image, label in zip(images, labels, strict=True)
    )
    assert found == expected
    shares = torch.bincount(digits.test_labels) / torch.bincount(
        torch.cat([digits.train_labels, digits.test_labels])
    )
    assert (shares - 0.2).abs().max() < 0.006


def test_held_back_images_do_not_depend_on_the_run(tmp_path: Path) -> None:
    path = save(tmp_path / "set.npz", images=PIXELS, labels=LABELS)
    torch.manual_seed(1)
    first = load_images(path)
    torch.manual_seed(2)
    assert_same(first, load_images(path))
    assert torch.bincount(first.test_labels).tolist() == [1, 1, 1, 1]


def test_layouts_and_types_agree(tmp_path: Path) -> None:
    last = load_images(save(tmp_path / "last.npz", images=PIXELS, labels=LABELS))
    assert last.name == "last"
    assert last.train.shape == (16, 3, 6, 7)
    assert last.train.is_contiguous()
    first = save(tmp_path / "first.npz", images=PIXELS.transpose(0, 3, 1, 2), labels=LABELS)
    assert_same(load_images(first), last)
    for dtype in (np.float32, np.float64):
        floats = save(tmp_path / "f.npz", images=PIXELS.astype(dtype) / 255, labels=LABELS)
        assert_same(load_images(floats), last)
    tenths = save(tmp_path / "t.npz", images=np.full(PIXELS.shape, 0.999), labels=LABELS)
    assert load_images(tenths).train.unique().tolist() == [255]
    small = save(tmp_path / "small.npz", images=PIXELS, labels=LABELS.astype(np.uint8))
    assert_same(load_images(small), last)
    grey = load_images(save(tmp_path / "grey.npz", images=PIXELS[..., 0], labels=LABELS))
    assert torch.equal(grey.train, last.train[:, :1])


def test_split_of_the_file_is_used(tmp_path: Path) -> None:
    split = np.zeros(20, dtype=np.uint8)
    split[[1, 6, 19]] = 1
    images = load_images(save(tmp_path / "s.npz", images=PIXELS, labels=LABELS, split=split))
    expected = torch.from_numpy(PIXELS).permute(0, 3, 1, 2)
    assert torch.equal(images.test, expected[[1, 6, 19]])
    assert images.test_labels.tolist() == [1, 2, 3]
    assert torch.equal(images.train, expected[[i for i in range(20) if i not in (1, 6, 19)]])


def test_moments_and_normalise(tmp_path: Path) -> None:
    pixels = PIXELS.copy()
    pixels[..., 1] = 90
    images = load_images(save(tmp_path / "m.npz", images=pixels, labels=LABELS))
    scaled = images.train.double() / 255
    std = scaled.std((0, 2, 3), correction=0)
    std[1] = 1 / 255
    assert images.mean.dtype == images.std.dtype == torch.float32
    torch.testing.assert_close(images.mean.double(), scaled.mean((0, 2, 3)), atol=1e-7, rtol=0)
    torch.testing.assert_close(images.std.double(), std, atol=1e-7, rtol=0)

    before = images.train.clone()
    normal = images.normalise(images.train)
    assert torch.equal(images.train, before)
    assert normal.dtype == torch.float32
    reference = (scaled - images.mean.double()[:, None, None]) / images.std.double()[:, None, None]
    torch.testing.assert_close(normal.double(), reference, atol=1e-5, rtol=1e-5)
    assert torch.equal(images.normalise(images.train[0]), normal[0])
    with pytest.raises(TypeError, match=r"torch\.float32; expected torch\.uint8"):
        images.normalise(normal)
    with pytest.raises(ValueError, match=r"\[2, 1, 6, 7\]; expected \[\.\.\., 3, H, W\]"):
        images.normalise(images.train[:2, :1])


def test_resize_is_antialiased_and_keeps_the_aspect(tmp_path: Path) -> None:
    pixels = RNG.integers(0, 256, (20, 12, 20, 3), dtype=np.uint8)
    path = save(tmp_path / "r.npz", images=pixels, labels=LABELS)
    images = load_images(path, image_size=6)
    assert images.size == (6, 6)
    assert images.train.dtype == torch.uint8
    scaled = F.interpolate(
        load_images(path).train.double(), (6, 10), mode="bilinear", antialias=True
    )
    assert (images.train - scaled[..., 2:8]).abs().max() <= 0.51
    assert load_images("digits", image_size=16).size == (16, 16)
    assert_same(load_images("digits", image_size=8), load_images("digits"))


def test_classes_have_their_numbers_for_names() -> None:
    digits = load_images("digits")
    assert isinstance(digits, Images) and digits.class_names == tuple("0123456789")
    with pytest.raises(ValueError, match="class_names are 2; 10 are needed"):
        replace(digits, class_names=("a", "b"))


def test_moving_keeps_everything() -> None:
    digits = load_images("digits")
    assert_same(digits.to("cpu"), digits)
    assert digits.to("meta").test_labels.is_meta


def broken(**changes: Any) -> dict[str, Any]:
    arrays = {"images": PIXELS, "labels": LABELS, **changes}
    return {key: value for key, value in arrays.items() if value is not None}


def with_nan() -> np.ndarray[Any, Any]:
    images = PIXELS / 255
    images[3, 2, 1, 0] = np.nan
    return images


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (broken(images=None, x=PIXELS), "no array 'images', found labels, x; expected images"),
        (broken(labels=None), "no array 'labels', found images"),
        (broken(images=PIXELS[0, 0]), r"shape \[7, 3\]; expected \[N, H, W\]"),
        (broken(images=PIXELS[None]), r"shape \[1, 20, 6, 7, 3\]; expected"),
        (broken(images=PIXELS[:0], labels=LABELS[:0]), r"shape \[0, 6, 7, 3\], no pixel"),
        (broken(images=np.zeros((20, 9, 9, 9), np.uint8)), "neither can be the channels"),
        (broken(images=np.zeros((20, 3, 9, 3), np.uint8)), "either could be the channels"),
        (broken(images=PIXELS.astype(np.int64)), "dtype int64; expected uint8, or floats"),
        (broken(images=PIXELS.astype(np.float32)), r"float32 in 0\.\.255; expected floats in 0"),
        (broken(images=PIXELS / 255 - 0.5), r"float64 in -0\.5\.\.0\.5; expected floats"),
        (broken(images=with_nan()), "NaN or infinity; expected"),
        (broken(images=PIXELS.astype(object)), "cannot be read as plain number arrays"),
        (broken(labels=LABELS.astype(object)), "cannot be read as plain number arrays"),
        (broken(labels=LABELS[:19]), "19 labels for 20 images"),
        (broken(labels=LABELS[:, None]), r"shape \[20, 1\]; expected integers of shape \[20\]"),
        (broken(labels=LABELS * 1.0), "float64 of shape"),
        (broken(labels=LABELS * 0), "every label is 0; expected at least two classes"),
        (broken(labels=LABELS + 1), r"label 4 found; with 4 different labels expected 0\.\.3"),
        (broken(labels=LABELS * 2), r"label 4 found; with 4 different"),
        (broken(labels=LABELS - 1), r"label -1 found"),
        (broken(images=PIXELS[:4], labels=LABELS[:4]), "4 images are too few to hold back"),
        (broken(images=PIXELS[:5], labels=np.arange(5)), "class . has no training image"),
        (broken(split=np.zeros(19, int)), r"split is int64 of shape \[19\]"),
        (broken(split=np.zeros(20)), "split is float64"),
        (broken(split=np.zeros(20, int)), r"split holds \[0\]; expected both 0"),
        (broken(split=np.arange(20) % 3), r"split holds \[0, 1, 2\]"),
        (broken(split=(LABELS == 2).astype(int)), "class 2 has no training image"),
    ],
)
def test_broken_archives_are_told_in_one_line(
    arrays: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = save(tmp_path / "broken.npz", **arrays)
    with pytest.raises(DataError, match=message) as caught:
        load_images(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_files_that_are_no_archives(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    with pytest.raises(DataError, match=r"x\.npz: cannot be read: No such file"):
        load_images(str(path))
    for content in (b"", b"hello", b"\x93NUMPY"):
        path.write_bytes(content)
        with pytest.raises(DataError, match="not a zip archive"):
            load_images(path)
    path.unlink()
    path.mkdir()
    with pytest.raises(DataError, match="cannot be read: Is a directory"):
        load_images(path)


def test_damaged_archives(tmp_path: Path) -> None:
    whole = io.BytesIO()
    np.savez_compressed(whole, images=PIXELS, labels=LABELS)
    path = tmp_path / "x.npz"
    path.write_bytes(whole.getvalue()[:-400])
    with pytest.raises(DataError, match=r"x\.npz: not a \.npz file"):
        load_images(path)
    content = bytearray(whole.getvalue())
    content[900:1000] = bytes(100)
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"x\.npz: (cannot be read|the zip archive is damaged)"):
        load_images(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("images", "no array")
        archive.writestr("labels", "no array")
    with pytest.raises(DataError, match="images is not a numpy array"):
        load_images(path)


def test_unknown_names_and_sizes() -> None:
    with pytest.raises(DataError, match="unknown data set 'mnist'; expected digits, cifar10"):
        load_images("mnist")
    with pytest.raises(ValueError, match="image_size is 0"):
        load_images("digits", image_size=0)
    for size in (8.0, True):
        with pytest.raises(TypeError, match=f"image_size is {size}"):
            load_images("digits", image_size=size)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["cifar10", "svhn"])
def test_without_torchvision_the_extra_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
    with pytest.raises(MissingPackage, match=r"pip install 'fastnas\[vision\]'"):
        load_images(name, image_size=8)


class FakeCifar:
    def __init__(self, root: str, train: bool, download: bool) -> None:
        assert download
        if "offline" in root:
            raise RuntimeError("Dataset not found\nor corrupted.")
        self.data = PIXELS[:15] if train else PIXELS[15:]
        self.targets = (LABELS[:15] if train else LABELS[15:]).tolist()
        self.classes = ["a", "b", "c", "d"]


class FakeSvhn:
    def __init__(self, root: str, split: str, download: bool) -> None:
        assert download
        chosen = {"train": slice(0, 15), "test": slice(15, 20)}[split]
        self.data = PIXELS.transpose(0, 3, 1, 2)[chosen]
        self.labels = LABELS[chosen]


@pytest.fixture
def torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = ModuleType("torchvision.datasets")
    vars(datasets).update(CIFAR10=FakeCifar, CIFAR100=FakeCifar, SVHN=FakeSvhn)
    monkeypatch.setitem(sys.modules, "torchvision", SimpleNamespace(datasets=datasets))
    monkeypatch.setitem(sys.modules, "torchvision.datasets", datasets)


@pytest.mark.usefixtures("torchvision")
@pytest.mark.parametrize(("name", "classes"), [("cifar10", 4), ("cifar100", 4), ("svhn", 10)])
def test_torchvision_sets(name: str, classes: int, tmp_path: Path) -> None:
    images = load_images(name, data_dir=tmp_path)
    expected = torch.from_numpy(PIXELS).permute(0, 3, 1, 2)
    assert torch.equal(images.train, expected[:15])
    assert torch.equal(images.test, expected[15:])
    assert images.train_labels.tolist() == LABELS[:15].tolist()
    assert images.test_labels.tolist() == LABELS[15:].tolist()
    assert images.test_labels.dtype == torch.int64
    assert (images.name, images.classes) == (name, classes)
    assert images.class_names == tuple("0123456789" if name == "svhn" else "abcd")


@pytest.mark.usefixtures("torchvision")
def test_torchvision_failure_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cifar10: .*offline: Dataset not found or corrupted\."):
        load_images("cifar10", data_dir=tmp_path / "offline")
