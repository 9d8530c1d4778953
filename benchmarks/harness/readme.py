"""Writes the figures of README.md and docs/benchmarks.md from CSVs of results.

python -m fastnas.benchmarks.harness.readme CSV ...
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from fastnas.benchmarks.harness.headline import headline, step_figure
from fastnas.benchmarks.harness.page_tables import figures, path_figures
from fastnas.benchmarks.harness.schema import Row, read_csv
from fastnas.files import write_text
from fastnas.report.figures import save_figure

README = Path("README.md")
PAGE = Path("docs/benchmarks.md")
PICTURE = Path("docs/pictures/search-step.png")

HEADLINE, FIGURES, PATHS = "headline", "figures", "paths"
"""Blocks of a page, between `<!-- NAME:begin -->` and `<!-- NAME:end -->`."""


def updated(text: str, name: str, block: str) -> str:
    """Returns a page with the block between its markers replaced; ValueError without markers."""
    begin_marker, end_marker = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    before, begin, rest = text.partition(begin_marker)
    _, end, after = rest.partition(end_marker)
    if not begin or not end:
        raise ValueError(f"the page has no {begin_marker} ... {end_marker}")
    return f"{before}{begin_marker}\n{block}\n{end_marker}{after}"


def fresh_pages(root: Path, rows: Sequence[Row], source: str) -> dict[Path, str]:
    """Returns the two pages as they are to be, by their paths."""
    page = updated((root / PAGE).read_text(), FIGURES, figures(rows, source))
    if any(row.suite == "paths" for row in rows):
        page = updated(page, PATHS, path_figures(rows))
    front = updated((root / README).read_text(), HEADLINE, headline(rows))
    return {root / README: front, root / PAGE: page}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("csvs", type=Path, nargs="+", help="results of one device")
    parser.add_argument("--root", type=Path, default=Path(), help="the folder of README.md")
    parser.add_argument("--check", action="store_true", help="fail if a page is stale")
    given = parser.parse_args(arguments)
    source = "`, `".join(csv.as_posix() for csv in given.csvs)
    try:
        rows = [row for csv in given.csvs for row in read_csv(given.root / csv)]
        fresh = fresh_pages(given.root, rows, source)
        # Pages that say the same are not written: their times of change stay.
        stale = {path: text for path, text in fresh.items() if path.read_text() != text}
        if given.check:
            for path in stale:
                print(f"readme: {path} is not what {source} gives", file=sys.stderr)
            return int(bool(stale))
        for path, text in stale.items():
            write_text(path, text)
        save_figure(step_figure(rows), given.root / PICTURE)
    except (OSError, ValueError) as error:
        print(f"readme: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
