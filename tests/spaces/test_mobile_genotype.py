"""A column with its sizes: read as written, in every way that it is written."""

import json
from dataclasses import replace

import pytest

from fastnas.spaces import MOBILE_ARCHITECTURES, MobileGenotype, MobileSpace
from fastnas.spaces.mobile_genotype import begins_column, mobile_space, read_column

FAIRNAS = MOBILE_ARCHITECTURES["FairNAS-A"]


@pytest.mark.parametrize("genotype", [
    MobileGenotype(FAIRNAS),
    MobileGenotype(FAIRNAS, 0.25, 1),
    MobileGenotype((*FAIRNAS[:1], "skip", *FAIRNAS[2:]), 2),
])  # fmt: skip
def test_what_is_written_is_read(genotype):
    assert read_column(genotype.to_json()) == genotype
    assert read_column(f" {genotype.text}\n") == replace(genotype, width=1.0, stem_stride=2)
    assert begins_column(genotype.text)
    written = json.loads(genotype.to_json())
    assert list(written) == ["mobilenet", "width", "stem_stride"]


def test_a_published_column_is_read_by_its_name():
    assert read_column("NoisyDARTS-A\n").architecture == MOBILE_ARCHITECTURES["NoisyDARTS-A"]


def test_its_space_is_scaled():
    assert mobile_space() == MobileSpace()
    space = MobileGenotype(FAIRNAS, 0.25, 1).space
    assert space == MobileSpace(stem_stride=1).scaled(0.25) and space.stem_stride == 1


@pytest.mark.parametrize(
    "text",
    ["", "Genotype(normal=[])", "|none~0|", "{", '{"normal": []}', "[1]", "skipping", "k3_e"],
)
def test_what_is_no_column_is_left_to_others(text):
    assert read_column(text) is None and not begins_column(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("skip", "architecture has 1 layers; the space has 19"),
        ("k3_e6 k3", "text: layer 1 is 'k3'; 'skip' or a name as k3_e6 is needed"),
        ('{"mobilenet": ["skip"]}', r"mobilenet is \['skip'\]; names of blocks in a text"),
        (
            '{"mobilenet": "skip", "w": 1}',
            "unknown key 'w'; allowed: mobilenet, width, stem_stride",
        ),
        ('{"mobilenet": "skip", "width": null}', "width is None; a number is needed"),
        ('{"mobilenet": "skip", "width": 17}', "width is 17; a number is needed, above 0 to 16"),
        ('{"mobilenet": "skip", "stem_stride": 1.5}', "stem_stride is 1.5; a whole number is need"),
    ],
)
def test_what_is_meant_for_a_column_and_is_none(text, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        read_column(text)
