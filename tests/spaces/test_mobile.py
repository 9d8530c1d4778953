"""The MobileNet-like space: its column, its candidates, and architectures as text."""

from __future__ import annotations

import re

import pytest

from fastnas.spaces import MOBILE_ARCHITECTURES, MobileSpace, format_column, parse_column
from fastnas.spaces.mobile import SKIP, MobileLayer, block_name, named_block

SMALL = MobileSpace(stages=((8, 2, 2), (16, 1, 1)), stem=8, first=8, head=16)


def test_the_column_is_that_of_fairnas() -> None:
    layers = MobileSpace().layers
    assert len(layers) == 19
    assert layers[0] == (16, 32, 2) and layers[-1] == (192, 320, 1)
    assert [i for i, layer in enumerate(layers) if layer.stride == 2] == [0, 2, 6, 14]
    widths = [32] * 2 + [40] * 4 + [80] * 4 + [96] * 4 + [192] * 4 + [320]
    assert [layer.C_out for layer in layers] == widths
    assert [layer.C_in for layer in layers] == [16, *widths[:-1]]


def test_a_layer_skips_where_it_keeps_size_and_channels() -> None:
    space = MobileSpace()
    counts = [len(space.candidates(layer)) for layer in space.layers]
    assert counts.count(7) == 13 and counts.count(6) == 6
    assert space.candidates(MobileLayer(8, 8, 1))[-1] == SKIP
    for layer in (MobileLayer(8, 8, 2), MobileLayer(8, 16, 1)):
        assert SKIP not in space.candidates(layer)
    # The least that stays for backward comes last among the blocks.
    assert space.candidates(MobileLayer(8, 8, 1))[-2] == (7, 3)


@pytest.mark.parametrize("name", MOBILE_ARCHITECTURES)
def test_published_architectures_fit_and_are_read_as_written(name: str) -> None:
    architecture = MOBILE_ARCHITECTURES[name]
    assert MobileSpace().checked(architecture) == architecture
    assert parse_column(format_column(architecture)) == architecture


def test_text_forms() -> None:
    assert parse_column(" k3_e6\n skip k7_e3") == ((3, 6), "skip", (7, 3))
    assert format_column([[3, 6], "skip"]) == "k3_e6 skip"
    assert named_block(block_name((5, 3))) == (5, 3)


@pytest.mark.parametrize("text", ["", "k3", "k3_e6 conv", "k3_e6,skip", "k_e", "K3_e6", "k3_e6x"])
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="text"):
        parse_column(text)


@pytest.mark.parametrize(
    ("architecture", "message"),
    [
        ([(3, 6)] * 2, "2 layers; the space has 3"),
        (["skip", "skip", (3, 6)], "architecture[0] is 'skip'; allowed: k3_e6, k5_e6"),
        ([(3, 6), (9, 6), (3, 6)], "architecture[1] is k9_e6; allowed: k3_e6"),
        ([(3, 6), (3, 4), (3, 6)], "architecture[1] is k3_e4"),
        ([(3, 6), "conv", (3, 6)], "architecture[1] is 'conv'"),
    ],
)
def test_architectures_that_do_not_fit_are_refused(architecture, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        SMALL.checked(architecture)


def test_lists_are_taken_as_tuples() -> None:
    checked = SMALL.checked([[3, 6], "skip", [7, 3]])
    assert checked == ((3, 6), "skip", (7, 3)) and hash(checked) == hash(tuple(checked))
    assert MobileSpace(stages=[[8, 2, 2], [16, 1, 1]], stem=8, first=8, head=16) == SMALL


def test_channels_scale_as_in_mobilenet_v2() -> None:
    half = MobileSpace().scaled(0.5)
    assert (half.stem, half.first, half.head) == (16, 8, 640)
    # 40 / 2 = 20 rounds to 24; 24 is nearer than 16.
    assert [channels for channels, _, _ in half.stages] == [16, 24, 40, 48, 96, 160]
    # 32 * 0.3 = 9.6 would round to 8, which is less than nine tenths of it.
    assert MobileSpace().scaled(0.3).stem == 16
    assert MobileSpace().scaled(1.0) == MobileSpace()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"stages": ((8, 3, 1),)}, "stages[0]: stride is 3; at most 2 is allowed"),
        ({"stages": ((8, 2),)}, "stages[0] is (8, 2); (channels, stride, layers) is needed"),
        ({"stem_stride": 4}, "stem_stride is 4"),
        ({"kernels": (3, 4)}, "a number in kernels is 4; an odd one is needed"),
        ({"expansions": (3, 3)}, "expansions is (3, 3); no number may come twice"),
    ],
)
def test_other_columns_are_refused(given, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        MobileSpace(**given)
