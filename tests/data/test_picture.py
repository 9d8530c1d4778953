"""One picture: its mode, its orientation, the square that is cut of it, and what damages say."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pictures import noise
from PIL import Image

from fastnas.data import picture
from fastnas.data.picture import Reading, header_mode, random_box, read_picture
from fastnas.data.source import DataError


def whole(channels: int = 3, size: int = 20) -> Reading:
    """The largest square in the middle."""
    return Reading(size, channels, 1.0, 1.0)


def read(image: Image.Image, path: Path, reading: Reading, **saved: Any) -> np.ndarray:
    image.save(path, **saved)
    found = read_picture(str(path), reading, None)
    assert found.dtype == np.uint8
    assert found.shape == (reading.channels, reading.size, reading.size)
    return found


def test_a_square_of_the_right_size_is_read_as_it_is(tmp_path: Path) -> None:
    image = noise(0, 20, 20)
    found = read(image, tmp_path / "a.png", whole())
    assert (found == np.asarray(image).transpose(2, 0, 1)).all()
    grey = noise(1, 20, 20, 1)
    assert (read(grey, tmp_path / "b.png", whole(1))[0] == np.asarray(grey)).all()
    assert (read(grey, tmp_path / "b.png", whole(3)) == np.asarray(grey)).all()


def test_the_middle_of_the_shorter_side_is_kept(tmp_path: Path) -> None:
    image = noise(0, 16, 32)
    found = read(image, tmp_path / "a.png", Reading(8, 3, 1.0, 0.5))
    # Half of 16 pixels is 8, so nothing is scaled: the crop itself comes back.
    assert (found == np.asarray(image)[4:12, 12:20].transpose(2, 0, 1)).all()
    wide = read(image, tmp_path / "a.png", whole(3, 16))
    assert (wide == np.asarray(image)[:, 8:24].transpose(2, 0, 1)).all()


def test_scaling_averages(tmp_path: Path) -> None:
    board = np.indices((64, 64)).sum(0) % 2 * 255
    found = read(Image.fromarray(board.astype(np.uint8)), tmp_path / "a.png", whole(1, 16))
    assert abs(found.astype(int) - 127).max() <= 2


@pytest.mark.parametrize(
    ("mode", "make"),
    [
        ("1", lambda: noise(2, 20, 20, 1).convert("1")),
        ("P", lambda: noise(2, 20, 20).quantize(16)),
        ("CMYK", lambda: noise(2, 20, 20).convert("CMYK")),
    ],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_modes_become_grey_or_rgb(mode: str, make: Any, channels: int, tmp_path: Path) -> None:
    image = make()
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    found = read(image, path, whole(channels))
    assert header_mode(str(path)) == mode
    plain = np.asarray(image.convert("RGB"))
    if channels == 1:
        assert (
            abs(found[0].astype(int) - np.asarray(Image.fromarray(plain).convert("L"))).max() <= 1
        )
    else:
        assert (found == plain.transpose(2, 0, 1)).all()


def test_what_is_transparent_is_white(tmp_path: Path) -> None:
    colour = np.zeros((20, 20, 4), np.uint8)
    colour[..., :3] = (200, 0, 0)
    colour[:10, :, 3] = 255
    found = read(Image.fromarray(colour), tmp_path / "a.png", whole())
    assert (found[:, :10] == np.array([200, 0, 0])[:, None, None]).all()
    assert (found[:, 10:] == 255).all()
    grey = read(Image.fromarray(colour[..., 2:]), tmp_path / "b.png", whole(1))
    assert (grey[:, :10] == 0).all() and (grey[:, 10:] == 255).all()
    palette = noise(3, 20, 20).quantize(4)
    palette.info["transparency"] = palette.getpixel((0, 0))
    hidden = np.asarray(palette) == palette.getpixel((0, 0))
    laid = read(palette, tmp_path / "c.png", whole(), transparency=palette.getpixel((0, 0)))
    assert hidden.any() and (laid[:, hidden] == 255).all() and (laid[:, ~hidden] != 255).any()


def test_sixteen_bits_are_scaled_not_cut_off(tmp_path: Path) -> None:
    levels = np.linspace(0, 65535, 400).reshape(20, 20).astype(np.uint16)
    found = read(Image.fromarray(levels), tmp_path / "a.png", whole(1))
    assert (found[0] == np.rint(levels / 257)).all()
    assert len(np.unique(found)) > 200


def test_floats_are_refused_by_their_header(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    Image.fromarray(np.zeros((9, 9), np.float32)).save(path)
    for read_it in (header_mode, lambda name: read_picture(name, whole(), None)):
        with pytest.raises(DataError, match=r"a\.tif: its pixels are floats, of an unknown range"):
            read_it(str(path))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "tif"])
def test_a_picture_is_turned_as_its_exif_says(
    orientation: int, suffix: str, tmp_path: Path
) -> None:
    """Written so that it is the same picture, lying in eight ways."""
    upright = noise(5, 16, 32)
    flips = Image.Transpose
    lying = {
        1: None, 2: flips.FLIP_LEFT_RIGHT, 3: flips.ROTATE_180, 4: flips.FLIP_TOP_BOTTOM,
        5: flips.TRANSPOSE, 6: flips.ROTATE_90, 7: flips.TRANSVERSE, 8: flips.ROTATE_270,
    }[orientation]  # fmt: skip
    image = upright if lying is None else upright.transpose(lying)
    exif = Image.Exif()
    exif[picture.ORIENTATION] = orientation
    options = {"quality": 100, "subsampling": 0} if suffix == "jpg" else {}
    path = tmp_path / f"a.{suffix}"
    found = read(image, path, Reading(8, 3, 1.0, 0.5), exif=exif, **options)
    expected = np.asarray(upright)[4:12, 12:20].transpose(2, 0, 1)
    assert abs(found.astype(int) - expected).max() <= (12 if suffix == "jpg" else 0)


def test_damaged_exif_leaves_a_picture_as_it_lies(tmp_path: Path) -> None:
    image = noise(5, 20, 20)
    damaged = b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12\0\x03"
    for name in ("a.jpg", "a.png"):
        plain = read(image, tmp_path / f"plain-{name}", whole())
        assert (read(image, tmp_path / name, whole(), exif=damaged) == plain).all()


def test_large_jpegs_are_decoded_smaller_to_the_same_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = noise(7, 160, 200).resize((2000, 1600))
    exif = Image.Exif()
    exif[picture.ORIENTATION] = 6
    image.save(tmp_path / "a.jpg", quality=95, exif=exif)
    decoded = []
    upright = picture._upright

    def watched(opened: Image.Image) -> Image.Image:
        decoded.append(opened.size)
        return upright(opened)

    monkeypatch.setattr(picture, "_upright", watched)
    fast = read_picture(str(tmp_path / "a.jpg"), whole(3, 50), None)
    monkeypatch.setattr(picture, "KEPT_FOR_SCALING", 1000)
    slow = read_picture(str(tmp_path / "a.jpg"), whole(3, 50), None)
    assert decoded == [(250, 200), (2000, 1600)]
    assert abs(fast.astype(int) - slow).mean() < 3
    # A random crop that is small is taken of the picture in full.
    monkeypatch.setattr(picture, "KEPT_FOR_SCALING", 2)
    monkeypatch.setattr(picture, "random_box", lambda *_: (0, 0, 90, 90))
    read_picture(str(tmp_path / "a.jpg"), Reading(50, 3, 0.5, 1.0), np.random.default_rng(0))
    assert decoded[2:] == [(2000, 1600)]


def test_random_crops_have_the_stated_areas_and_aspects() -> None:
    rng = np.random.default_rng(0)
    width, height = 300, 300
    boxes = np.array([random_box(width, height, 0.25, rng) for _ in range(4000)])
    across, down = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    assert (boxes[:, :2] >= 0).all() and (boxes[:, 2] <= width).all()
    assert (boxes[:, 3] <= height).all()
    share, aspect = across * down / (width * height), across / down
    assert 0.24 < share.min() < 0.26 and 0.95 < share.max() <= 1
    assert 0.73 < aspect.min() < 0.78 and 1.29 < aspect.max() < 1.36
    assert abs(np.median(np.log(aspect))) < 0.02
    # Small crops fit wherever they are drawn, so their areas are uniform and their places too.
    small = share < 0.5
    assert abs(share[small].mean() - 0.375) < 0.01
    places = boxes[small, 0] / (width - across[small])
    assert abs(places.mean() - 0.5) < 0.03 and places.std() > 0.27
    assert len(np.unique(boxes[:, 1])) > 100


def test_where_no_draw_fits_the_largest_in_the_middle_is_cut() -> None:
    rng = np.random.default_rng(0)
    assert random_box(300, 10, 0.9, rng) == pytest.approx((150 - 20 / 3, 0, 150 + 20 / 3, 10))
    assert random_box(10, 300, 0.9, rng) == pytest.approx((0, 150 - 20 / 3, 10, 150 + 20 / 3))


def test_a_crop_for_training_is_what_its_generator_draws(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    noise(0, 40, 50).save(path)
    reading = Reading(16, 3, 0.08, 1.0)
    first, again, other = (
        read_picture(str(path), reading, np.random.default_rng(seed)) for seed in (1, 1, 2)
    )
    assert (first == again).all() and (first != other).any()
    whole_crop = Reading(16, 3, 1.0, 1.0)
    plain = read_picture(str(path), whole_crop, None)
    assert (read_picture(str(path), whole_crop, np.random.default_rng(1)) == plain).all()


def truncated(kind: str) -> bytes:
    content = io.BytesIO()
    noise(0, 200, 200).save(content, kind)
    return content.getvalue()[: len(content.getvalue()) // 2]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no picture at all", "no picture in a format that is known"),
        # Pillow would start another program to draw it.
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no picture in a format"),
        (b"", "no picture in a format that is known"),
        (truncated("jpeg"), "image file is truncated"),
        (truncated("png"), "truncated|broken"),
        (truncated("tiff"), "."),
        (None, "No such file or directory"),
    ],
)
def test_damages_are_one_line_with_the_name(
    content: bytes | None, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "some picture.jpg"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read_picture(str(path), whole(), None)
    assert str(caught.value).startswith(f"{path}: cannot be read: ")
    assert "\n" not in str(caught.value)
