"""An op's argument list is spelled in few places: a new argument is a line in each of them.

A place is a class or a function, public or not, host code of Triton's kernels included, that names
what the op computes on (the first field of its call) and more than half of all fields of the call,
those of its noise among them: as its own parameters or fields, as arguments of one call, as keys
of one dict, as elements of one tuple, or as words of one text, such as a schema. What is named
belongs to the op of which most is named, and in a file that is called after an op to that op.
`*call` spells nothing, nor does `call._replace(...)`: neither changes when an op gets another
argument. Device functions and their launches are kernels, in Triton as in C++.
"""

from __future__ import annotations

import ast
import functools
import re
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastnas.backends import OPS, calls
from fastnas.backends.calls import Noise

ROOT = Path(__file__).parents[1]
CALLS = {
    "mixed_sum": calls.SumCall,
    "mixed_norm_sum": calls.NormSumCall,
    "mixed_edges": calls.EdgesCall,
    "relu_conv_bn": calls.ConvCall,
    "sample_paths": calls.PathsCall,
}
STRUCTS = {
    "mixed_sum": "MixedSumParams",
    "mixed_norm_sum": "MixedNormSumParams",
    "mixed_edges": "MixedEdgesParams",
    "relu_conv_bn": "ReluConvBnParams",
    "sample_paths": "SamplePathsParams",
}
MOST_IN_PYTHON, MOST_IN_CPP = 4, 2


@functools.cache
def fields(op: str) -> tuple[str, ...]:
    names: list[str] = []
    for name, kind in typing.get_type_hints(CALLS[op]).items():
        names += Noise._fields if kind is Noise else [name]
    return tuple(names)


def name_of(node: ast.AST | None) -> str:
    """x of `x`, of `call.x`, of `*call.x` and of `f(x, ...)`: what is passed on, changed or not."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return node.attr
    if isinstance(node, ast.Starred):
        return name_of(node.value)
    if isinstance(node, ast.Call):
        return name_of(next(iter(node.args), None))
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def spells_nothing(node: ast.Call) -> bool:
    """`call._replace(...)`, `kernel[grid](...)`, or a call of another function of the reference."""
    if not isinstance(node.func, ast.Attribute):
        return isinstance(node.func, ast.Subscript)
    of_reference = name_of(node.func.value) == "reference"
    of_an_op = node.func.attr.startswith(tuple(CALLS))
    return node.func.attr == "_replace" or (of_reference and not of_an_op)


def lists_in(place: ast.AST) -> Iterator[set[str]]:
    """The names in each signature, call, tuple, dict and text of a class or function."""
    doc = getattr(next(iter(getattr(place, "body", [])), None), "value", None)
    for node in ast.walk(place):
        if isinstance(node, ast.arguments):
            every = (*node.posonlyargs, *node.args, *node.kwonlyargs)
            yield {argument.arg for argument in every}
        elif isinstance(node, ast.ClassDef):
            own = {name_of(s.target) for s in node.body if isinstance(s, ast.AnnAssign)}
            yield own.union(Noise._fields) if "noise" in own else own
        elif isinstance(node, ast.Call) and not spells_nothing(node):
            keywords = {k.arg or "" for k in node.keywords}
            yield {name_of(argument) for argument in node.args} | keywords
        elif isinstance(node, ast.Tuple | ast.List):
            yield {name_of(element) for element in node.elts}
        elif isinstance(node, ast.Dict):
            yield {name_of(key) for key in node.keys}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node is not doc:
            yield set(re.findall(r"\w+", node.value))


def places_of(tree: ast.AST) -> Iterator[ast.AST]:
    """Functions, classes without methods, methods, and what stands beside them in a module."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef):
            if not any("jit" in ast.unparse(d) for d in node.decorator_list):
                yield node
        elif isinstance(node, ast.ClassDef):
            methods = [m for m in node.body if isinstance(m, ast.FunctionDef)]
            yield from methods
            rest = [s for s in node.body if s not in methods]
            yield ast.ClassDef(node.name, node.bases, [], rest, [])
        else:
            yield node


def spelled(names: set[str]) -> str | None:
    """The op whose arguments these are, if they are most of one's."""
    found = {}
    for op in CALLS:
        own = fields(op)
        shared = names.intersection(own)
        if own[0] in shared and 2 * len(shared) > len(own):
            found[op] = len(shared)
    return max(found, key=lambda op: found[op], default=None)


def is_asked(path: Path, op: str) -> bool:
    """Whether a file can spell this op's arguments: the reference has a file for each.

    Its others hold what public code does in place of an op, with arguments of the same names.
    """
    return path.stem == op or (path.stem not in CALLS and path.parent.name != "reference")


@functools.cache
def spelled_in(text: str) -> list[tuple[str, set[str | None]]]:
    """The places of a file, and the ops that are spelled in each."""
    return [
        (getattr(place, "name", "a statement"), {spelled(names) for names in lists_in(place)})
        for place in places_of(ast.parse(text))
    ]


def python_places(op: str, text: str) -> list[str]:
    return [place for place, ops in spelled_in(text) if op in ops]


@pytest.mark.parametrize("op", CALLS)
def test_few_places_in_python(op: str) -> None:
    found = {
        path.relative_to(ROOT).as_posix(): names
        for folder in ("fastnas", "kernels")
        for path in sorted((ROOT / folder).rglob("*.py"))
        if is_asked(path, op)
        if (names := python_places(op, path.read_text()))
    }
    assert "fastnas/backends/calls.py" in found
    assert op in found[f"fastnas/ops/{op}.py"]
    assert op in found[f"fastnas/reference/{op}.py"]
    count = sum(map(len, found.values()))
    assert count <= MOST_IN_PYTHON, f"{op} is spelled in {count} places: {found}"


def struct_fields(text: str, struct: str) -> list[str]:
    """The members of a struct of params.h."""
    body = re.search(rf"struct {struct} {{(.*?)\n}};", text, re.DOTALL)
    assert body is not None
    code = re.sub(r"//.*", "", body.group(1))
    return re.findall(r"(\w+)\s*(?:\[[^\]]*\])?\s*(?:=\s*[^,;]*)?[,;]", code)


def cpp_places(names: list[str], text: str) -> list[str]:
    """Functions, structs and statements at the outermost level that name most of the members."""
    chunks = re.split(r"\n(?=\S)", re.sub(r"//.*", "", text))
    return [
        chunk.split("\n")[0]
        for chunk in chunks
        if 2 * len(set(re.findall(r"\w+", chunk)).intersection(names)) > len(names)
    ]


@pytest.mark.parametrize("op", STRUCTS)
def test_few_places_in_the_bindings(op: str) -> None:
    params = (ROOT / "csrc/params.h").read_text()
    names = struct_fields(params, STRUCTS[op])
    assert {"eps", "stats"} <= set(names) or op not in ("mixed_edges", "relu_conv_bn")
    found = [f"struct {STRUCTS[op]}"]
    for path in sorted((ROOT / "csrc").glob("bind_*")):
        found += [
            place
            for place in cpp_places(names, path.read_text())
            if STRUCTS[op] in place or "bind" not in place
        ]
    assert any("bind_" in place for place in found)
    assert len(found) <= MOST_IN_CPP, found


def test_every_op_is_counted() -> None:
    assert set(CALLS) == set(STRUCTS) == set(OPS)


SCHEMA = """
DEFINE = "(Tensor[] x, Tensor w, int[] noisy, str form, Tensor? level, Tensor? rng) -> Tensor"
"""
SPREAD = "def f(call):\n    return g(*call, call.noise, y=call._replace(x=[]))\n"
JIT = "@triton.jit\ndef kernel(x, w, noisy, form, level, rng):\n    pass\n"


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("def f(x, w, noisy, form, level, rng): ...", 1),
        ("def f(call):\n    return g(call.x, call.w, call.noise.form, level=level, rng=rng)", 1),
        ("class C:\n    x: int\n    w: int\n    noisy: int\n    form: int\n", 1),
        ("class C:\n    def f(self, x, w, rng, form): ...\n    def g(self, x, w): ...", 1),
        ("TABLE = {'x': 1, 'w': 2, 'form': 3, 'rng': 4}", 1),
        ("def f(call):\n    x, w, noisy, form, level, rng = call", 1),
        (SCHEMA, 1),
        (SPREAD, 0),
        (JIT, 0),
        ("def f(like, noisy, form, level, rng): ...", 0),  # the noise of any op
    ],
)
def test_the_count_sees_every_way_to_spell_a_list(text: str, count: int) -> None:
    assert len(python_places("mixed_sum", text)) == count
