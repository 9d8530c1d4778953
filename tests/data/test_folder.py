"""Folders of pictures: read as they are needed, to the same bits by any number of workers."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pictures import noise, write_folder
from PIL import Image

from fastnas.data import folder as folder_module
from fastnas.data import reading
from fastnas.data.batches import Batches
from fastnas.data.folder import FolderImages
from fastnas.data.load import DataError, load_images
from fastnas.data.picture import read_picture
from fastnas.extras import MissingPackage


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("data") / "pets", count=9)


def load(root: Path, **settings: Any) -> FolderImages:
    found = load_images(root, **{"image_size": 16, "workers": 0, **settings})
    assert isinstance(found, FolderImages)
    return found


def batches(images: FolderImages, size: int = 4) -> Batches:
    return Batches(torch.arange(len(images.train_labels)), size, seed=3)


def drawn(images: FolderImages, count: int, stream_batches: Batches | None = None) -> list[Any]:
    stream = images.stream(stream_batches or batches(images))
    found = [stream.next() for _ in range(count)]
    stream.close()
    return found


def same(left: list[Any], right: list[Any]) -> bool:
    return len(left) == len(right) and all(
        torch.equal(a, b) for x, y in zip(left, right) for a, b in zip(x, y)
    )


def test_it_says_what_it_has(root: Path) -> None:
    images = load(root)
    assert images.name == str(root)
    assert (images.classes, images.class_names) == (2, ("cat", "dog"))
    assert (images.shape, images.channels, images.size) == ((3, 16, 16), 3, (16, 16))
    assert images.train_labels.tolist() == images.test_labels.tolist() == 9 * [0] + 9 * [1]
    assert images.draws_crops and not load(root, crop_scale=1.0).draws_crops


def test_plain_images_and_tests_are_the_pictures_cut_alike(root: Path) -> None:
    images = load(root, centre_share=0.9)
    index = torch.tensor([11, 0, 5, 7, 2])
    parts = list(images.plain(index, 2))
    assert [part.tolist() for part, _ in parts] == [[11, 0], [5, 7], [2]]
    names = [f"train/{'dog' if i > 8 else 'cat'}/{i % 9:03d}.png" for i in index.tolist()]
    expected = [read_picture(str(root / name), images.reading, None) for name in names]
    assert torch.equal(torch.cat([pixels for _, pixels in parts]), torch.tensor(np.stack(expected)))
    pixels, labels = (torch.cat(column) for column in zip(*images.tests(5)))
    assert pixels.shape == (18, 3, 16, 16) and torch.equal(labels, images.test_labels)
    first = read_picture(str(root / "val/cat/000.png"), images.reading, None)
    assert torch.equal(pixels[0], torch.tensor(first))


@pytest.mark.parametrize("workers", [1, 2])
def test_any_number_of_workers_reads_the_same(root: Path, workers: int) -> None:
    alone, images = load(root), load(root, workers=workers)
    assert same(drawn(images, 11), drawn(alone, 11))  # over three passes
    assert same([*images.tests(4)], [*alone.tests(4)])
    index = torch.arange(7)
    assert same([*images.plain(index, 3)], [*alone.plain(index, 3)])
    assert torch.equal(images.mean, alone.mean) and torch.equal(images.std, alone.std)
    assert images.fingerprint == alone.fingerprint


def test_a_stream_follows_its_batches(root: Path) -> None:
    images = load(root, crop_scale=1.0)
    mine, theirs = batches(images), batches(images)
    for pixels, labels in drawn(images, 9, mine):
        index = theirs.next()
        [(_, plain)] = images.plain(index, 100)
        assert torch.equal(pixels, plain) and torch.equal(labels, images.train_labels[index])
    assert mine.place == theirs.place


def test_crops_are_drawn_anew_in_each_pass(root: Path) -> None:
    images = load(root)
    seen = drawn(images, 8)
    order = batches(images)
    found: dict[int, list[torch.Tensor]] = {}
    for pixels, _ in seen:
        for number, one in zip(order.next().tolist(), pixels):
            found.setdefault(number, []).append(one)
    twice = [crops for crops in found.values() if len(crops) == 2]
    assert len(twice) > 10
    assert all(not torch.equal(*crops) for crops in twice)
    # Two seeds draw other crops of the same picture.
    index = torch.zeros(1, dtype=torch.int64)
    one, other = (drawn(images, 1, Batches(index, 1, seed))[0][0] for seed in (0, 1))
    assert not torch.equal(one, other)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("done", [1, 4, 6])
def test_a_checkpoint_holds_what_was_handed_out_not_what_was_read(
    root: Path, workers: int, done: int
) -> None:
    images = load(root, workers=workers)
    uninterrupted = drawn(load(root), 12)
    first = batches(images)
    before = drawn(images, done, first)
    state = first.state_dict()
    again = batches(images)
    stream = images.stream(again)
    stream.next()  # of another place, which it has read on from
    again.load_state_dict(state)
    after = [stream.next() for _ in range(12 - done)]
    stream.close()
    assert same(before + after, uninterrupted)


def test_a_stream_goes_on_after_it_was_closed(root: Path) -> None:
    images = load(root, workers=1)
    stream = images.stream(batches(images))
    found = [stream.next() for _ in range(3)]
    stream.close()
    stream.close()
    found += [stream.next() for _ in range(3)]
    stream.close()
    assert same(found, drawn(load(root), 6))


@pytest.mark.parametrize("workers", [0, 1])
def test_the_generators_of_the_run_are_left_alone(root: Path, workers: int) -> None:
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002
    state = torch.get_rng_state()
    images = load(root, workers=workers)
    drawn(images, 3)
    list(images.tests(4))
    assert torch.equal(torch.get_rng_state(), state)
    assert np.random.randint(10**9) == np.random.RandomState(0).randint(10**9)  # noqa: NPY002


def test_grey_stays_grey_and_mixed_is_rgb(tmp_path: Path) -> None:
    write_folder(tmp_path, channels=1, count=3)
    images = load(tmp_path)
    assert images.shape == (1, 16, 16) and images.mean.shape == (1,)
    assert drawn(images, 1)[0][0].shape == (4, 1, 16, 16)
    levels = np.full((20, 20), 3000, np.uint16)
    Image.fromarray(levels).save(tmp_path / "train/cat/sixteen.png")
    assert load(tmp_path).channels == 1
    noise(0).save(tmp_path / "val/dog/colour.png")  # the last of all
    assert load(tmp_path).channels == 3


def test_headers_of_a_large_folder_are_read_until_one_is_in_colour(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder_module, "OPENED", 5)
    opened = []
    header_mode = folder_module.header_mode
    monkeypatch.setattr(
        folder_module, "header_mode", lambda path: opened.append(path) or header_mode(path)
    )
    write_folder(tmp_path / "colour", count=3)
    assert load(tmp_path / "colour").channels == 3 and len(opened) == 1
    opened.clear()
    write_folder(tmp_path / "grey", count=3, channels=1)
    assert load(tmp_path / "grey").channels == 1 and len(opened) == 12


def test_mean_and_std_are_those_of_training_pictures_cut_as_for_a_test(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = load(root)
    [(_, pixels)] = images.plain(torch.arange(18), 100)
    scaled = pixels.double() / 255
    torch.testing.assert_close(images.mean.double(), scaled.mean((0, 2, 3)), atol=1e-6, rtol=0)
    deviation = scaled.std((0, 2, 3), correction=0)
    torch.testing.assert_close(images.std.double(), deviation, atol=1e-6, rtol=0)
    assert abs(images.normalise(pixels).mean()) < 1e-5
    # Of a large folder it is a sample, always the same one, and no other picture is decoded.
    monkeypatch.setattr(folder_module, "DECODED_BYTES", 100)
    monkeypatch.setattr(folder_module, "SAMPLED", 6)
    decoded = []
    read = reading.read_picture
    monkeypatch.setattr(
        reading, "read_picture", lambda path, *rest: decoded.append(path) or read(path, *rest)
    )
    some = load(root)
    assert len(decoded) == 6 and all("/train/" in path for path in decoded)
    assert sum("/cat/" in path for path in decoded) == 3
    chosen = [9 * ("/dog/" in path) + int(Path(path).stem) for path in decoded]
    torch.testing.assert_close(
        some.mean.double(), scaled[chosen].mean((0, 2, 3)), atol=1e-6, rtol=0
    )
    assert torch.equal(load(root).mean, some.mean)
    decoded.clear()
    drawn(some, 2)
    assert len(decoded) == 8  # two batches, and nothing is kept for the next
    drawn(some, 2)
    assert len(decoded) == 16


def test_a_folder_without_a_test_is_split_alike_for_every_run(tmp_path: Path) -> None:
    write_folder(tmp_path, ("",), ("a", "b", "c"), count=10)
    images = load(tmp_path)
    assert torch.bincount(images.train_labels).tolist() == [8, 8, 8]
    assert torch.bincount(images.test_labels).tolist() == [2, 2, 2]
    parts = [{part.name(i) for i in range(len(part))} for part in (images.train, images.test)]
    assert not parts[0] & parts[1] and len(parts[0] | parts[1]) == 30
    torch.manual_seed(1)
    assert load(tmp_path).test.names == images.test.names


def test_every_class_of_a_folder_without_a_test_is_tested(tmp_path: Path) -> None:
    """A fifth of two pictures is none; of twenty such classes twelve had no test."""
    classes = [f"c{k:02d}" for k in range(20)]
    images = load(write_folder(tmp_path, ("",), classes, count=2))
    assert torch.bincount(images.test_labels, minlength=20).tolist() == [1] * 20
    assert torch.bincount(images.train_labels, minlength=20).tolist() == [1] * 20


def test_too_few_pictures_to_split_are_refused(tmp_path: Path) -> None:
    write_folder(tmp_path / "a", ("",), count=9)
    for i in range(1, 9):
        (tmp_path / f"a/dog/00{i}.png").unlink()
    with pytest.raises(DataError, match="a: 1 picture of class dog, 10 in all; to hold back a fif"):
        load(tmp_path / "a")
    write_folder(tmp_path / "b", ("",), count=2)
    with pytest.raises(DataError, match="4 in all; to hold back a fifth for the test, expected 2"):
        load(tmp_path / "b")


def test_parts_of_the_training_pictures(root: Path) -> None:
    images = load(root)
    part = images.subset(torch.tensor([0, 10, 3]), torch.tensor([17, 1]))
    assert part.train_labels.tolist() == [0, 1, 0] and part.test_labels.tolist() == [1, 0]
    [(pixels, labels)] = part.tests(9)
    [(_, expected)] = images.plain(torch.tensor([17, 1]), 9)
    assert torch.equal(pixels, expected) and torch.equal(labels, part.test_labels)
    [(_, pixels)] = part.plain(torch.tensor([1]), 9)
    [(_, expected)] = images.plain(torch.tensor([10]), 9)
    assert torch.equal(pixels, expected)
    assert len(images.train_labels) == 18 and part.fingerprint != images.fingerprint


def test_the_fingerprint_follows_names_sizes_labels_and_settings(tmp_path: Path) -> None:
    write_folder(tmp_path)
    before = load(tmp_path).fingerprint
    assert load(tmp_path).fingerprint == before
    for settings in ({"image_size": 15}, {"crop_scale": 0.5}, {"centre_share": 0.5}):
        assert load(tmp_path, **settings).fingerprint != before
    found = {before}
    (tmp_path / "train/cat/000.png").rename(tmp_path / "train/cat/00a.png")
    found.add(load(tmp_path).fingerprint)
    (tmp_path / "train/cat/00a.png").rename(tmp_path / "train/dog/00a.png")
    found.add(load(tmp_path).fingerprint)
    noise(1, 40, 40).save(tmp_path / "val/dog/000.png")
    found.add(load(tmp_path).fingerprint)
    assert len(found) == 4


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("part", ["train", "val"])
def test_a_damaged_picture_is_named_before_a_run(tmp_path: Path, part: str, workers: int) -> None:
    write_folder(tmp_path, suffix="jpg")
    path = tmp_path / part / "dog/002.jpg"
    path.write_bytes(path.read_bytes()[:-99])  # the header is whole
    with pytest.raises(DataError, match=r"dog/002\.jpg: cannot be read: image file is trunc") as e:
        load(tmp_path, workers=workers)
    assert str(e.value).startswith(str(path)) and "\n" not in str(e.value)


@pytest.mark.parametrize("workers", [0, 2])
def test_one_damaged_later_is_named_when_it_is_read(tmp_path: Path, workers: int) -> None:
    write_folder(tmp_path)
    images = load(tmp_path, workers=workers)
    (tmp_path / "train/dog/002.png").write_bytes(b"damaged")
    with pytest.raises(
        DataError, match=r"^/.*train/dog/002\.png: cannot be read: no picture [^\n]*$"
    ):
        drawn(images, 3)


def test_a_worker_that_dies_is_told(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = load(root)
    images.workers = 1
    parent = os.getpid()

    def die(*_: Any) -> None:
        assert os.getpid() != parent
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(reading, "read_picture", die)
    with pytest.raises(DataError, match=r"a process that reads images has died .*--workers 0"):
        drawn(images, 1)


def test_other_errors_are_no_deaths() -> None:
    with pytest.raises(RuntimeError, match="of another kind"), reading.deaths_told():
        raise RuntimeError("of another kind")


def test_workers_are_in_a_group_of_their_own_and_end_with_the_stream(root: Path) -> None:
    images = load(root, workers=2)
    stream = images.stream(batches(images))
    before = children()
    stream.next()
    mine = children() - before
    assert len(mine) == 2
    ends = time.monotonic() + 20  # the second one may not have begun yet
    while not all(os.getpgid(child) == child for child in mine) and time.monotonic() < ends:
        time.sleep(0.05)
    assert all(os.getpgid(child) == child for child in mine)
    stream.close()
    ends = time.monotonic() + 20
    while children() & mine and time.monotonic() < ends:
        time.sleep(0.05)
    assert not children() & mine


def children() -> set[int]:
    tasks = Path(f"/proc/{os.getpid()}/task").glob("*/children")
    return {int(number) for task in tasks for number in task.read_text().split()}


def test_moving_moves_labels_and_moments(root: Path) -> None:
    images = load(root)
    moved = images.to("meta")
    assert moved.train_labels.is_meta and moved.mean.is_meta and moved.device.type == "meta"
    assert images.device.type == "cpu" and images.mean.device.type == "cpu"


def test_the_old_spelling_is_the_same_folder(root: Path) -> None:
    found = load_images(f"imagefolder:{root}", image_size=16, workers=0)
    assert found.fingerprint == load(root).fingerprint


@pytest.mark.parametrize(
    ("settings", "kind", "message"),
    [
        ({"image_size": None}, DataError, "pets: image_size is not given; a folder of pictures"),
        ({"workers": -1}, ValueError, "workers is -1; a whole number is needed, 0 to 256"),
        ({"workers": 1.5}, TypeError, "workers is 1.5"),
        ({"crop_scale": 0}, ValueError, "crop_scale is 0; a number is needed, above 0 to 1"),
        ({"centre_share": 1.01}, ValueError, "centre_share is 1.01; a number is needed"),
        ({"crop_scale": "x"}, TypeError, "crop_scale is 'x'"),
    ],
)
def test_settings_that_are_none(
    root: Path, settings: dict[str, Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        load_images(root, **{"image_size": 16, **settings})


@pytest.mark.parametrize("setting", ["workers", "crop_scale", "centre_share"])
def test_settings_of_folders_are_refused_elsewhere(setting: str) -> None:
    with pytest.raises(
        DataError, match=f"{setting} is 1, but digits is held in memory; only a fol"
    ):
        load_images("digits", **{setting: 1})


def test_without_pillow_the_extra_is_named(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(MissingPackage, match=r"pillow cannot be imported.*'fastnas\[search\]'"):
        load_images(root, image_size=16)
