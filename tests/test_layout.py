"""Holds the order of the house: imports run one way, every op is in the same places."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest

from fastnas.ops import OPS
from fastnas.spaces import LAYOUTS

ROOT = Path(__file__).parents[1]
CODE = ("fastnas", "kernels", "benchmarks", "csrc", "tests")
NATIVE = {"_C", "_cuda"}
CHECKS = {"bounds", "checks", "options"}  # of arguments; every part may import them

# What the modules of each part may import of fastnas, besides their own part and the version.
MAY_IMPORT: dict[str, set[str]] = {
    "allocator": set(),
    "files": set(),
    "processes": set(),
    "saved_bytes": set(),
    "signals": set(),
    "extras": {"signals"},
    "text_file": set(),
    "transfer": set(),
    "spaces": set(),
    "kernels": set(),
    "layers": {"spaces"},
    "reference": {"layers", "spaces"},
    "backends": {"reference", "spaces", "kernels", *NATIVE},
    "ops": {"backends", "reference", "spaces", "transfer"},
    "info": {"ops", "backends", *NATIVE},
    "nn": {"ops", "backends", "spaces", "layers", "reference", "transfer"},
    "dropin": {"nn", "ops", "backends", "reference", "spaces", "saved_bytes"},
    "report": {"spaces", "reference", "extras", "files"},
    "data": {"processes", "reference", "extras", "text_file", "transfer"},
    "strategies": {"nn", "ops", "spaces", "processes", "reference", "extras", "transfer"},
    "search": {
        *("data", "strategies", "nn", "ops", "backends", "reference", "spaces"),
        *("extras", "files", "processes", "signals", "text_file", "transfer"),
    },
    "evaluators": {
        *("search", "data", "strategies", "nn", "reference", "spaces"),
        *("extras", "text_file"),
    },
    "blackbox": {
        *("evaluators", "search", "strategies", "spaces"),
        *("extras", "signals", "text_file"),
    },
    "runs": {
        *("blackbox", "evaluators", "search", "data", "report", "strategies"),
        *("nn", "reference", "spaces", "extras", "files", "processes", "saved_bytes", "text_file"),
    },
}
MAY_IMPORT["cli"] = {*MAY_IMPORT, "benchmarks", *NATIVE}


def sources(*suffixes: str) -> Iterator[Path]:
    for folder in CODE:
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in suffixes and "__pycache__" not in path.parts:
                yield path


def part_of(path: Path) -> str:
    """fastnas/nn/cell.py -> nn; fastnas/cli.py -> cli; kernels/noise.py -> kernels."""
    inside = path.relative_to(ROOT)
    if inside.parts[0] != "fastnas":
        return inside.parts[0]
    return inside.parts[1].removesuffix(".py")


def imported_parts(path: Path) -> set[str]:
    """The parts of fastnas that a file imports, wherever in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.relative_to(ROOT)}: relative import"
            assert node.module is not None
            deeper = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= deeper if node.module == "fastnas" else {node.module}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            # importlib.import_module("fastnas.kernels.mixed_sum")
            names |= set(re.findall(r"^fastnas(?:\.\w+)+$", node.value))
    return {name.split(".")[1] for name in names if name.startswith("fastnas.")}


@pytest.mark.parametrize("part", MAY_IMPORT)
def test_imports_run_one_way(part: str) -> None:
    allowed = MAY_IMPORT[part] | {part, "_version", "__version__", *CHECKS}
    for path in sources(".py"):
        if part_of(path) == part:
            wrong = imported_parts(path) - allowed
            assert not wrong, f"{path.relative_to(ROOT)} imports {', '.join(sorted(wrong))}"


def test_no_circle_of_imports() -> None:
    """A part may import only parts that are above it in the table."""
    seen: set[str] = set(NATIVE)
    for part, allowed in MAY_IMPORT.items():
        assert allowed - {"benchmarks", part} <= seen, part
        seen.add(part)


def test_every_part_has_its_rule() -> None:
    known = {*MAY_IMPORT, *CHECKS, "__init__", "__main__", "_version"}
    found = {part_of(path) for path in (ROOT / "fastnas").rglob("*.py")}
    assert found <= known


@pytest.mark.parametrize("stem", OPS)
def test_every_op_is_in_the_same_places(stem: str) -> None:
    op = OPS[stem]
    assert op.stem == stem
    backends = {"cpu": f"csrc/cpu/{stem}.cpp", "cuda": f"csrc/cuda/{stem}.cu",
                "triton": f"kernels/{stem}.py"}  # fmt: skip
    places = [f"fastnas/reference/{stem}.py", f"fastnas/ops/{stem}.py",
              f"tests/ops/test_{stem}.py", f"benchmarks/ops/{stem}.py"]  # fmt: skip
    # An op that needs no kernel of its own on a GPU is written once for all backends there.
    shared = f"fastnas/backends/{stem}.py"
    if (ROOT / shared).is_file():
        backends |= {"cuda": shared, "triton": shared}
    places += [place for name, place in backends.items() if name not in op.absent]
    if not {"cpu", "cuda"} <= set(op.absent):
        places.append(f"csrc/formulas/{stem}.h")
    missing = [place for place in places if not (ROOT / place).is_file()]
    assert not missing
    for name in backends:
        assert (name in op.dtypes) != (name in op.absent), f"{stem}: {name} is both or neither"
    assert all(op.absent.values()), "a backend is absent without a reason"
    assert "eager" in op.dtypes


def equation(path: Path) -> list[str]:
    """The first two lines of text: of a module's docstring, or of a header's comment."""
    if path.suffix == ".py":
        text = ast.get_docstring(ast.parse(path.read_text()), clean=True)
        assert text is not None
        lines = text.splitlines()
    else:
        lines = [line.removeprefix("//") for line in path.read_text().splitlines()]
    return [line.strip() for line in lines if line.strip()][:2]


@pytest.mark.parametrize("stem", OPS)
def test_every_spelling_has_the_same_equation(stem: str) -> None:
    spellings = [ROOT / f"fastnas/reference/{stem}.py", ROOT / f"csrc/formulas/{stem}.h",
                 ROOT / f"kernels/{stem}.py"]  # fmt: skip
    first, *others = [equation(path) for path in spellings if path.is_file()]
    assert "=" in first[0]
    assert all(other == first for other in others)


OWN_MODULES = {
    *(f"spaces/{name}.py" for name in ("darts", "darts_text", "nb201", "graph")),
    *("spaces/layouts.py", "spaces/space.py"),
    *("layers/nb201.py", "nn/nb201.py", "nn/nb201_eval.py", "reference/nb201_search.py"),
    "evaluators/table.py",  # the published tables are of one layout
}


def names_a_layout(node: ast.expr) -> bool:
    """Whether an expression is the name of a layout, or the class of its genotypes or cells."""
    match node:
        case ast.Constant(value=str(text)):
            return text in LAYOUTS
        case ast.Name(id=name) | ast.Attribute(attr=name):
            known = re.search("NB201|GraphGenotype|GraphSlots", name)
            return bool(known) and not name.startswith("to_")
        case ast.Tuple(elts=items) | ast.List(elts=items) | ast.Set(elts=items):
            return any(map(names_a_layout, items))
    return False


def branches_on_a_layout(node: ast.AST) -> bool:
    """A comparison with a layout's name, a test for its classes, or a twin of it by name."""
    match node:
        case ast.Compare(left=left, comparators=others):
            return any(map(names_a_layout, [left, *others]))
        case ast.Call(func=ast.Name(id="isinstance" | "issubclass"), args=[_, kind]):
            return names_a_layout(kind) or (isinstance(kind, ast.Name) and kind.id == "Genotype")
        case ast.MatchValue(value=value):
            return names_a_layout(value)
        case ast.FunctionDef(name=name) | ast.AnnAssign(target=ast.Name(id=name)):
            return bool(re.search("_(nb201|darts)$", name))
    return False


def test_only_a_layout_knows_its_name() -> None:
    """Everything else asks the layout of a space or of a genotype."""
    for path in sorted((ROOT / "fastnas").rglob("*.py")):
        if path.relative_to(ROOT / "fastnas").as_posix() in OWN_MODULES:
            continue
        found = [n for n in ast.walk(ast.parse(path.read_text())) if branches_on_a_layout(n)]
        assert not found, f"{path.relative_to(ROOT)}: {[ast.unparse(n)[:60] for n in found]}"


@pytest.mark.parametrize(
    "code",
    [
        "if space.layout == 'nb201': pass",
        "if 'darts' != layout: pass",
        "if layout in ('nb201', other): pass",
        "isinstance(cell, NB201Genotype)",
        "isinstance(cell, Genotype)",
        "match layout:\n case 'nb201': pass",
        "class S:\n defaults_nb201: int = 0",
        "def derive_nb201(): pass",
    ],
)
def test_a_branch_on_a_layout_is_found(code: str) -> None:
    assert any(map(branches_on_a_layout, ast.walk(ast.parse(code))))


def test_no_file_is_called_utils() -> None:
    called = [path for path in sources(".py", ".h", ".cpp", ".cu") if "utils" in path.stem]
    assert not called


def test_native_code_includes_no_torch() -> None:
    torch_header = re.compile(r'#\s*include\s*[<"](torch|ATen|c10|TH|THC)/')
    for path in sources(".h", ".cpp", ".cu"):
        assert not torch_header.search(path.read_text()), path.relative_to(ROOT)


def test_only_the_bindings_know_python() -> None:
    python_header = re.compile(r'#\s*include\s*[<"](pybind11|Python)')
    for path in sources(".h", ".cpp", ".cu"):
        if not path.name.startswith("bind_"):
            assert not python_header.search(path.read_text()), path.relative_to(ROOT)


def test_tests_and_benchmarks_define_no_second_specification() -> None:
    names = re.compile(r"^reference|Ref$|Reference$")
    for path in sources(".py"):
        if part_of(path) not in ("tests", "benchmarks"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                assert not names.search(node.name), f"{path.relative_to(ROOT)}: {node.name}"


def test_fastnas_imports_no_benchmarks_or_tests() -> None:
    for path in sources(".py"):
        if part_of(path) in ("benchmarks", "tests", "cli"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {m.split(".")[0] for m in modules} & {"benchmarks", "tests"}, path.name


def test_pytest_enters_every_folder_of_tests(pytestconfig: pytest.Config) -> None:
    """By its defaults it passes by folders that are called build or dist."""
    passed_by = pytestconfig.getini("norecursedirs")
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        for folder in path.relative_to(ROOT).parts[:-1]:
            assert not any(fnmatch(folder, pattern) for pattern in passed_by), path
