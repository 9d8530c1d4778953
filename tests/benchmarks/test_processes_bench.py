"""The benchmark of several processes times groups in turn, and writes a row for each."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fastnas.benchmarks import processes
from fastnas.benchmarks.harness.rows import read_rows
from fastnas.benchmarks.processes import BLOCK, Row, Work, figures, main

ROOT = Path(__file__).parents[2]


def test_rows_are_medians_in_turn(tmp_path, monkeypatch) -> None:
    asked: list[Work] = []

    def seconds_of(work: Work) -> list[float]:
        asked.append(work)
        return [1.0 / work.size] * work.steps

    monkeypatch.setattr(processes, "seconds_of", seconds_of)
    page = tmp_path / "page.md"
    page.write_text(f"<!-- {BLOCK}:begin -->\n<!-- {BLOCK}:end -->\n")
    path = tmp_path / "rows.csv"
    assert main([str(path), "--batch", "8", "--rounds", "2", "--page", str(page)]) == 0
    assert [(w.size, w.threads) for w in asked[:4]] == [(2, 1), (1, 2), (1, 2), (2, 1)]
    rows = read_rows(path, Row)
    assert [(r.method, r.spread) for r in rows[::2]] == [c[:2] for c in processes.CASES]
    one, two = rows[:2]
    assert (one.ms, one.speed, one.images_per_second) == (1000, 1, 16)
    assert (two.ms, two.speed, two.images_per_second) == (500, 2, 32)
    assert "| darts | batches | 2 x 1 | 32 | 2.00 |" in page.read_text()


@pytest.mark.slow
def test_processes_make_the_steps_of_a_search(tmp_path) -> None:
    work = Work("rome", "samples", 2, 8, 2, 1, 1, 2, 1, "")
    (seconds,) = processes.seconds_of(work)
    assert seconds > 0


def test_a_group_that_is_none(capsys) -> None:
    assert main(["--groups", "2"]) == 2
    assert "group '2'; PROCESSESxTHREADS is needed, such as 2x1" in capsys.readouterr().err


def test_the_page_shows_the_last_rows() -> None:
    text = (ROOT / "docs/processes.md").read_text()
    block = text.split(f"<!-- {BLOCK}:begin -->")[1].split(f"<!-- {BLOCK}:end -->")[0].strip()
    source = re.search(r"generated from `([^`]*)`", block)
    assert source is not None
    assert figures(read_rows(ROOT / source[1], Row), source[1]) == block
