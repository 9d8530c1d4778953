"""The benchmark of accelerate on public layouts: its rows, what it keeps, and its table."""

from __future__ import annotations

import argparse
from dataclasses import replace

import pytest
import torch

import fastnas
from fastnas.benchmarks import drop_in
from fastnas.benchmarks.drop_in_rows import MEASURES, Row
from fastnas.benchmarks.harness import readme
from fastnas.benchmarks.harness.rows import read_rows, write_rows
from fastnas.benchmarks.layouts import LAYOUTS, architect

SMALL = [*("--channels", "4", "--layers", "3", "--batch", "2", "--size", "8"), "--repeats", "1"]


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def run(path, *arguments):
    status = drop_in.main([str(path), *SMALL, "--threads", "1", *arguments])
    return status, {row.case: row for row in read_rows(path, Row)} if path.exists() else {}


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    path = tmp_path_factory.mktemp("drop_in") / "out.csv"
    status, rows = run(path, "--layouts", "darts", "sgas", "--skip", "bfloat16")
    assert status == 0
    return path, rows


def test_a_row_per_layout_and_measure(measured):
    _, rows = measured
    assert [*rows] == [
        *(("darts", what) for what in MEASURES if what != "bfloat16"),
        *(("sgas", what) for what in ("step", "evaluation")),  # it has no `new`
    ]
    for row in rows.values():
        assert row.before_ms > 0 and row.after_ms > 0
        assert row.differs < (1e-5 if row.measure == "unrolled" else 1e-10)
    for name in ("darts", "sgas"):
        step, evaluation = rows[name, "step"], rows[name, "evaluation"]
        # Convolutions and pools: of a sep_conv 4, a dil_conv 2; of a reduced skip connection 2.
        assert step.candidate_layers == 3 * 14 * (2 * 4 + 2 * 2 + 2) + 2 * 8 * 2
        assert step.fused_share == evaluation.fused_share == 1
        assert step.before_saved_bytes > 2 * step.after_saved_bytes > 0
        assert evaluation.after_saved_bytes < step.after_saved_bytes
    # Of its four passes one is that of a new network, whose layers are others.
    assert rows["darts", "unrolled"].candidate_layers > 3 * step.candidate_layers
    assert rows["darts", "unrolled"].fused_share == 1


def test_a_run_goes_on_with_the_rows_that_are_missing(measured, monkeypatch, tmp_path, capsys):
    path = tmp_path / "out.csv"
    write_rows(path, measured[1].values(), Row)
    built, own = [], drop_in.Pair

    def pair(layout, given):
        built.append(layout.name)
        return own(layout, given)

    monkeypatch.setattr(drop_in, "Pair", pair)
    status, rows = run(path, "--layouts", "darts", "sgas", "--only", "step,bfloat16")
    assert (status, built) == (0, ["darts", "sgas"])  # neither has its bfloat16 yet
    assert {case: rows[case] for case in measured[1]} == measured[1]
    half, step = rows["darts", "bfloat16"], rows["darts", "step"]
    assert half.before_saved_bytes == step.before_saved_bytes
    assert half.after_saved_bytes < half.before_saved_bytes
    write_rows(path, [replace(step, commit="another")], Row)
    _, rows = run(path, "--layouts", "darts", "--only", "step")
    assert rows["darts", "step"].commit == half.commit and len(built) == 3
    status, kept = run(path, "--batch", "3")
    assert status == 2 and kept == rows and "rows of batch 2, this run is of 3" in readable(capsys)


def readable(capsys) -> str:
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--layouts", "dart"], "layouts has 'dart'; allowed: darts, "),
        (["--only", "step,steps"], "only has 'steps'; allowed: step, evaluation, bfloat16"),
        (["--skip", "all"], "skip has 'all'; allowed: step,"),
    ],
)
def test_unknown_names(arguments, says, tmp_path, capsys):
    status, rows = run(tmp_path / "out.csv", *arguments)
    assert status == 2 and not rows and says in readable(capsys)


def test_what_accelerate_refuses_has_a_row_with_the_reason(tmp_path, monkeypatch):
    def refuse(_):
        raise ValueError("accelerate: nothing found")

    monkeypatch.setattr(fastnas, "accelerate", refuse)
    _, rows = run(tmp_path / "out.csv", "--layouts", "darts", "--only", "step")
    row = rows["darts", "step"]
    assert row.why == "accelerate: nothing found" and row.speedup is None and row.loses


def test_a_wrong_result_shows(monkeypatch):
    def spoil(network):
        network.stem[1].eps = 1.0

    monkeypatch.setattr(fastnas, "accelerate", spoil)
    settings = {"channels": 4, "layers": 3, "batch": 2, "size": 8, "repeats": 1}
    pair = drop_in.Pair(LAYOUTS["darts"], argparse.Namespace(**settings))
    assert drop_in.difference(*drop_in.wide(pair.eager, pair.fused)) > 1e-3


def test_the_unrolled_gradient_is_that_of_a_second_derivative(monkeypatch):
    # A shorter difference than a search takes, in float64, crosses no kinks of ReLUs.
    monkeypatch.setattr(architect, "STEP_LENGTH", 1e-6)
    layout = LAYOUTS["darts"]
    network = layout.build(4, 3, 1).double()
    for alphas in layout.alphas(network):
        alphas.data = torch.randn_like(alphas, dtype=torch.float64)
    images, labels = torch.randn(4, 3, 8, 8, dtype=torch.float64), torch.arange(4)

    def loss(network, images, labels):
        return torch.nn.functional.cross_entropy(network(images), labels)

    batches = (images[:2], labels[:2]), (images[2:], labels[2:])
    found = architect.unrolled_gradients(network, loss, *batches)
    params = dict(network.named_parameters())
    ahead = torch.autograd.grad(
        loss(network, *batches[0]), list(params.values()), create_graph=True
    )
    moved = {n: p - 0.025 * (g + 3e-4 * p) for (n, p), g in zip(params.items(), ahead)}
    there = torch.func.functional_call(network, moved, batches[1][0])
    valid = torch.nn.functional.cross_entropy(there, batches[1][1])
    exact = torch.autograd.grad(valid, network.arch_parameters())
    for a, b in zip(found, exact, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_the_page_shows_rows_that_lose_in_bold(measured, tmp_path):
    rows = measured[1]
    slow = replace(rows["sgas", "step"], before_ms=1.0, after_ms=2.0, speedup=0.5)
    half = replace(rows["darts", "step"], measure="bfloat16", speedup=1.25, saved_ratio=4.0)
    refused = replace(slow, layout="nni", speedup=None, before_ms=None, after_ms=None, why="no")
    write_rows(tmp_path / "a.csv", [*(rows | {slow.case: slow}).values(), half, refused], Row)
    page = tmp_path / "docs" / "drop-in.md"
    page.parent.mkdir()
    page.write_text("old\n<!-- drop-in:begin -->\n<!-- drop-in:end -->\n")
    arguments = ["a.csv", "--root", str(tmp_path)]
    assert readme.main([*arguments, "--check"]) == 1
    assert readme.main(arguments) == readme.main([*arguments, "--check"]) == 0
    text = page.read_text()
    assert "| sgas | 1 | 2 | **0.50** |" in text and " 1.25 | 0.25 | " in text
    assert "| nni |  |  |" in text and "nni: no" in text and "generated from `a.csv`" in text
