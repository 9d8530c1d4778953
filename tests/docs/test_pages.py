"""Holds README.md and docs/ to the code: links, paths, snippets, commands, tables, figures."""

import ast
import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

import fastnas
from fastnas.benchmarks.harness import readme
from fastnas.blackbox import BLACK_BOX
from fastnas.cli import command_line
from fastnas.ops import OPS
from fastnas.strategies import STRATEGIES

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
TEXTS = [*(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")), *PAGES]
FOLDERS = ("fastnas", "csrc", "kernels", "benchmarks", "tests", "docs", "examples", ".github")
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")

every_text = pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)


def prose(path: Path) -> str:
    return FENCED.sub("", path.read_text())


def snippets(path: Path, language: str) -> Iterator[str]:
    return (code for kind, code in FENCED.findall(path.read_text()) if kind == language)


def anchors(path: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and Python-Markdown make them."""
    headings = re.findall(r"^#+ (.+)$", prose(path), re.MULTILINE)
    words = (re.sub(r"[^\w\s-]", "", heading).strip().lower() for heading in headings)
    return {re.sub(r"[\s]+", "-", text) for text in words}


def targets(path: Path) -> Iterator[tuple[Path, str]]:
    """File and anchor of every link within the repository."""
    for link in LINK.findall(prose(path)):
        if "://" not in link and not link.startswith("mailto:"):
            name, _, anchor = link.partition("#")
            yield (path.parent / name).resolve() if name else path, anchor


@every_text
def test_links_lead_somewhere(path: Path) -> None:
    for target, anchor in targets(path):
        assert target.exists(), f"{path.name} links to {target}"
        assert not anchor or anchor in anchors(target), f"{path.name}: no #{anchor} in {target}"
        assert path.parent != DOCS or DOCS in target.parents, f"{path.name}: {target} is no page"


@every_text
def test_paths_that_are_named_exist(path: Path) -> None:
    if path.name == "CHANGELOG.md":  # it tells of files that were
        return
    for name in re.findall(r"`([\w.-]+/[\w./-]*)`", prose(path)):
        if name.split("/")[0] in FOLDERS:
            assert (ROOT / name).exists(), f"{path.name} names {name}"


@every_text
def test_python_snippets_import_what_there_is(path: Path) -> None:
    for code in snippets(path, "python"):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fastnas"):
                module = importlib.import_module(node.module or "")
                for alias in node.names:
                    assert hasattr(module, alias.name), f"{path.name}: {ast.unparse(node)}"
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "fastnas":
                assert hasattr(fastnas, node.attr), f"{path.name}: {ast.unparse(node)}"


@every_text
def test_commands_and_their_flags_exist(path: Path) -> None:
    commands = typer.main.get_command(command_line()).commands  # type: ignore[attr-defined]
    for code in snippets(path, "sh"):
        for line in code.splitlines():
            words = shlex.split(line, comments=True)
            if not words or words[0] != "fastnas":
                continue
            assert words[1] in commands, f"{path.name}: {line}"
            known = {
                flag
                for parameter in commands[words[1]].params
                for flag in (*parameter.opts, *parameter.secondary_opts)
            }
            flags = {word for word in words if word.startswith("--")}
            assert flags <= known, f"{path.name}: {line}: {flags - known}"


def test_make_targets_exist() -> None:
    known = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for path in TEXTS:
        for code in snippets(path, "sh"):
            for target in re.findall(r"^make ([a-z]+)", code, re.MULTILINE):
                assert target in known, f"{path.name}: make {target}"


def test_every_use_is_two_clicks_from_the_readme() -> None:
    reached, clicks = {ROOT / "README.md": 0}, 0
    while clicks < 2:
        clicks += 1
        for page in [page for page in reached if page.suffix == ".md"]:
            for target, _ in targets(page):
                reached.setdefault(target, clicks)
    for use in ("drop-in.md", "searching.md", "benchmarks.md"):
        assert reached[DOCS / use] <= 2
    assert set(PAGES) <= set(reached)


def test_the_readme_is_short() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 150
    block = text.partition("headline:begin")[2].partition("headline:end")[0]
    assert block.count("\n| ") == 1 + 6


def test_figures_are_those_of_the_results(capsys: pytest.CaptureFixture[str]) -> None:
    block = (DOCS / "benchmarks.md").read_text().partition("figures:begin")[2]
    csvs = re.findall(r"`(benchmarks/results/\S+\.csv)`", block.partition("figures:end")[0])
    assert csvs
    block = (DOCS / "drop-in.md").read_text().partition("drop-in:begin")[2]
    csvs += re.findall(r"`(benchmarks/results/\S+\.csv)`", block.partition("drop-in:end")[0])
    assert readme.main([*csvs, "--root", str(ROOT), "--check"]) == 0, capsys.readouterr().err


def test_tables_name_every_op_and_method() -> None:
    assert set(re.findall(r"^\| `(\w+)` \|", prose(DOCS / "ops.md"), re.MULTILINE)) == set(OPS)
    named = set(re.findall(r"`([a-z0-9-]+)`", prose(DOCS / "methods.md")))
    assert set(STRATEGIES) <= named
    named |= set(re.findall(r"`([a-z0-9-]+)`", prose(DOCS / "distribution.md")))
    assert set(BLACK_BOX) <= named


def test_ops_are_said_to_have_the_backends_that_they_have() -> None:
    rows = re.findall(r"^\| `(\w+)` \|.*\| ([^|]+) \|$", prose(DOCS / "ops.md"), re.MULTILINE)
    for stem, backends in rows:
        # Other tests enter the CUDA sources as compiled for the host, which is no user's backend.
        there = set(OPS[stem].dtypes) - {"cuda-host"}
        assert {name.lower() for name in backends.split(", ")} == there, stem


def test_the_api_page_shows_every_public_name() -> None:
    shown = re.findall(r"^::: ([\w.]+)$", (DOCS / "api.md").read_text(), re.MULTILINE)
    for name in shown:
        module, _, attribute = name.rpartition(".")
        assert hasattr(importlib.import_module(module), attribute), name
    names = {name.rpartition(".")[2] for name in shown}
    assert {name for name in fastnas.__all__ if not name.startswith("__")} <= names


def test_versions_agree() -> None:
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {fastnas.__version__}\n" in citation
    assert f"version = {{{fastnas.__version__}}}" in (DOCS / "papers.md").read_text()


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text().partition("\nnav:\n")[2].partition("\n\n")[0]
    assert sorted(re.findall(r"[\w-]+\.md", navigation)) == [page.name for page in PAGES]
