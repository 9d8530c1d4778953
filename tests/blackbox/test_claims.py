"""No two workers of a study evaluate one cell at one time, at whatever moment they meet."""

import threading

import pytest
from nb201_tables import SEEN, write

from fastnas.blackbox import get_black_box
from fastnas.evaluators import TableEvaluator

study = pytest.importorskip("fastnas.blackbox.study", reason="no Optuna")
claims = pytest.importorskip("fastnas.blackbox.claims", reason="no SQLAlchemy")


@pytest.fixture(scope="module")
def evaluator(tmp_path_factory):
    return TableEvaluator(write(tmp_path_factory.mktemp("table") / "table.csv"), SEEN)


class Recording:
    """What is evaluated, and what of it at the same time as itself."""

    def __init__(self, evaluator):
        self.layout, self.evaluator = evaluator.layout, evaluator
        self.lock, self.running, self.begun, self.twice = threading.Lock(), [], [], []

    def evaluate(self, cells, seeds):
        (cell,) = cells
        with self.lock:
            self.twice += [cell] if cell in self.running else []
            self.running.append(cell)
            self.begun.append(cell)
        threading.Event().wait(0.3)  # long enough to meet the other
        with self.lock:
            self.running.remove(cell)
        return self.evaluator.evaluate(cells, seeds)


@pytest.mark.parametrize("name", ["anasod-random", "random"])
def test_workers_that_read_before_either_writes_take_different_cells(
    name, evaluator, tmp_path, monkeypatch
):
    """Both are held until both have read which cells are seen, and both found the same one free."""
    both, met = threading.Barrier(2), threading.local()
    recording = Recording(evaluator)
    choose = study.unseen_cell

    def same_for_all(domain, point, rng, seen):
        points = [domain.random(study.np.random.default_rng(i)) for i in range(9)]
        cells = [
            choose(domain, p, study.np.random.default_rng(i), ()) for i, p in enumerate(points)
        ]
        first = not getattr(met, "already", False)
        met.already = True
        if first:
            both.wait(timeout=60)
            return cells[0]
        return next(cell for cell in cells if cell not in seen)

    monkeypatch.setattr(study, "unseen_cell", same_for_all)
    method = get_black_box(name)

    def work():
        study.Study(tmp_path / "study.db", method, recording, 0, {"method": name}).run(2)

    workers = [threading.Thread(target=work) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=120)
    assert len(recording.begun) == len(set(recording.begun)) == 2 and not recording.twice


def test_of_many_that_take_a_cell_at_once_one_has_it(tmp_path):
    engine = claims.sql.create_engine(f"sqlite:///{tmp_path}/c.db", connect_args={"timeout": 60})
    table = claims.Claims(engine)
    assert table.take("dead", 0, lambda _: False)
    start, won = threading.Barrier(8), {"fresh": [], "dead": []}

    def work(trial):
        start.wait(timeout=60)
        for cell in ("fresh", "dead", "x" * 5000):
            if table.take(cell, trial, lambda holder: holder == 0):
                won.setdefault(cell, []).append(trial)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(1, 9)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=120)
    assert [len(trials) for trials in won.values()] == [1, 1, 1]
    (holder,) = won["fresh"]
    assert table.take("fresh", holder, lambda _: False)  # it is its own already
    assert not table.take("fresh", 99, lambda _: False)
