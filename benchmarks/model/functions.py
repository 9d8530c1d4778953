"""Tells which functions of the source an instruction comes from, inlined ones included."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from fastnas.benchmarks.model.sass import Instruction

_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/|\"(?:\\.|[^\"\\\n])*\"", re.DOTALL)
_DECLARED = re.compile(r"\b(?:__device__|__global__|FASTNAS_HD)\b")
_NAMED = re.compile(r"\b(?!__launch_bounds__)(\w+)\s*\(")


def functions_of(instruction: Instruction) -> tuple[str, ...]:
    """Names the functions that an instruction is part of, the innermost first."""
    names = (_function_at(file, line) for file, line in instruction.frames)
    return tuple(name for name in names if name)


@lru_cache(maxsize=1 << 16)
def _function_at(file: str, line: int) -> str:
    starts, spans = _functions(Path(file))
    # Of those that contain the line the one that begins last is the innermost.
    for _, last, name in reversed(spans[: bisect_right(starts, line)]):
        if line <= last:
            return name
    return ""


@lru_cache
def _functions(source: Path) -> tuple[list[int], list[tuple[int, int, str]]]:
    """Lists first line, last line and name of each device function of a file."""
    if not source.is_file():
        return [], []
    spans = sorted(_spans(source.read_text()))
    return [first for first, _, _ in spans], spans


def _spans(text: str) -> Iterator[tuple[int, int, str]]:
    # Comments and strings may hold braces; their lines stay, so that lines are counted right.
    text = _COMMENT.sub(lambda found: re.sub(r"[^\n]", " ", found.group()), text)
    for declared in _DECLARED.finditer(text):
        named = _NAMED.search(text, declared.end())
        if named is None:
            continue
        body = _after_closing(text, named.end() - 1, "()")
        opened = re.compile(r"[^;{]*").match(text, body)
        assert opened is not None
        if text[opened.end() : opened.end() + 1] != "{":
            continue  # a declaration
        end = _after_closing(text, opened.end(), "{}")
        first, last = (text.count("\n", 0, at) + 1 for at in (declared.start(), end))
        yield first, last, named.group(1)


def _after_closing(text: str, opened: int, pair: str) -> int:
    """Returns the place behind the bracket that closes the one at `opened`."""
    depth = 0
    for found in re.compile(f"[{re.escape(pair)}]").finditer(text, opened):
        depth += 1 if found.group() == pair[0] else -1
        if depth == 0:
            return found.end()
    return len(text)
