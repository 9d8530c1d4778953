"""Reads and writes genotypes of DARTS' layout: named tuple text, and the fields of JSON objects.

Nothing is evaluated: text may come from anywhere.
"""

import ast
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from fastnas.spaces.genotype import Edge, Genotype
from fastnas.spaces.layout import CELL_TYPES
from fastnas.spaces.text import check_kind, check_text, quoted

_FIELDS = tuple(field.name for field in fields(Genotype))
# What comes before the call on its line must not itself look like a value or a call.
_CALL = re.compile(r"""[^\n(){}|'"]*?\b(Genotype\w*[ ]*\(.*)""", re.DOTALL)
_WRAPPERS = re.compile(r"u?int\d*|intp|str_|array|list|tuple")
"""Names of calls that stand around a value in a `repr`, such as those of NumPy 2."""


def from_darts(text: str) -> Genotype:
    """Reads named tuple text: a call ``Genotype(...)`` with its four fields by name.

    The cells may be flat pairs (DARTS), lists per node (pt.darts) or triples (FairDARTS), a
    concat may be a list, a tuple or ``range(...)``, and numbers and names may be written as NumPy
    2 does, ``np.int64(0)``. On the line before it there may stand ``NAME =``, or the date and
    the words of a log.

    Raises:
        TypeError: ``text`` is not a str.
        ValueError: anything else than that.
    """
    check_text(text)
    found = _CALL.fullmatch(text.strip())
    if found is None:
        raise ValueError(
            "not a genotype: expected one `Genotype(...)`, with `NAME =` or a log's line before it "
            f"or not, got {quoted(text)}"
        )
    text = found[1]
    call = _parsed_call(text)
    if call.args:
        raise _wrong(call.args[0], text, f"the fields must be given by name: {', '.join(_FIELDS)}")
    given: dict[str, object] = {}
    for keyword in call.keywords:
        # `**fields` has no name.
        if keyword.arg is None:
            raise _wrong(keyword.value, text, "`**` cannot be read")
        given[keyword.arg] = _literal(keyword.value, text)
    return from_fields(given)


def _parsed_call(text: str) -> ast.Call:
    """Returns the one call that a text is, unevaluated."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a backslash or `1is`, on lines of their own
            # It is parsed into a tree and not evaluated: text from a log or the net may hold any
            # call.
            tree = ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"not a genotype, and not even an expression: {error}") from error
    if not isinstance(tree, ast.Call) or not isinstance(tree.func, ast.Name):
        raise ValueError(f"not a genotype: expected one `Genotype(...)`, got {quoted(text)}")
    return tree


def to_darts(genotype: Genotype) -> str:
    """Writes the named tuple text of DARTS, as quark0/darts logs and evaluates it.

    Raises:
        TypeError: not a :class:`Genotype`.
        ValueError: a node has not exactly two edges, which flat pairs cannot say.
    """
    check_kind(genotype, Genotype)
    flat = _flat_pairs(genotype)
    if flat is None:
        raise ValueError(
            "format 'darts' needs exactly two edges for each node, got "
            f"{_edge_counts(genotype)}; 'ptdarts', 'fairdarts' and 'json' do not"
        )
    return _named_tuple(genotype, *flat)


def to_ptdarts(genotype: Genotype) -> str:
    """Writes the named tuple text of pt.darts, a list for each node.

    Raises:
        TypeError: not a :class:`Genotype`.
    """
    check_kind(genotype, Genotype)
    return _named_tuple(
        genotype, *([list(node) for node in genotype.nodes(cell)] for cell in CELL_TYPES)
    )


def to_fairdarts(genotype: Genotype) -> str:
    """Writes the named tuple text of FairDARTS, (operation, node, predecessor) triples.

    Raises:
        TypeError: not a :class:`Genotype`.
        ValueError: a cell has no edges at all, or ends in an empty node that its concat does
            not name: triples cannot say that such a node exists.
    """
    check_kind(genotype, Genotype)
    for cell in CELL_TYPES:
        edges = genotype.edges(cell)
        # Triples name nodes that have edges; a last node without any shows in the concat alone.
        named = max([*genotype.concat(cell), *(node for _, node, _ in edges)])
        if not edges or named != len(genotype.nodes(cell)) + 1:
            raise ValueError(
                f"format 'fairdarts' cannot tell how many nodes {cell} has, whose nodes have "
                f"{_edge_counts(genotype)} edges; 'ptdarts' and 'json' can"
            )
    return _named_tuple(genotype, *(list(genotype.edges(cell)) for cell in CELL_TYPES))


def to_fields(genotype: Genotype) -> dict[str, Any]:
    """Returns a genotype's four fields: flat pairs where each node has two edges, else lists.

    Raises:
        TypeError: not a :class:`Genotype`.
    """
    check_kind(genotype, Genotype)
    normal, reduce = _flat_pairs(genotype) or (genotype.normal, genotype.reduce)
    values = (normal, genotype.normal_concat, reduce, genotype.reduce_concat)
    return dict(zip(_FIELDS, values))


def from_fields(given: Mapping[str, object]) -> Genotype:
    """Reads a genotype from a JSON object with the four fields; ValueError where it has others."""
    if set(given) != set(_FIELDS):
        raise ValueError(
            f"a genotype has the fields {', '.join(_FIELDS)}, got {', '.join(given) or 'none'}"
        )
    return Genotype(**given)  # type: ignore[arg-type]


def _literal(node: ast.expr, text: str) -> object:
    """Returns the value of a list, tuple, str, int or range expression."""
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
            # `np.int64(0)` is how NumPy 2 prints a 0; the call itself is never made.
            return _literal(wrapped, text)
        case ast.Call(func=ast.Name(id="range"), args=bounds, keywords=[]):
            numbers = [_literal(bound, text) for bound in bounds]
            try:
                # A range is lazy: its length may be any number that the text gives.
                return range(*numbers)  # type: ignore[call-overload]
            except (TypeError, ValueError) as error:
                raise _wrong(node, text, str(error)) from error
    raise _wrong(node, text, "expected a list, a string, a whole number or range(...)")


def _wrong(node: ast.expr, text: str, reason: str) -> ValueError:
    source = ast.get_source_segment(text, node) or ""
    return ValueError(
        f"line {node.lineno}, column {node.col_offset + 1}: {reason}, got {quoted(source)}"
    )


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
    # The public code writes `range(2, 6)` where the nodes are a range.
    return repr(run if nodes == tuple(run) else list(nodes))
