"""Reads and writes genotypes as text, in the published formats; nothing is evaluated.

===============  ==================================================================
darts            ``Genotype(normal=[('sep_conv_3x3', 1), ...], normal_concat=range(2, 6), ...)``
ptdarts          the same with a list for each node: ``normal=[[('sep_conv_3x3', 1), ...], ...]``
fairdarts        the same with triples: ``normal=[('sep_conv_3x3', 2, 0), ...]``
nb201            ``|op~0|+|op~0|op~1|+|op~0|op~1|op~2|``
nas-bench-graph  ``Arch([0, 1, 1, 2], ['gcn', 'cheb', 'gin', 'fc'])``
json             an object with the keys normal, normal_concat, reduce, reduce_concat; of a
                 NAS-Bench-201 cell ``{"nb201": "|op~0|+...|"}``, of a NAS-Bench-Graph cell
                 ``{"nas-bench-graph": "Arch(...)"}``
===============  ==================================================================
"""

import json
from collections.abc import Callable
from typing import Any

from fastnas.checks import check_choice, check_type
from fastnas.spaces import strict_json
from fastnas.spaces.genotype import AnyGenotype
from fastnas.spaces.layouts import LAYOUTS, READING_ORDER, layout_of
from fastnas.spaces.text import check_text, quoted


def parse(text: str) -> AnyGenotype:
    """Reads a genotype in any of the formats, recognised by how the text begins.

    ``{`` begins JSON, ``|`` a NAS-Bench-201 cell and ``Arch(`` a NAS-Bench-Graph cell; anything
    else is taken for named tuple text. The text is parsed, never evaluated, so it may come from
    anywhere.

    Raises:
        TypeError: ``text`` is not a str.
        ValueError: it is no genotype; the message says what is wrong and where.
    """
    check_text(text)
    start = text.lstrip()
    if start.startswith("{"):
        return from_json(text)
    # DARTS is last and takes everything, so `next` always finds one.
    layout = next(layout for layout in READING_ORDER if layout.begins(start))
    genotype: AnyGenotype = layout.read(text)
    return genotype


def dump(genotype: AnyGenotype, format: str) -> str:
    """Writes a genotype as text that :func:`parse` reads back to an equal one.

    Args:
        genotype: a :class:`Genotype`, or a :class:`NB201Genotype` for "nb201" and "json".
        format: one of :data:`FORMATS`.

    Raises:
        TypeError: the format is for the other kind of genotype.
        ValueError: no such format, or one that cannot express this genotype.
    """
    check_choice("format", format, FORMATS)
    return FORMATS[format](genotype)


def from_json(text: str) -> AnyGenotype:
    """Reads a JSON object with the keys normal, normal_concat, reduce, reduce_concat, or nb201.

    The cells may have any of the three shapes that :class:`Genotype` takes; under nb201 stands the
    string of a NAS-Bench-201 cell.

    Raises:
        TypeError: ``text`` is not a str.
        ValueError: no JSON, not an object, other keys, or no genotype.
    """
    check_text(text)
    try:
        value = strict_json.loads(text)
    except ValueError as error:
        raise ValueError(f"not a genotype, and not even JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"not a genotype: expected a JSON object, got {quoted(text)}")
    read = (layout.from_value(value) for layout in READING_ORDER)
    # DARTS is last here too, and refuses other keys by name in place of returning None.
    genotype: AnyGenotype = next(genotype for genotype in read if genotype is not None)
    return genotype


def to_json(genotype: AnyGenotype) -> str:
    """Writes a JSON object of the four fields, or of the string of a NAS-Bench-201 cell.

    The cells are flat pairs as in DARTS where each node has two edges, else lists per node.

    Raises:
        TypeError: not a genotype.
    """
    check_type("genotype", genotype, AnyGenotype)
    return json.dumps(layout_of(genotype).to_value(genotype))


FORMATS: dict[str, Callable[[Any], str]] = {
    **{name: write for layout in LAYOUTS.values() for name, write in layout.formats.items()},
    "json": to_json,
}
"""The formats :func:`dump` writes, each with its writer; :func:`parse` reads them all."""
