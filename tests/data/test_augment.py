"""Augmentation of a whole batch against the same draws applied to one image at a time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastnas.data.augment import Augment


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def one_by_one(augment: Augment, images: Tensor, draws: Tensor, fill: list[float]) -> Tensor:
    batch, channels, height, width = images.shape
    pad = augment.crop
    results = []
    for index in range(batch):
        down, right, mirrored, centre_row, centre_column = draws[:, index].tolist()
        padded = torch.empty(channels, height + 2 * pad, width + 2 * pad, dtype=images.dtype)
        for channel in range(channels):
            padded[channel] = fill[channel]
        padded[:, pad : pad + height, pad : pad + width] = images[index]
        top, left = pad + down, pad + right
        image = padded[:, top : top + height, left : left + width].clone()
        if mirrored:
            image = image.flip(2)
        side = augment.cutout
        top, left = centre_row - side // 2, centre_column - side // 2
        image[:, max(top, 0) : max(top + side, 0), max(left, 0) : max(left + side, 0)] = 0
        results.append(image)
    return torch.stack(results)


@pytest.mark.parametrize("crop", [0, 1, 4])
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("cutout", [0, 3, 8])
@pytest.mark.parametrize("fill", [None, [0.5, -2.0, 3.0]])
def test_equals_the_image_by_image_reference(
    crop: int, flip: bool, cutout: int, fill: list[float] | None
) -> None:
    augment = Augment(crop, flip, cutout)
    images = torch.rand(40, 3, 9, 14, generator=generator(1)) + 1
    draws = augment.draw(images.shape, generator(2))
    expected = one_by_one(augment, images, draws, fill or [0.0, 0.0, 0.0])
    original = images.clone()
    given = augment(images, generator(2), fill=None if fill is None else torch.tensor(fill))
    assert torch.equal(given, expected)
    assert torch.equal(images, original)


def test_flips_only_where_drawn() -> None:
    augment = Augment(flip=True)
    images = torch.rand(200, 1, 3, 5, generator=generator())
    mirrored = augment.draw(images.shape, generator(3))[2].bool()
    given = augment(images, generator(3))
    assert torch.equal(given[mirrored], images[mirrored].flip(3))
    assert torch.equal(given[~mirrored], images[~mirrored])
    assert 60 < int(mirrored.sum()) < 140


def test_draws_cover_their_range_and_differ_between_images() -> None:
    augment = Augment(crop=2, flip=True, cutout=4)
    draws = augment.draw(torch.Size([4000, 3, 6, 7]), generator())
    expected = [range(-2, 3), range(-2, 3), range(2), range(6), range(7)]
    for values, allowed in zip(draws, expected, strict=True):
        counts = torch.bincount(values - allowed.start)
        assert len(counts) == len(allowed)
        mean = 4000 / len(allowed)
        assert (counts - mean).abs().max() < 6 * mean**0.5


def test_rows_and_columns_are_drawn_independently() -> None:
    draws = Augment(crop=8, flip=True, cutout=4).draw(torch.Size([4000, 3, 32, 32]), generator())
    correlation = torch.corrcoef(draws.double()) - torch.eye(5, dtype=torch.double)
    assert correlation.abs().max() < 0.1


def test_without_flip_nothing_is_mirrored() -> None:
    assert not Augment(crop=1).draw(torch.Size([100, 1, 4, 4]), generator())[2].any()


def test_cutout_loses_no_more_than_its_square() -> None:
    images = torch.ones(500, 2, 16, 16)
    holes = (Augment(cutout=6)(images, generator()) == 0).sum((2, 3))
    assert torch.equal(holes[:, 0], holes[:, 1])
    assert holes.max() == 36
    assert holes.min() == 9


def test_same_generator_state_gives_the_same_batch_and_moves_on() -> None:
    augment = Augment(crop=2, flip=True, cutout=2)
    images = torch.rand(16, 3, 8, 8)
    stream = generator(5)
    first, second = augment(images, stream), augment(images, stream)
    assert torch.equal(first, augment(images, generator(5)))
    assert not torch.equal(first, second)


def test_switched_off_returns_the_images() -> None:
    images = torch.rand(2, 3, 4, 4)
    assert Augment()(images, generator()) is images


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_keeps_dtype_and_shape_of_any_layout(dtype: torch.dtype) -> None:
    images = torch.rand(4, 3, 8, 6).to(dtype)
    augment = Augment(crop=2, flip=True, cutout=2)
    given = augment(images.to(memory_format=torch.channels_last), generator())
    assert given.dtype == dtype
    assert torch.equal(given, augment(images, generator()))


def test_empty_batch() -> None:
    assert Augment(2, True, 2)(torch.empty(0, 3, 8, 8), generator()).shape == (0, 3, 8, 8)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_equals_cpu() -> None:
    augment = Augment(crop=2, flip=True, cutout=4)
    images, fill = torch.rand(32, 3, 8, 8), torch.rand(3)
    on_device = augment(images.cuda(), generator(), fill=fill.cuda())
    assert on_device.is_cuda
    assert torch.equal(on_device.cpu(), augment(images, generator(), fill=fill))


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="crop is -1; expected 0 or more"):
        Augment(crop=-1)
    with pytest.raises(ValueError, match="cutout is -2"):
        Augment(cutout=-2)
    with pytest.raises(TypeError, match=r"cutout is 1\.5"):
        Augment(cutout=1.5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"images is torch\.uint8; a dense floating point"):
        Augment(1)(torch.zeros(1, 3, 4, 4, dtype=torch.uint8), generator())
    with pytest.raises(ValueError, match=r"\[3, 4, 4\]; expected \[B, C, H, W\]"):
        Augment(1)(torch.zeros(3, 4, 4), generator())
