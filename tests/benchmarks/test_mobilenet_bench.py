"""The benchmark of the MobileNet-like supernet weighs and times each setting, or counts eager."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest

from fastnas.benchmarks import mobilenet
from fastnas.benchmarks.harness.rows import read_rows
from fastnas.benchmarks.mobilenet import BLOCK, Row, counted, figures, main
from fastnas.nn.choice import CHOICE_MEMORY
from fastnas.spaces import MobileSpace

ROOT = Path(__file__).parents[2]


@pytest.fixture
def small(monkeypatch) -> None:
    """A column of three stages, so that a step takes a moment."""
    space = MobileSpace(stages=((16, 2, 2), (24, 2, 2), (32, 1, 1)), stem=16, first=8, head=64)
    for name in ("SPACE", "VERIFIED"):
        monkeypatch.setattr(mobilenet, name, space)


def test_rows_are_verified_measured_and_written(small, tmp_path, one_thread, capsys) -> None:
    path = tmp_path / "mobilenet.csv"
    assert main([str(path), "--cases", "32x2", "--repeats", "1"]) == 0
    rows = read_rows(path, Row)
    assert [row.memory for row in rows] == list(CHOICE_MEMORY)
    assert {(row.how, row.size, row.batch) for row in rows} == {("measured", 32, 2)}
    eager, lean, recompute, minimal = rows
    assert minimal.saved_bytes < recompute.saved_bytes < lean.saved_bytes < eager.saved_bytes
    assert eager.saved_bytes == counted(32, 2)
    for row in rows:
        assert row.differs < 1e-10 and row.ms > 0 and row.peak_bytes >= row.saved_bytes
        assert abs(row.peak_share - row.peak_bytes / eager.peak_bytes) < 1e-3
    assert f"written: {path}" in capsys.readouterr().out.replace("\n", "")


def test_eager_is_counted_where_it_does_not_fit(small, tmp_path, one_thread) -> None:
    path, page = tmp_path / "mobilenet.csv", tmp_path / "page.md"
    page.write_text(f"<!-- {BLOCK}:begin -->\n<!-- {BLOCK}:end -->\n")
    given = ["--cases", "32x2", "--repeats", "1", "--most", "0", "--page", str(page)]
    assert main([str(path), *given]) == 0
    eager, *others = read_rows(path, Row)
    assert eager.how == "counted" and eager.peak_bytes == eager.saved_bytes == counted(32, 2)
    assert math.isnan(eager.ms) and all(math.isnan(row.time_ratio) for row in others)
    assert {row.how for row in others} == {"measured"}
    assert re.search(r'2 of 32x32 \| `"eager"`, counted \| - \| - \|', page.read_text())


def test_the_page_shows_the_figures_of_its_file() -> None:
    text = (ROOT / "docs" / "mobilenet.md").read_text()
    (source,) = re.findall(r"`(benchmarks/results/\S+-mobilenet\.csv)`", text)
    block = text.partition(f"<!-- {BLOCK}:begin -->\n")[2].partition(f"\n<!-- {BLOCK}:end -->")[0]
    assert block == figures(read_rows(ROOT / source, Row), source)


def test_another_case_is_refused(capsys) -> None:
    for case in ("224", "0x2", "224x16x3"):
        assert main(["--cases", case]) == 2
        assert f"case '{case}'; SIZExBATCH is needed" in capsys.readouterr().err
