"""Regret curves on a table that is made up."""

import csv

import numpy as np
import pytest
from nb201_tables import rows

from fastnas.benchmarks.search import distribution
from fastnas.spaces.nb201 import NB201Slots

DATA = ("c10", "c100", "in16")


@pytest.fixture
def table(tmp_path):
    """The same accuracies under the names of all three data sets."""
    path = tmp_path / "table.csv"
    with path.open("w", newline="") as file:
        writer = None
        for row in rows():
            row = {"arch_str": row["arch_str"]} | {
                f"{data}_{name}": row[f"c10_{name}"]
                for data in DATA
                for name in ("valid_12ep", "test_200ep")
            }
            writer = writer or csv.DictWriter(file, list(row))
            if file.tell() == 0:
                writer.writeheader()
            writer.writerow(row)
    return path


def test_a_search_is_judged_by_what_it_did_not_see():
    """The incumbent is the best of the accuracies seen, its own test accuracy is the row."""
    slots = NB201Slots()
    seen, judged = distribution.columns("cifar10")
    rng, table = np.random.default_rng(0), {}
    for ops in np.ndindex(*(5,) * 6):
        name = distribution.to_nb201(slots.genotype({"normal": [slots.ops[i] for i in ops]}))
        value = rng.random()
        table[name] = {seen: value, judged: 1 - value}
    found = distribution.searched("random", table, "cifar10", 0)
    assert len(found) == len(distribution.BUDGETS) and found == sorted(found, reverse=True)


def test_rows_go_on_where_they_stopped(table, tmp_path, capsys):
    out, plot = tmp_path / "regret.csv", tmp_path / "regret.png"
    common = [str(table), str(out), "--method", "random", "--method", "evolution"]
    distribution.main([*common, "--data", "cifar10", "--seeds", "1"])
    first = out.read_text()
    pictures = ["--plot", str(plot), "--explained", str(tmp_path / "explained.png")]
    distribution.main([*common, "--seeds", "2", *pictures])
    assert out.read_text().startswith(first)
    kept = distribution.read(out)
    assert len(kept) == 2 * 3 * 2 and len({(r["data"], r["method"], r["seed"]) for r in kept}) == 12
    assert plot.stat().st_size > 1000 and (tmp_path / "explained.png").stat().st_size > 1000
    text = capsys.readouterr().out
    assert "| evolution |" in text and "explains 0." in text
    block = "<!-- distribution:begin -->{}<!-- distribution:end -->"
    page = tmp_path / "page.md"
    page.write_text("before " + block.format(" old ") + " after")
    distribution.main([*common, "--seeds", "2", "--page", str(page)])
    assert "| evolution |" in page.read_text() and " old " not in page.read_text()


def test_evaluations_for_what_random_reaches():
    steps = np.linspace(2.0, 0.1, len(distribution.BUDGETS))
    regrets = {
        ("cifar10", "random"): np.stack([steps + 0.5, steps + 0.7]),
        ("cifar10", "evolution"): np.stack([steps, steps]),
        ("cifar10", "local"): np.stack([steps + 2, steps + 2]),
    }
    lines = {line.split(" | ")[0]: line for line in distribution.summary(regrets).splitlines()}
    assert lines["| random"].endswith(" | 200 |")
    assert lines["| evolution"].endswith(" | 150 |")
    assert lines["| local"].endswith(" | over 200 |")
    assert "0.70 +- 0.20" in lines["| random"]  # 1.96 sd / sqrt(2), sd = 0.2 / sqrt(2)
    assert "0.10 +- 0.00" in lines["| evolution"]
