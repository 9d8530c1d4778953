"""Reads settings from a file: JSON, or YAML 1.2 with the types of its core schema."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from fastnas.spaces import strict_json
from fastnas.text_file import read_text

# It counts bytes. A larger file is a mistake, a data set for instance, and is not read into memory.
LARGEST = 1 << 20
# These are the patterns of section 10.3.2 of YAML 1.2 (core schema).
_INTEGER = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(
    r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
)
_NULL = re.compile(r"null|Null|NULL|~|")
_TRUE, _FALSE = re.compile(r"true|True|TRUE"), re.compile(r"false|False|FALSE")


def read_settings_text(path: Path) -> dict[Any, Any]:
    """Reads the settings of a file: JSON where its name ends in .json, else YAML.

    Raises:
        ValueError: it cannot be read, is neither, gives a key twice or holds no mapping.
    """
    text = read_text(path, LARGEST)
    try:
        if path.suffix.lower() == ".json":
            settings = strict_json.loads(text)
        else:
            settings = yaml.load(text, _CoreLoader)
    except RecursionError:
        raise ValueError(f"{path} cannot be read: it is nested too deeply") from None
    except (yaml.YAMLError, ValueError) as error:
        kind = "JSON" if path.suffix.lower() == ".json" else "YAML"
        where = " ".join(str(error).split())
        raise ValueError(f"{path} cannot be read as {kind}: {where}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path} holds {_kind_of(settings)}; a mapping of settings is needed")
    return settings


def number(text: str) -> int | float | str:
    """Returns the number that YAML's core schema reads in a text; the text where it is none.

    Raises:
        ValueError: it has more digits than Python reads.
    """
    if _INTEGER.fullmatch(text):
        return int(text, 0) if text[:2] in ("0o", "0x") else int(text, 10)
    if _FLOAT.fullmatch(text):
        # Python writes inf and nan where YAML has .inf and .nan.
        named = text.lower().lstrip("+-")
        return float(text.replace(".", "", 1)) if named in (".inf", ".nan") else float(text)
    return text


def _kind_of(value: object) -> str:
    return "nothing" if value is None else f"a {type(value).__name__}"


class _CoreLoader(yaml.SafeLoader):
    """Reads what JSON has; YAML 1.1, PyYAML's own, takes 1e-3 for text and 1:30 for 90.

    Dates, sets and merged mappings are not of the core schema, so their texts stay texts.
    """

    # Both tables begin empty: those that PyYAML's class would pass on are YAML 1.1's.
    yaml_implicit_resolvers = {}
    yaml_constructors = {}

    def construct_pairs_once(self, node: yaml.Node) -> dict[Any, Any]:
        try:
            # It is `deep`, because PyYAML otherwise fills nested values only after this has
            # returned.
            return strict_json.without_twins(self.construct_pairs(node, deep=True))
        except (TypeError, ValueError) as error:
            raise yaml.constructor.ConstructorError(
                None, None, str(error), node.start_mark
            ) from None

    def construct_items(self, node: yaml.SequenceNode) -> list[Any]:
        return self.construct_sequence(node, deep=True)


def _add(tag: str, pattern: re.Pattern[str] | None, construct: Any) -> None:
    full = f"tag:yaml.org,2002:{tag}"
    if pattern is not None:
        # PyYAML asks for a match at the beginning only, so `1e-3 per step` would pass for a number.
        anchored = re.compile(f"^(?:{pattern.pattern})$")
        # With None the pattern is tried whatever character the text begins with.
        _CoreLoader.add_implicit_resolver(full, anchored, None)
    _CoreLoader.add_constructor(full, construct)


def _scalar(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> str:
    return loader.construct_scalar(node)


_add("null", _NULL, lambda loader, node: None)
_add("bool", re.compile(f"{_TRUE.pattern}|{_FALSE.pattern}"),
     lambda loader, node: _scalar(loader, node).lower() == "true")  # fmt: skip
_add("int", _INTEGER, lambda loader, node: number(_scalar(loader, node)))
_add("float", _FLOAT, lambda loader, node: number(_scalar(loader, node)))
_add("str", None, _scalar)
_add("seq", None, _CoreLoader.construct_items)
_add("map", None, _CoreLoader.construct_pairs_once)
_CoreLoader.yaml_constructors[None] = yaml.SafeLoader.construct_undefined
