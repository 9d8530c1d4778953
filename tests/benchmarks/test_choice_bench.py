"""The benchmark of Choice verifies, weighs and times each provider, and writes what it found."""

from __future__ import annotations

import csv
import re
from pathlib import Path

from fastnas.benchmarks.choice import BLOCK, PROVIDERS, Row, figures, main
from fastnas.benchmarks.harness.rows import read_rows

ROOT = Path(__file__).parents[2]


def test_rows_are_verified_and_written(tmp_path, one_thread, capsys) -> None:
    path = tmp_path / "choice.csv"
    given = ["--counts", "2", "3", "--scale", "0.05", "--repeats", "1"]
    assert main([str(path), "--families", "graph", *given]) == 0
    rows = list(csv.DictReader(path.open()))
    assert [row["provider"] for row in rows] == [*PROVIDERS, *PROVIDERS]
    assert {row["candidates"] for row in rows} == {"2", "3"}
    for row in rows:
        assert float(row["differs"]) < 1e-10 and float(row["ms"]) > 0
    eager, minimal = rows[len(PROVIDERS)], rows[-1]
    assert int(minimal["saved_bytes"]) < int(eager["saved_bytes"]) / 10
    assert f"written: {path}" in capsys.readouterr().out.replace("\n", "")


def test_the_page_shows_the_figures_of_its_file() -> None:
    text = (ROOT / "docs" / "choice.md").read_text()
    (source,) = re.findall(r"`(benchmarks/results/\S+-choice\.csv)`", text)
    block = text.partition(f"<!-- {BLOCK}:begin -->\n")[2].partition(f"\n<!-- {BLOCK}:end -->")[0]
    assert block == figures(read_rows(ROOT / source, Row), source)


def test_an_unknown_family_is_refused(capsys) -> None:
    assert main(["--families", "cnn"]) == 2
    assert "'cnn'; allowed: mbconv, transformer, graph" in capsys.readouterr().err
