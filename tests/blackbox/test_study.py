"""Evaluators and studies: tables, budgets, several workers, and workers that are killed."""

import json
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
from nb201_tables import MEASURED, REPORTED, SEEN, rows, write
from rich.console import Console

from fastnas import signals
from fastnas.blackbox import get_black_box
from fastnas.blackbox.config import StudyConfig
from fastnas.evaluators import EvaluationError, TableEvaluator, read_table
from fastnas.evaluators.table import explained_variance
from fastnas.runs.study import run_study
from fastnas.search.config import make_config
from fastnas.search.run_folder import RunFolderError
from fastnas.spaces import from_nb201
from fastnas.spaces.nb201 import NB201Slots

study = pytest.importorskip("fastnas.blackbox.study", reason="no Optuna")
FORK = multiprocessing.get_context("fork")


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return write(tmp_path_factory.mktemp("table") / "table.csv")


@pytest.fixture(scope="module")
def evaluator(table):
    return TableEvaluator(table, SEEN)


def opened(folder, evaluator, name="anasod-local", seed=0, **options):
    url = f"sqlite:///{folder / 'study.db'}"
    settings = {"method": name, "seed": seed}
    return study.Study(url, get_black_box(name), evaluator, seed, settings, **options)


def test_a_table_is_looked_up(table):
    found = read_table(table, SEEN, REPORTED)
    row = rows()[0]
    assert len(found) == 15625
    assert found[row["arch_str"]][REPORTED] == pytest.approx(float(row[REPORTED]) / 100)
    (evaluation,) = TableEvaluator(table, SEEN).evaluate([from_nb201(row["arch_str"])], [0])
    assert evaluation.accuracy == pytest.approx(float(row[SEEN]) / 100)
    assert evaluation.epochs == 12
    assert 0.5 < explained_variance(found, REPORTED) < 1


@pytest.mark.skipif(not MEASURED.exists(), reason="the measured table is not beside the checkout")
def test_what_the_distribution_explains():
    columns = [f"{data}_test_200ep" for data in ("c10", "c100", "in16")]
    found = read_table(MEASURED, *columns)
    shares = [round(explained_variance(found, column), 3) for column in columns]
    assert shares == [0.440, 0.555, 0.622]


def broken(change):
    lines = rows()
    change(lines)
    return lines


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: lines.pop(7), "15624 of 15625 cells are there; .* is missing"),
        (lambda lines: lines.append(lines[3]), "line 15627: .* is there twice"),
        (lambda lines: lines[4].update({SEEN: "nan"}), f"line 6, {SEEN}: accuracy is 'nan'"),
        (lambda lines: lines[4].update({SEEN: "101"}), "accuracy is '101'; 0 to 100"),
        (lambda lines: lines[4].update({"arch_str": "|skip~0|"}), "line 6: "),
    ],
)
def test_a_broken_table_is_refused(change, message, tmp_path):
    path = write(tmp_path / "table.csv", broken(change))
    with pytest.raises(EvaluationError, match=message):
        read_table(path, SEEN)


def test_what_is_no_table_is_refused(table, tmp_path):
    with pytest.raises(EvaluationError, match="no column 'c10'; there are c10_valid_12ep, c10_te"):
        read_table(table, "c10")
    with pytest.raises(EvaluationError, match="No such file"):
        read_table(tmp_path / "none.csv", SEEN)


def test_natss_own_files(tmp_path, monkeypatch):
    """By nats_bench's interface as its documentation has it; its files are gigabytes."""
    lines = rows()
    names = {"cifar10-valid": ("valid-accuracy", SEEN), "cifar10": ("test-accuracy", REPORTED)}

    class Api:
        def __len__(self):
            return len(lines)

        def arch(self, index):
            return lines[index]["arch_str"]

        def get_more_info(self, index, dataset, iepoch=None, hp="12", is_random=True):
            metric, column = names[dataset]
            assert column.endswith(f"{hp}ep") and is_random is False
            return {metric: float(lines[index][column])}

    module = ModuleType("nats_bench")
    module.create = lambda path, space, fast_mode, verbose: Api()
    path = tmp_path / "NATS-tss-v1_0-3ffb9-simple"
    monkeypatch.setitem(sys.modules, "nats_bench", module)
    found = read_table(path, SEEN, REPORTED)
    assert found[lines[7]["arch_str"]] == {
        name: pytest.approx(float(lines[7][name]) / 100) for name in (SEEN, REPORTED)
    }
    with pytest.raises(EvaluationError, match="no column 'c10_valid_50ep'; there are c10_valid_12"):
        read_table(path, "c10_valid_50ep")
    lines[5][SEEN] = "250"
    with pytest.raises(EvaluationError, match=r"cell 5, c10_valid_12ep: accuracy is '250.0'"):
        read_table(path, SEEN)
    del lines[5:]
    with pytest.raises(EvaluationError, match="5 of 15625 cells are there"):
        read_table(path, SEEN)
    monkeypatch.setattr(Api, "__len__", lambda self: int("no number"))
    with pytest.raises(EvaluationError, match=r"NATS-tss-v1_0-3ffb9-simple: invalid literal"):
        read_table(path, SEEN)
    monkeypatch.setitem(sys.modules, "nats_bench", None)
    with pytest.raises(EvaluationError, match="needs the package nats_bench"):
        read_table(path, SEEN)


@pytest.mark.parametrize("name", ["anasod-local", "evolution", "random"])
def test_a_resumed_study_is_the_one_that_ran_through(name, evaluator, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder in (whole, parts):
        folder.mkdir()
    opened(whole, evaluator, name).run(16)
    for budget in (5, 11, 16):
        opened(parts, evaluator, name).run(budget)
    ours, theirs = (opened(folder, evaluator, name).result() for folder in (parts, whole))
    assert ours.cells == theirs.cells and ours.points == theirs.points and ours.best == theirs.best
    accuracies = [evaluation.accuracy for _, evaluation in ours.cells]
    assert len(ours.cells) == 16 and accuracies[ours.best] == max(accuracies)
    assert [accuracies[i] for i in ours.incumbents()][-1] == max(accuracies)


def test_another_study_is_refused(evaluator, tmp_path):
    opened(tmp_path, evaluator).run(3)
    with pytest.raises(study.StudyError, match=r"one of other settings: seed 0, not 1$"):
        opened(tmp_path, evaluator, seed=1)
    assert len(opened(tmp_path, evaluator).result().cells) == 3
    with pytest.raises(study.StudyError, match=r"sqlite:// is in memory"):
        study.Study("sqlite://", get_black_box("random"), evaluator, 0, {})
    with pytest.raises(study.StudyError, match=r"study sqlite:////no/such"):
        study.Study("sqlite:////no/such/study.db", get_black_box("random"), evaluator, 0, {})
    with pytest.raises(study.StudyError, match="the study has no evaluation"):
        opened(tmp_path_of(tmp_path, "new"), evaluator).result()


def tmp_path_of(tmp_path, name):
    (tmp_path / name).mkdir()
    return tmp_path / name


def test_an_evaluator_that_raises_leaves_what_was_there(evaluator, tmp_path):
    class Failing:
        layout = evaluator.layout
        calls = 0

        def evaluate(self, cells, seeds):
            self.calls += 1
            if self.calls == 6:
                raise EvaluationError("the disk is full")
            return evaluator.evaluate(cells, seeds)

    with pytest.raises(EvaluationError, match="the disk is full"):
        opened(tmp_path, Failing()).run(9)
    assert len(opened(tmp_path, evaluator).result().cells) == 5
    opened(tmp_path, evaluator).run(9)
    assert len(opened(tmp_path, evaluator).result().cells) == 9


@pytest.mark.parametrize("name", ["anasod-random", "random"])
def test_from_config_to_report(name, table, tmp_path):
    settings = {
        "method": name,
        "evaluator": f"table:{table}",
        "budget": 6,
        "out": str(tmp_path / "a"),
    }
    report = run_study(make_config(StudyConfig, settings), console=Console(quiet=True))
    left = {path.name for path in (tmp_path / "a").iterdir()}
    expected = [
        ".lock",
        "config.json",
        "study.db",
        "genotype.txt",
        "progress.png",
        "report.json",
        "report.md",
        "simplex.png",
    ]
    assert left == set(expected)
    assert json.loads((tmp_path / "a" / "report.json").read_text()) == report
    assert report["evaluations"] == 6 and report["evaluation_epochs"] == 72
    # The network is the published one for CIFAR-10.
    assert report["network"] == {"channels": 16, "layers": 5, "image": [3, 32, 32]}
    assert report["macs"] > 7e6 and report["parameters"] > 7e4 and report["latency_ms"] > 0
    assert f"{report['macs']:,} multiply-adds" in (tmp_path / "a" / "report.md").read_text()
    entry = TableEvaluator(table, SEEN, REPORTED).entry(from_nb201(report["genotype"]))
    score = report["reported"][REPORTED]
    assert entry == {SEEN: report["accuracy"], REPORTED: score["accuracy"]}
    accuracies = [float(row[REPORTED]) / 100 for row in rows()]
    assert score["best"] == pytest.approx(max(accuracies))
    assert score["rank"] == 1 + sum(a > score["accuracy"] + 1e-9 for a in accuracies)
    assert f"rank {score['rank']}; its best" in (tmp_path / "a" / "report.md").read_text()
    if name == "anasod-random":
        slots = NB201Slots().slots(from_nb201(report["genotype"]))["normal"]
        found = {op: slots.count(op) / 6 for op in NB201Slots().ops}
        assert report["distribution"]["normal"] == pytest.approx(found)
    else:
        assert report["distribution"] is None


def test_a_folder_is_not_overwritten_and_a_study_goes_on(table, tmp_path):
    settings = {"method": "random", "evaluator": f"table:{table}", "budget": 6}
    settings["out"] = str(tmp_path / "a")
    run_study(make_config(StudyConfig, settings), console=Console(quiet=True))
    with pytest.raises(RunFolderError, match="holds a run"):
        run_study(make_config(StudyConfig, settings), console=Console(quiet=True))
    again = {**settings, "out": str(tmp_path / "b"), "study": f"sqlite:///{tmp_path}/a/study.db"}
    other = make_config(StudyConfig, {**again, "table_column": REPORTED})
    with pytest.raises(study.StudyError, match="other settings: table_column 'c10_valid_12ep', n"):
        run_study(other, console=Console(quiet=True))
    assert not (tmp_path / "b").exists()
    more = make_config(StudyConfig, {**settings, "budget": 8, "table_report": SEEN})
    assert run_study(more, resume=True, console=Console(quiet=True))["evaluations"] == 8


class Logged(TableEvaluator):
    """Takes a while, and writes down the seed of each evaluation that it begins."""

    log: Path

    def evaluate(self, cells, seeds):
        with self.log.open("a") as file:
            print(*seeds, file=file, flush=True)
        time.sleep(0.05)
        return super().evaluate(cells, seeds)


def work(folder, evaluator, together, budget, **options):
    together.wait()
    opened(folder, evaluator, **options).run(budget)


def workers(count, *arguments, **options):
    """Forked, which import nothing anew."""
    together = FORK.Barrier(count)
    started = [
        FORK.Process(target=work, args=(*arguments[:2], together, *arguments[2:]), kwargs=options)
        for _ in range(count)
    ]
    for worker in started:
        worker.start()
    return started


def codes(started):
    for worker in started:
        worker.join(120)
    return [worker.exitcode for worker in started]


def test_workers_that_begin_at_once_share_a_study(evaluator, tmp_path):
    assert codes(workers(3, tmp_path, evaluator, 6)) == [0, 0, 0]
    assert len(opened(tmp_path, evaluator).result().cells) == 6


@pytest.mark.parametrize("kill", [False, True])
def test_two_workers_lose_and_repeat_nothing(kill, table, evaluator, tmp_path):
    """Not when one is killed either: its evaluation, and no other, is done again."""
    logged = Logged(table, SEEN)
    log = logged.log = tmp_path / "log"
    started = workers(2, tmp_path, logged, 24, grace_seconds=2)
    if kill:
        while not log.exists() or len(log.read_text().splitlines()) < 8:
            assert started[0].is_alive()
            time.sleep(0.02)
        started[0].kill()
    assert codes(started) == [-signal.SIGKILL if kill else 0, 0]
    begun = log.read_text().split()
    assert len(opened(tmp_path, evaluator).result().cells) == 24
    assert len(begun) == len(set(begun))  # a trial that is done again has a number of its own
    assert 24 <= len(begun) <= 24 + kill


def test_a_signal_stops_between_evaluations(evaluator, tmp_path):
    """And what goes on from there is the study that nothing has stopped."""

    class Preempted:
        layout = evaluator.layout
        calls = 0

        def evaluate(self, cells, seeds):
            self.calls += 1
            if self.calls == 4:
                os.kill(os.getpid(), signal.SIGTERM)
            return evaluator.evaluate(cells, seeds)

    whole, parts = tmp_path_of(tmp_path, "whole"), tmp_path_of(tmp_path, "parts")
    opened(whole, evaluator).run(9)
    with signals.handled():
        signals.started()
        with pytest.raises(signals.Stopped) as caught:
            opened(parts, Preempted()).run(9)
    assert caught.value.saved == "the study, after 4 evaluations,"
    opened(parts, evaluator).run(9)
    ours, theirs = (opened(folder, evaluator).result() for folder in (parts, whole))
    assert ours.cells == theirs.cells and ours.points == theirs.points
