"""The loop reads figures, which waits for the device, now and then and loses none."""

from types import SimpleNamespace

import pytest
import torch

from fastnas.search import resumable
from fastnas.search.resumable import ResumableRun


class Counting(ResumableRun):
    kind = "counting"
    summed = ("loss", "never")
    steps_per_epoch = 40

    def __init__(self, checkpoint_every):
        super().__init__()
        self.config = SimpleNamespace(epochs=2, checkpoint_every=checkpoint_every)
        self.shown = []

    def checkpointed(self):
        return {}

    generators = identity = checkpointed
    end_epoch = checkpointed

    def start_epoch(self):
        pass

    def run_step(self):
        self.add(loss=torch.tensor(float(self.step), requires_grad=True))

    def progress(self, means, seconds):
        self.shown.append((self.step, means["loss"]))
        return ""

    def epoch_line(self):
        return ""


@pytest.mark.parametrize(
    ("every", "steps"), [(0, [16, 16, 8]), (20, [16, 4, 16, 4]), (40, [16, 16, 8])]
)
def test_figures_are_read_now_and_then(monkeypatch, tmp_path, every, steps):
    monkeypatch.setattr(resumable, "SECONDS_SHOWN", 1e9)
    run, advanced = Counting(every), []
    bar = SimpleNamespace(advance=lambda n, text: advanced.append(n), line=lambda text: None)
    run.run(tmp_path / "run.pt", SimpleNamespace(epoch=lambda figures: None), bar)
    assert advanced == 2 * steps
    assert all(mean == (step - 1) / 2 for step, mean in run.shown)
    assert [past["loss"] for past in run.history] == [19.5, 19.5]
    assert [past["never"] for past in run.history] == [0.0, 0.0]
    assert run.seconds > 0


def test_a_slow_step_is_shown_at_once(monkeypatch, tmp_path):
    monkeypatch.setattr(resumable, "SECONDS_SHOWN", -1.0)
    run, advanced = Counting(0), []
    bar = SimpleNamespace(advance=lambda n, text: advanced.append(n), line=lambda text: None)
    run.run(tmp_path / "run.pt", SimpleNamespace(epoch=lambda figures: None), bar)
    assert advanced == 80 * [1]


def test_sums_outlast_a_checkpoint(tmp_path):
    run = Counting(0)
    for _ in range(3):
        run.make_step()
    run.save(tmp_path / "run.pt")
    again = Counting(0)
    again.resume(tmp_path / "run.pt")
    assert again.sums == {"loss": 3.0, "never": 0.0}
    again.make_step()
    assert again.means()["loss"] == 1.5
