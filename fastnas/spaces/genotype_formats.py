"""Genotypes as text: the published formats, read without evaluating anything.

==========  =====================================================================
darts       ``Genotype(normal=[('sep_conv_3x3', 1), ...], normal_concat=range(2, 6), ...)``
ptdarts     the same with a list for each node: ``normal=[[('sep_conv_3x3', 1), ...], ...]``
fairdarts   the same with triples: ``normal=[('sep_conv_3x3', 2, 0), ...]``
nb201       ``|op~0|+|op~0|op~1|+|op~0|op~1|op~2|``
json        an object with the keys normal, normal_concat, reduce, reduce_concat; of a
            NAS-Bench-201 cell ``{"nb201": "|op~0|+...|"}``
==========  =====================================================================
"""

import ast
import json
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

from fastnas.checks import check_choice
from fastnas.spaces import strict_json
from fastnas.spaces.genotype import AnyGenotype, Edge, Genotype, NB201Genotype
from fastnas.spaces.space import CELL_TYPES

_FIELDS = tuple(field.name for field in fields(Genotype))
_LONGEST = 1 << 16
# What comes before the call on its line must not itself look like a value or a call.
_CALL = re.compile(r"""[^\n(){}|'"]*?\b(Genotype\w*[ ]*\(.*)""", re.DOTALL)
_WRAPPERS = re.compile(r"u?int\d*|intp|str_|array|list|tuple")
"""Names of calls that stand around a value in a `repr`, such as those of NumPy 2."""


def parse(text: str) -> AnyGenotype:
    """Read a genotype in any of the formats, recognised by how the text begins.

    ``{`` begins JSON and ``|`` a NAS-Bench-201 cell; anything else is taken for named tuple
    text. The text is parsed, never evaluated, so it may come from anywhere.

    Raises:
        TypeError: ``text`` is not a str.
        ValueError: it is no genotype; the message says what is wrong and where.
    """
    _check_text(text)
    start = text.lstrip()[:1]
    if start == "{":
        return from_json(text)
    if start == "|":
        return from_nb201(text)
    return from_darts(text)


def dump(genotype: AnyGenotype, format: str) -> str:
    """Write a genotype as text that :func:`parse` reads back to an equal one.

    Args:
        genotype: a :class:`Genotype`, or a :class:`NB201Genotype` for "nb201" and "json".
        format: one of :data:`FORMATS`.

    Raises:
        TypeError: the format is for the other kind of genotype.
        ValueError: no such format, or one that cannot express this genotype.
    """
    check_choice("format", format, FORMATS)
    return FORMATS[format](genotype)


def from_darts(text: str) -> Genotype:
    """Read named tuple text: a call ``Genotype(...)`` with its four fields by name.

    The cells may be flat pairs (DARTS), lists per node (pt.darts) or triples (FairDARTS), a
    concat may be a list, a tuple or ``range(...)``, and numbers and names may be written as NumPy
    2 does, ``np.int64(0)``. On the line before it there may stand ``NAME =``, or the date and
    the words of a log.

    Raises:
        TypeError: ``text`` is not a str.
        ValueError: anything else than that.
    """
    _check_text(text)
    found = _CALL.fullmatch(text.strip())
    if found is None:
        raise ValueError(
            "not a genotype: expected one `Genotype(...)`, with `NAME =` or a log's line before it "
            f"or not, got {_quote(text)}"
        )
    text = found[1]
    call = _parsed_call(text)
    if call.args:
        raise _wrong(call.args[0], text, f"the fields must be given by name: {', '.join(_FIELDS)}")
    given: dict[str, object] = {}
    for keyword in call.keywords:
        if keyword.arg is None:
            raise _wrong(keyword.value, text, "`**` cannot be read")
        given[keyword.arg] = _literal(keyword.value, text)
    return _genotype(given)


def _parsed_call(text: str) -> ast.Call:
    """The one call that a text is, unevaluated."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a backslash or `1is`, on lines of their own
            tree = ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"not a genotype, and not even an expression: {error}") from error
    if not isinstance(tree, ast.Call) or not isinstance(tree.func, ast.Name):
        raise ValueError(f"not a genotype: expected one `Genotype(...)`, got {_quote(text)}")
    return tree


def from_nb201(text: str) -> NB201Genotype:
    """Read a NAS-Bench-201 cell, ``|op~0|+|op~0|op~1|+|op~0|op~1|op~2|``.

    Raises:
        TypeError: ``text`` is not a str.
        ValueError: another structure, or an operation that NAS-Bench-201 does not have.
    """
    _check_text(text)
    nodes = []
    for number, group in enumerate(text.strip().split("+"), 1):
        if len(group) < 2 or group[0] != "|" or group[-1] != "|":
            raise ValueError(f"node {number}: expected |op~0|...|, got {_quote(group)}")
        edges = []
        for entry in group[1:-1].split("|"):
            parts = re.fullmatch(r"(\w+)~([0-9]{1,3})", entry)
            if not parts:
                raise ValueError(f"node {number}: expected op~predecessor, got {_quote(entry)}")
            edges.append((parts[1], int(parts[2])))
        nodes.append(tuple(edges))
    return NB201Genotype(tuple(nodes))


def from_json(text: str) -> AnyGenotype:
    """Read a JSON object with the keys normal, normal_concat, reduce, reduce_concat, or nb201.

    The cells may have any of the three shapes that :class:`Genotype` takes; under nb201 stands the
    string of a NAS-Bench-201 cell.

    Raises:
        TypeError: ``text`` is not a str.
        ValueError: no JSON, not an object, other keys, or no genotype.
    """
    _check_text(text)
    try:
        value = strict_json.loads(text)
    except ValueError as error:
        raise ValueError(f"not a genotype, and not even JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"not a genotype: expected a JSON object, got {_quote(text)}")
    match value:
        case {"nb201": str() as cell} if len(value) == 1:
            return from_nb201(cell)
    return _genotype(value)


def to_darts(genotype: Genotype) -> str:
    """Write the named tuple text of DARTS, as quark0/darts logs and evaluates it.

    Raises:
        TypeError: not a :class:`Genotype`.
        ValueError: a node has not exactly two edges, which flat pairs cannot say.
    """
    _check_kind(genotype, Genotype)
    flat = _flat_pairs(genotype)
    if flat is None:
        raise ValueError(
            "format 'darts' needs exactly two edges for each node, got "
            f"{_edge_counts(genotype)}; 'ptdarts', 'fairdarts' and 'json' do not"
        )
    return _named_tuple(genotype, *flat)


def to_ptdarts(genotype: Genotype) -> str:
    """Write the named tuple text of pt.darts, a list for each node.

    Raises:
        TypeError: not a :class:`Genotype`.
    """
    _check_kind(genotype, Genotype)
    return _named_tuple(
        genotype, *([list(node) for node in genotype.nodes(cell)] for cell in CELL_TYPES)
    )


def to_fairdarts(genotype: Genotype) -> str:
    """Write the named tuple text of FairDARTS, (operation, node, predecessor) triples.

    Raises:
        TypeError: not a :class:`Genotype`.
        ValueError: a cell has no edges at all, or ends in an empty node that its concat does
            not name: triples cannot say that such a node exists.
    """
    _check_kind(genotype, Genotype)
    for cell in CELL_TYPES:
        edges = genotype.edges(cell)
        named = max([*genotype.concat(cell), *(node for _, node, _ in edges)])
        if not edges or named != len(genotype.nodes(cell)) + 1:
            raise ValueError(
                f"format 'fairdarts' cannot tell how many nodes {cell} has, whose nodes have "
                f"{_edge_counts(genotype)} edges; 'ptdarts' and 'json' can"
            )
    return _named_tuple(genotype, *(list(genotype.edges(cell)) for cell in CELL_TYPES))


def to_nb201(genotype: NB201Genotype) -> str:
    """Write the string that names a cell in NAS-Bench-201.

    Raises:
        TypeError: not a :class:`NB201Genotype`.
    """
    _check_kind(genotype, NB201Genotype)
    return "+".join(
        "|" + "".join(f"{op}~{source}|" for op, source in node) for node in genotype.nodes
    )


def to_json(genotype: AnyGenotype) -> str:
    """Write a JSON object of the four fields, or of the string of a NAS-Bench-201 cell.

    The cells are flat pairs as in DARTS where each node has two edges, else lists per node.

    Raises:
        TypeError: not a genotype.
    """
    if isinstance(genotype, NB201Genotype):
        return json.dumps({"nb201": to_nb201(genotype)})
    _check_kind(genotype, Genotype)
    normal, reduce = _flat_pairs(genotype) or (genotype.normal, genotype.reduce)
    values = (normal, genotype.normal_concat, reduce, genotype.reduce_concat)
    return json.dumps(dict(zip(_FIELDS, values)))


FORMATS: dict[str, Callable[[Any], str]] = {
    "darts": to_darts,
    "ptdarts": to_ptdarts,
    "fairdarts": to_fairdarts,
    "nb201": to_nb201,
    "json": to_json,
}
"""The formats :func:`dump` writes, each with its writer; :func:`parse` reads them all."""


def _check_text(text: object) -> None:
    if not isinstance(text, str):
        raise TypeError(f"a genotype is read from a str, got {type(text).__name__}")
    if len(text) > _LONGEST:
        raise ValueError(f"not a genotype: {len(text)} characters, at most {_LONGEST} are read")


def _check_kind(genotype: object, kind: type) -> None:
    if not isinstance(genotype, kind):
        raise TypeError(
            f"genotype is a {type(genotype).__name__}; this format is for a {kind.__name__}"
        )


def _genotype(given: dict[str, object]) -> Genotype:
    if set(given) != set(_FIELDS):
        raise ValueError(
            f"a genotype has the fields {', '.join(_FIELDS)}, got {', '.join(given) or 'none'}"
        )
    return Genotype(**given)  # type: ignore[arg-type]


def _literal(node: ast.expr, text: str) -> object:
    """The value of a list, tuple, str, int or range expression."""
    match node:
        case ast.Constant(value=str() | int() as value):
            return value
        case ast.List(elts=items) | ast.Tuple(elts=items):
            return [_literal(item, text) for item in items]
        case ast.Call(
            func=ast.Name(id=name) | ast.Attribute(value=ast.Name(), attr=name),
            args=[wrapped],
            keywords=[],
        ) if _WRAPPERS.fullmatch(name):
            return _literal(wrapped, text)
        case ast.Call(func=ast.Name(id="range"), args=bounds, keywords=[]):
            numbers = [_literal(bound, text) for bound in bounds]
            try:
                return range(*numbers)  # type: ignore[call-overload]
            except (TypeError, ValueError) as error:
                raise _wrong(node, text, str(error)) from error
    raise _wrong(node, text, "expected a list, a string, a whole number or range(...)")


def _wrong(node: ast.expr, text: str, reason: str) -> ValueError:
    source = ast.get_source_segment(text, node) or ""
    return ValueError(
        f"line {node.lineno}, column {node.col_offset + 1}: {reason}, got {_quote(source)}"
    )


def _quote(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:57]}...")


def _flat_pairs(genotype: Genotype) -> tuple[list[Edge], list[Edge]] | None:
    if any(len(node) != 2 for node in genotype.normal + genotype.reduce):
        return None
    normal, reduce = (
        [edge for node in genotype.nodes(cell) for edge in node] for cell in CELL_TYPES
    )
    return normal, reduce


def _edge_counts(genotype: Genotype) -> str:
    return " and ".join(
        f"{cell} {[len(node) for node in genotype.nodes(cell)]}" for cell in CELL_TYPES
    )


def _named_tuple(genotype: Genotype, normal: Sequence[object], reduce: Sequence[object]) -> str:
    return (
        f"Genotype(normal={normal!r}, normal_concat={_concat(genotype.normal_concat)}, "
        f"reduce={reduce!r}, reduce_concat={_concat(genotype.reduce_concat)})"
    )


def _concat(nodes: tuple[int, ...]) -> str:
    run = range(nodes[0], nodes[-1] + 1)
    return repr(run if nodes == tuple(run) else list(nodes))
