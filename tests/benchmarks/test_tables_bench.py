"""Regret on tables of packages that are made up."""

from pathlib import Path

import numpy as np
import pytest
from package_tables import graph_package, graph_records, hpo_package, hpo_records

from fastnas.benchmarks.search import tables
from fastnas.blackbox import BLACK_BOX
from fastnas.evaluators import TableEvaluator
from fastnas.evaluators.graph_table import GraphTable


@pytest.fixture
def packages(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(hpo_package(tmp_path, hpo_records()))
    monkeypatch.syspath_prepend(graph_package(tmp_path, graph_records()))
    # Proteins have the smallest table, which is quick to make.
    monkeypatch.setattr(tables, "GraphTable", lambda data: GraphTable("proteins"))


def test_a_search_is_judged_by_the_best_of_the_table(packages):
    table = GraphTable("proteins")
    found = tables.searched("evolution", table, 0)
    assert set(found) == {"valid", "test"}
    assert all(len(regrets) == len(tables.BUDGETS) for regrets in found.values())
    # What is seen only gets better. Here test is 1 - valid, so that it only gets worse.
    assert found["valid"] == sorted(found["valid"], reverse=True) and found["valid"][-1] >= 0
    assert found["test"] == sorted(found["test"])
    best, worst = table.best("valid"), 1 - table.best("test")
    sums = np.add(found["valid"], found["test"])
    assert sums == pytest.approx(100 * (best - worst))
    column = "c100_valid_200ep"
    assert set(tables.searched("random", TableEvaluator(tables.NAME, column, column), 0)) == {
        column
    }


def test_rows_go_on_where_they_stopped(packages, tmp_path, capsys):
    out, plot, page = (tmp_path / name for name in ("regret.csv", "regret.png", "page.md"))
    common = [str(out), "--method", "random", "--method", "evolution"]
    tables.main([*common, "--seeds", "1"])
    first = out.read_text()
    page.write_text("before <!-- tables:begin --> old <!-- tables:end --> after")
    tables.main([*common, "--seeds", "3", "--plot", str(plot), "--page", str(page)])
    assert out.read_text().startswith(first)
    rows = tables.read(out)
    # Three columns of two tables, two methods, three seeds.
    assert len(rows) == 18 and len({tuple(row.values())[:4] for row in rows}) == 18
    assert plot.stat().st_size > 1000
    text = page.read_text()
    assert text.startswith("before ") and " old " not in text and "| evolution |" in text
    assert "mean and 95 % interval of 3 searches" in capsys.readouterr().out


def test_what_is_no_better_than_random_is_said():
    ends = {"random": (2.0, 2.2), "local": (1.0, 1.1), "evolution": (1.7, 2.3)}
    regrets = {
        (*judged, method): np.tile(np.asarray(end)[:, None], (1, len(tables.BUDGETS)))
        for judged in tables.JUDGED
        for method, end in ends.items()
    }
    text = tables.summary(regrets)
    assert "| local | 1.05 +- 0.10 |" in text and "| random | 2.10 +- 0.20 |" in text
    beaten = text.rpartition("reaches 0): ")[2]
    assert "`evolution` on cora, test" in beaten and "`local`" not in beaten
    assert "`random`" not in beaten


def test_the_page_is_of_the_results():
    root = Path(__file__).parents[2]
    rows = tables.read(root / "benchmarks" / "results" / "table-regret.csv")
    methods = {row["method"] for row in rows}
    # Other tests may have entered methods of their own.
    assert methods <= set(BLACK_BOX) and len(methods) == 9
    assert len(rows) == tables.SEEDS * len(methods) * len(tables.JUDGED)
    page = (root / "docs" / "tables.md").read_text()
    assert tables.summary(tables.gathered(rows)) in page
