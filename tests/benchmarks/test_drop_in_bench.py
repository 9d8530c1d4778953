"""The benchmark of accelerate on public layouts: its rows, and that a loss is among them."""

from __future__ import annotations

import csv

import pytest
import torch

import fastnas
from fastnas.benchmarks import drop_in

SMALL = [*("--channels", "4", "--layers", "3", "--batch", "2", "--size", "8"), "--repeats", "1"]


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def rows_of(tmp_path, *arguments):
    path = tmp_path / "out.csv"
    drop_in.main([str(path), *SMALL, "--threads", "1", *arguments])
    return list(csv.DictReader(path.open(newline="")))


def test_a_row_per_layout(tmp_path):
    darts, sgas = rows_of(tmp_path, "--layout", "darts", "--layout", "sgas")
    assert (darts["layout"], sgas["layout"]) == ("darts", "sgas")
    for row in (darts, sgas):
        assert float(row["eager_ms"]) > 0 and float(row["accelerated_ms"]) > 0
        assert int(row["eager_saved_bytes"]) > int(row["accelerated_saved_bytes"]) > 0
        # Convolutions and pools: of a sep_conv 4, a dil_conv 2; of a reduced skip connection 2.
        assert int(row["candidate_layers"]) == 3 * 14 * (2 * 4 + 2 * 2 + 2) + 2 * 8 * 2
        assert float(row["fused_share"]) == 1
        assert float(row["differs"]) < 1e-10


def test_what_accelerate_refuses_has_a_row_with_the_reason(tmp_path, monkeypatch, capsys):
    def refuse(_):
        raise ValueError("accelerate: nothing found")

    monkeypatch.setattr(fastnas, "accelerate", refuse)
    [row] = rows_of(tmp_path, "--layout", "darts")
    assert row["why"] == "accelerate: nothing found" and not row["speedup"]
    assert "nothing found" in capsys.readouterr().out


def test_a_wrong_result_shows(monkeypatch):
    def halve(network):
        for p in network.parameters():
            p.data /= 2

    monkeypatch.setattr(fastnas, "accelerate", halve)
    given = drop_in.argparse.Namespace(channels=4, layers=3, batch=2, size=8)
    assert drop_in.difference(drop_in.LAYOUTS["darts"], given) > 1e-3
