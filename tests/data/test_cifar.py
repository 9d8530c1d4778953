"""CIFAR's own files, as Python 2 wrote them, and files that only look like them."""

from __future__ import annotations

import os
import pickle
import struct
import sys
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastnas.data import cifar
from fastnas.data.load import DataError, Images, load_images

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (36, 3072), dtype=np.uint8)
NAMES = [b"airplane", b"automobile", b"bird"]


class Python2(pickle._Pickler):  # type: ignore[name-defined]
    """Writes texts as Python 2 did, without a word of their encoding, and arrays as NumPy 1."""

    dispatch = dict(pickle._Pickler.dispatch)  # type: ignore[attr-defined]

    def save_text(self, value: bytes) -> None:
        self.write(b"T" + struct.pack("<i", len(value)) + value)

    dispatch[bytes] = save_text


def as_python_2(value: Any) -> bytes:
    stream = BytesIO()
    Python2(stream, 2).dump(value)
    return stream.getvalue().replace(b"numpy._core.multiarray", b"numpy.core.multiarray")


def as_python_3(value: Any) -> bytes:
    return pickle.dumps(value, 4)


def write(path: Path, value: Any, dump: Callable[[Any], bytes] = as_python_2) -> None:
    path.write_bytes(dump(value))


def batch(rows: slice, key: bytes = b"labels") -> dict[bytes, Any]:
    pixels = PIXELS[rows]
    return {b"data": pixels, key: [int(i) % 3 for i in range(len(pixels))], b"batch_label": b"x"}


def write_cifar10(folder: Path, dump: Callable[[Any], bytes] = as_python_2) -> Path:
    folder.mkdir(parents=True)
    for i in range(5):
        write(folder / f"data_batch_{i + 1}", batch(slice(6 * i, 6 * i + 6)), dump)
    write(folder / "test_batch", batch(slice(30, 36)), dump)
    write(folder / "batches.meta", {b"label_names": NAMES, b"num_vis": 3072}, dump)
    (folder / "readme.html").write_text("<html>")
    return folder


def write_cifar100(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for name, rows in (("train", slice(0, 30)), ("test", slice(30, 36))):
        fine = batch(rows, b"fine_labels")
        write(folder / name, {**fine, b"coarse_labels": [0] * len(fine[b"data"])})
    write(folder / "meta", {b"fine_label_names": NAMES, b"coarse_label_names": [b"thing"]})
    return folder


def expect(images: Any, name: str) -> None:
    assert isinstance(images, Images)
    assert (images.name, images.classes) == (name, 3)
    assert images.class_names == ("airplane", "automobile", "bird")
    shaped = torch.from_numpy(PIXELS).view(-1, 3, 32, 32)
    assert torch.equal(images.train, shaped[:30]) and torch.equal(images.test, shaped[30:])
    assert images.train_labels.tolist() == [0, 1, 2] * 10
    assert images.test_labels.tolist() == [0, 1, 2] * 2


@pytest.fixture(autouse=True)
def no_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)


@pytest.mark.parametrize("dump", [as_python_2, as_python_3])
def test_cifar10(dump: Callable[[Any], bytes], tmp_path: Path) -> None:
    folder = write_cifar10(tmp_path / "anywhere", dump)
    expect(load_images(folder), "cifar10")
    assert load_images(folder, image_size=8).size == (8, 8)


def test_a_copy_in_the_place_of_the_archive_needs_no_torchvision(tmp_path: Path) -> None:
    write_cifar10(tmp_path / "cifar-10-batches-py")
    write_cifar100(tmp_path / "cifar-100-python")
    expect(load_images("cifar10", data_dir=tmp_path), "cifar10")
    expect(load_images("cifar100", data_dir=tmp_path), "cifar100")
    expect(load_images(tmp_path / "cifar-100-python"), "cifar100")


def test_channels_are_planes(tmp_path: Path) -> None:
    folder = write_cifar10(tmp_path / "c")
    rows = np.zeros((6, 3072), np.uint8)
    rows[:, :1024] = 200  # red
    rows[:, 2048 + 32] = 9  # blue, first pixel of the second row
    write(folder / "test_batch", {b"data": rows, b"labels": [0] * 6})
    images = load_images(folder)
    assert isinstance(images, Images)
    assert images.test[0].amax((1, 2)).tolist() == [200, 0, 9]
    assert images.test[0, 2].nonzero().tolist() == [[1, 0]]


class Evil:
    def __reduce__(self) -> Any:
        return os.system, ("touch executed",)


def unpickled_only(path: Path) -> None:
    write(path, {b"data": Evil(), b"labels": [0]})


def object_array(path: Path) -> None:
    write(path, {b"data": np.array([Evil()], dtype=object), b"labels": [0]}, as_python_3)


@pytest.mark.parametrize("spoil", [unpickled_only, object_array])
def test_nothing_that_a_file_names_is_called(
    spoil: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_cifar10(tmp_path / "c")
    spoil(folder / "data_batch_3")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        DataError, match=r"data_batch_3: no file .* it asks for posix\.system, which"
    ):
        load_images(folder)
    assert not (tmp_path / "executed").exists()
    # The same file does it where everything is allowed.
    pickle.loads((folder / "data_batch_3").read_bytes(), encoding="bytes")
    assert (tmp_path / "executed").exists()


def changed(**changes: Any) -> dict[bytes, Any]:
    return {**batch(slice(0, 6)), **{name.encode(): value for name, value in changes.items()}}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("data_batch_2", None, "cannot be read: No such file"),
        ("test_batch", None, "cannot be read: No such file"),
        ("batches.meta", None, "cannot be read: No such file"),
        ("data_batch_2", b"", "no file of CIFAR's: Ran out of input"),
        ("data_batch_2", as_python_2(batch(slice(0, 6)))[:500], "no file of CIFAR's: "),
        ("data_batch_2", b"\x80\x02K\x01.", "holds a int; expected the dict"),
        (
            "data_batch_2",
            as_python_2({b"labels": [0]}),
            "data are None of shape None; expected uint8",
        ),
        ("data_batch_2", as_python_2(changed(data=PIXELS[:6, 1:])), r"shape \(6, 3071\); expected"),
        ("data_batch_2", as_python_2(changed(data=PIXELS[:6] * 1.0)), "data are float64 of shape"),
        ("data_batch_2", as_python_2(changed(data=PIXELS[:0], labels=[])), r"shape \(0, 3072\)"),
        ("data_batch_2", as_python_2(changed(labels=[0] * 5)), "5 labels for 6 images"),
        ("data_batch_2", as_python_2(changed(labels=None)), "no labels for 6 images"),
        ("test_batch", as_python_2(changed(labels=[3] * 6)), r"a label is none of 0\.\.2"),
        ("test_batch", as_python_2(changed(labels=[-1] * 6)), r"a label is none of 0\.\.2"),
        ("test_batch", as_python_2(changed(labels=["0"] * 6)), r"a label is none of 0\.\.2"),
        ("batches.meta", as_python_2({b"names": NAMES}), "no label_names; expected the names"),
        ("batches.meta", as_python_2({b"label_names": [1, 2]}), "no label_names; expected"),
        ("batches.meta", as_python_2({b"label_names": [*NAMES, b"x"]}), "class x has no training"),
    ],
)
def test_other_files_are_refused_in_one_line(
    name: str, content: bytes | None, message: str, tmp_path: Path
) -> None:
    folder = write_cifar10(tmp_path / "c")
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        load_images(folder)
    assert str(caught.value).startswith(str(folder)) and "\n" not in str(caught.value)


def test_folders_called_alike_are_no_cifar(tmp_path: Path) -> None:
    for name in ("train", "test", "meta", "data_batch_1"):
        (tmp_path / name).mkdir()
    assert cifar.cifar_in(tmp_path) is None
