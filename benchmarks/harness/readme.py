"""Writes the figures of README.md, docs/benchmarks.md and docs/drop-in.md from CSVs of results.

python -m fastnas.benchmarks.harness.readme CSV ...
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from fastnas.benchmarks import drop_in_rows
from fastnas.benchmarks.harness.headline import headline, step_figure
from fastnas.benchmarks.harness.page_tables import figures, path_figures
from fastnas.benchmarks.harness.rows import has_rows, read_rows
from fastnas.benchmarks.harness.schema import Row, read_csv
from fastnas.files import write_text
from fastnas.report.figures import save_figure

README = Path("README.md")
PAGE = Path("docs/benchmarks.md")
DROP_IN_PAGE = Path("docs/drop-in.md")
PICTURE = Path("docs/pictures/search-step.png")

HEADLINE, FIGURES, PATHS, DROP_IN = "headline", "figures", "paths", "drop-in"
"""Blocks of a page, between `<!-- NAME:begin -->` and `<!-- NAME:end -->`."""


def updated(text: str, name: str, block: str) -> str:
    """Returns a page with the block between its markers replaced; ValueError without markers."""
    begin_marker, end_marker = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    before, begin, rest = text.partition(begin_marker)
    _, end, after = rest.partition(end_marker)
    if not begin or not end:
        raise ValueError(f"the page has no {begin_marker} ... {end_marker}")
    return f"{before}{begin_marker}\n{block}\n{end_marker}{after}"


def publish(path: Path, table: Table, page: Path | None, block: str, text: str) -> None:
    """Prints a table of what a CSV holds, and puts a text into a block of a page, if any."""
    Console().print(table)
    print(f"written: {path}")
    if page is not None:
        write_text(page, updated(page.read_text(), block, text))


def fresh_pages(root: Path, rows: Sequence[Row], source: str) -> dict[Path, str]:
    """Returns the two pages as they are to be, by their paths."""
    page = updated((root / PAGE).read_text(), FIGURES, figures(rows, source))
    if any(row.suite == "paths" for row in rows):
        page = updated(page, PATHS, path_figures(rows))
    front = updated((root / README).read_text(), HEADLINE, headline(rows))
    return {root / README: front, root / PAGE: page}


def drop_in_page(root: Path, rows: Sequence[drop_in_rows.Row], source: str) -> dict[Path, str]:
    """Returns the page of `accelerate` as it is to be, by its path."""
    path = root / DROP_IN_PAGE
    return {path: updated(path.read_text(), DROP_IN, drop_in_rows.figures(rows, source))}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("csvs", type=Path, nargs="+", help="results of one device")
    parser.add_argument("--root", type=Path, default=Path(), help="the folder of README.md")
    parser.add_argument("--check", action="store_true", help="fail if a page is stale")
    given = parser.parse_args(arguments)
    try:
        of_drop_in = [csv for csv in given.csvs if has_rows(given.root / csv, drop_in_rows.Row)]
        others = [csv for csv in given.csvs if csv not in of_drop_in]
        rows = [row for csv in others for row in read_csv(given.root / csv)]
        found = [r for csv in of_drop_in for r in read_rows(given.root / csv, drop_in_rows.Row)]
        fresh = fresh_pages(given.root, rows, _named(others)) if others else {}
        fresh |= drop_in_page(given.root, found, _named(of_drop_in)) if of_drop_in else {}
        # Pages that say the same are not written: their times of change stay.
        stale = {path: text for path, text in fresh.items() if path.read_text() != text}
        if given.check:
            for path in stale:
                print(f"readme: {path} is not what {_named(given.csvs)} gives", file=sys.stderr)
            return int(bool(stale))
        for path, text in stale.items():
            write_text(path, text)
        if others:
            save_figure(step_figure(rows), given.root / PICTURE)
    except (OSError, ValueError) as error:
        print(f"readme: {error}", file=sys.stderr)
        return 2
    return 0


def _named(csvs: Sequence[Path]) -> str:
    return "`, `".join(csv.as_posix() for csv in csvs)


if __name__ == "__main__":
    sys.exit(main())
