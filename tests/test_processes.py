"""Several processes bring together what each has found, and say in one line why they cannot."""

from __future__ import annotations

import pytest
import torch
from forked import together
from torch import nn

from fastnas import processes
from fastnas.data.augment import Augment
from fastnas.data.batches import Batches
from fastnas.layers.primitives import drop_path
from fastnas.ops import draw_noise, draw_rng
from fastnas.processes import ALONE, Processes, ProcessesError, Share, here

pytestmark = pytest.mark.usefixtures("one_thread")


def test_one_process_alone_changes_nothing():
    given = [torch.ones(2), torch.zeros(3)]
    p = nn.Parameter(torch.ones(1))
    assert here() == ALONE
    assert ALONE.means(given)[0] is given[0]
    ALONE.join_gradients([p])
    assert p.grad is None
    assert (ALONE.largest(3), ALONE.gathered(1), ALONE.first_says(2)) == (3, [1], 2)
    ALONE.check_same({"name": 1})


def joined_values():
    p = here()
    half = p.rank + 1.0
    params = [nn.Parameter(torch.zeros(2, dtype=torch.float64)) for _ in range(3)]
    params[0].grad = torch.full((2,), half, dtype=torch.float64)
    if p.is_first:
        params[1].grad = torch.full((2,), 8.0, dtype=torch.float64)
    p.join_gradients(params)
    buffers = [torch.full((3,), half), torch.tensor(p.rank)]
    p.join_statistics(buffers)
    mixed = p.means([torch.tensor(half), torch.tensor(half, dtype=torch.float64).expand(2)])
    return {
        "grads": [q.grad for q in params],
        "buffers": buffers,
        "means": mixed,
        "total": p.total(torch.tensor([p.rank, 1])),
        "largest": p.largest(p.rank),
        "gathered": p.gathered(("a", p.rank)),
        "first": p.first_says(f"of {p.rank}"),
        "samples": draw_rng(2),
        "noise": draw_noise(2),
    }


@pytest.mark.parametrize("size", [2, 4])
def test_what_processes_bring_together(size, tmp_path):
    found = together(size, joined_values, tmp_path)
    mean = (size + 1) / 2
    for values in found:
        first, second, none = values["grads"]
        assert first.tolist() == [mean] * 2
        assert second.tolist() == [8 / size] * 2
        assert none is None
        assert values["buffers"][0].tolist() == [mean] * 3
        assert values["buffers"][1] == size - 1
        assert [m.tolist() for m in values["means"]] == [mean, [mean] * 2]
        assert values["total"].tolist() == [sum(range(size)), size]
        assert values["largest"] == size - 1
        assert values["gathered"] == [("a", r) for r in range(size)]
        assert values["first"] == "of 0"
        assert values["samples"].equal(found[0]["samples"])
    assert len({tuple(v["noise"].flatten().tolist()) for v in found}) == size
    assert all((v["noise"] >= 0).all() and (v["noise"] < 2**62).all() for v in found)


def test_what_differs_is_named(tmp_path):
    def work():
        here().check_same({"alike": 1, "seed": here().rank})

    for text in together(2, work, tmp_path):
        assert text.startswith("ProcessesError: process 1 has another seed than process 0: 1 and")


def test_a_process_that_has_gone_is_one_line(tmp_path):
    def work():
        if here().rank == 1:
            return "gone"
        here().largest(0)
        return "not told"

    told, gone = together(2, work, tmp_path)
    assert gone == "gone"
    assert told.startswith("ProcessesError: process 0 of 2 has lost another, which has ended")
    assert "\n" not in told.split("Traceback")[0].strip()


@pytest.mark.parametrize("size", [2, 4])
def test_shares_of_batches_are_the_whole_batch(size):
    index = torch.arange(40)
    whole = Batches(index, 8, seed=3)
    parts = [Batches(index, 8, seed=3, share=Share(rank, size)) for rank in range(size)]
    for _ in range(7):  # into the second pass
        assert torch.cat([part.next() for part in parts]).equal(whole.next())
    assert parts[1].ahead().next().equal(parts[1].next())


def test_a_batch_that_cannot_be_shared():
    with pytest.raises(ValueError, match="batch_size is 9; a multiple of 2, the number of proc"):
        Batches(torch.arange(40), 9, seed=0, share=Share(0, 2))
    with pytest.raises(ValueError, match="drop_last=True"):
        Batches(torch.arange(40), 8, seed=0, drop_last=False, share=Share(0, 2))


def test_shares_of_a_batch_are_augmented_as_the_whole():
    images = torch.rand(8, 3, 9, 9)
    augment = Augment(crop=2, flip=True, cutout=3)
    whole = augment(images, torch.Generator().manual_seed(1))
    parts = [
        augment(images[4 * r : 4 * r + 4], torch.Generator().manual_seed(1), share=Share(r, 2))
        for r in range(2)
    ]
    assert torch.cat(parts).equal(whole)


def test_without_torchrun_nothing_is_joined(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")  # as a scheduler may set it, without RANK
    monkeypatch.delenv("RANK", raising=False)
    with processes.joined() as found:
        assert found == ALONE


def test_processes_that_do_not_come(monkeypatch):
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "nowhere.invalid"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_PORT", "no port")
    with pytest.raises(ProcessesError, match="the 2 processes do not meet"), processes.joined():
        pass


def test_only_the_first_writes():
    assert Processes(0, 2).is_first
    assert not Processes(1, 2).is_first


def test_processes_drop_the_samples_of_one(tmp_path):
    """Together they have the mask of the whole batch, and draw as much as one process."""

    def work(count):
        def run():
            torch.manual_seed(1)
            return drop_path(torch.ones(count, 1, 1, 1), 0.5).flatten(), torch.rand(1)

        return run

    first, second = together(2, work(16), tmp_path)
    (alone,) = together(1, work(32), tmp_path)
    assert torch.cat([first[0], second[0]]).equal(alone[0])
    assert not first[0].equal(second[0])
    assert first[1].equal(alone[1])


@pytest.mark.parametrize("kind", ["tensor", "number"])
def test_states_are_compared_to_the_bit(kind, tmp_path):
    def work():
        off = 1e-16 * here().rank
        value = torch.tensor(off, dtype=torch.float64) if kind == "tensor" else off
        here().check_bits({"alike": [torch.ones(2), "a"], "scale": {"of": [value]}})

    for text in together(2, work, tmp_path):
        assert text.startswith("ProcessesError: process 1 has another scale than process 0")
