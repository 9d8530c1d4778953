"""Reads JSON as its standard has it: no key twice, no NaN, refusals in one short line."""

from __future__ import annotations

import json
from typing import Any, NoReturn


def loads(text: str) -> Any:
    """Reads JSON.

    Raises:
        ValueError: it is no JSON, gives a key twice, nests too deeply or has a number of more
            digits than Python reads; the message fits on a line.
    """
    try:
        # Python's own reader also takes NaN and Infinity, which are no JSON.
        return json.loads(text, object_pairs_hook=without_twins, parse_constant=_refuse)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def without_twins(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    """Returns the mapping of the pairs; ValueError for a key that is given twice.

    Python's reader keeps the last of them, so a setting would be ignored without a word.
    """
    found: dict[Any, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"key {str(key)[:60]!r} is given twice")
        found[key] = value
    return found


def _refuse(token: str) -> NoReturn:
    raise ValueError(f"{token} is no number of JSON")
