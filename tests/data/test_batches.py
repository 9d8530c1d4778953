"""The stratified split and the resumable stream of batches."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastnas.data.batches import Batches, split_indices

INDICES = torch.arange(100, 123)


def take(batches: Batches, count: int) -> list[Tensor]:
    return [batches.next() for _ in range(count)]


def same(left: list[Tensor], right: list[Tensor]) -> bool:
    return len(left) == len(right) and all(map(torch.equal, left, right))


@pytest.mark.parametrize("drop_last", [True, False])
def test_resumes_at_every_position(drop_last: bool, tmp_path: Path) -> None:
    count = 20
    reference = take(Batches(INDICES, 5, seed=3, drop_last=drop_last), count)
    for position in range(count):
        stream = Batches(INDICES, 5, seed=3, drop_last=drop_last)
        take(stream, position)
        torch.save(stream.state_dict(), tmp_path / "state.pt")
        resumed = Batches(INDICES, 5, seed=77, drop_last=drop_last)
        take(resumed, 2)
        resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        assert same(take(resumed, count - position), reference[position:])


def test_a_state_does_not_change_when_the_stream_goes_on() -> None:
    stream = Batches(INDICES, 5, seed=0)
    take(stream, 3)
    state = stream.state_dict()
    following = take(stream, 9)
    stream.load_state_dict(state)
    assert same(take(stream, 9), following)


@pytest.mark.parametrize(("drop_last", "sizes"), [(True, [5] * 4), (False, [5] * 4 + [3])])
def test_a_pass_holds_each_index_once(drop_last: bool, sizes: list[int]) -> None:
    stream = Batches(INDICES, 5, seed=1, drop_last=drop_last)
    assert stream.batches_per_epoch == len(sizes)
    passes = [take(stream, len(sizes)) for _ in range(4)]
    for batches in passes:
        assert [len(batch) for batch in batches] == sizes
        members = torch.cat(batches)
        assert members.dtype == torch.int64
        assert len(members.unique()) == len(members)
        assert set(members.tolist()) <= set(INDICES.tolist())
    for earlier, later in pairwise(passes):
        assert not same(earlier, later)


def test_every_index_comes_up_when_the_last_batch_is_dropped() -> None:
    stream = Batches(INDICES, 5, seed=1)
    assert set(torch.cat(take(stream, 40)).tolist()) == set(INDICES.tolist())


def test_exact_multiple_has_no_empty_batch() -> None:
    stream = Batches(torch.arange(10), 5, seed=0, drop_last=False)
    assert stream.batches_per_epoch == 2
    assert [len(batch) for batch in take(stream, 5)] == [5] * 5


def test_the_stream_is_its_own() -> None:
    torch.manual_seed(0)
    expected = take(Batches(INDICES, 5, seed=4), 8)
    stream = Batches(INDICES, 5, seed=4)
    given_batches = []
    for _ in range(8):
        torch.rand(7)
        given_batches.append(stream.next())
    assert same(given_batches, expected)
    assert not same(take(Batches(INDICES, 5, seed=5), 8), expected)


def test_later_changes_of_the_indices_do_not_matter() -> None:
    indices = INDICES.clone()
    stream = Batches(indices, 5, seed=0)
    indices.zero_()
    assert torch.cat(take(stream, 8)).min() >= 100


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="batch_size is 24; expected at most 23"):
        Batches(INDICES, 24, seed=0)
    assert len(Batches(INDICES, 24, seed=0, drop_last=False).next()) == 23
    with pytest.raises(ValueError, match="batch_size is 0"):
        Batches(INDICES, 0, seed=0)
    with pytest.raises(TypeError, match=r"batch_size is 2\.5"):
        Batches(INDICES, 2.5, seed=0)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"torch\.float32; expected torch\.int64"):
        Batches(torch.zeros(4), 2, seed=0)
    with pytest.raises(ValueError, match=r"shape \[0\]"):
        Batches(INDICES[:0], 1, seed=0)


def test_a_foreign_state_is_refused_and_changes_nothing() -> None:
    expected = take(Batches(INDICES, 5, seed=0), 6)
    stream = Batches(INDICES, 5, seed=0)
    good = stream.state_dict()
    with pytest.raises(ValueError, match="length 10; expected 23"):
        stream.load_state_dict(Batches(torch.arange(10), 5, seed=0).state_dict())
    with pytest.raises(ValueError, match="batch_size 6; expected 5"):
        stream.load_state_dict(Batches(INDICES, 6, seed=0).state_dict())
    with pytest.raises(ValueError, match="lacks generator"):
        stream.load_state_dict({k: v for k, v in good.items() if k != "generator"})
    with pytest.raises(ValueError, match=r"position 5; expected 0\.\.4"):
        stream.load_state_dict({**good, "position": 5})
    with pytest.raises(ValueError, match="no uint8 tensor"):
        stream.load_state_dict({**good, "generator": torch.zeros(3, dtype=torch.uint8)})
    assert same(take(stream, 6), expected)


@settings(max_examples=60, deadline=None)
@given(
    labels=st.lists(st.integers(0, 6), min_size=4, max_size=80),
    fraction=st.floats(0.2, 0.8),
    seed=st.integers(0, 2**31),
)
def test_split_is_a_stratified_partition(labels: list[int], fraction: float, seed: int) -> None:
    values = torch.tensor(labels)
    first, second = split_indices(values, fraction, seed)
    assert len(first) == round(fraction * len(labels))
    assert sorted(first.tolist() + second.tolist()) == list(range(len(labels)))
    assert torch.equal(first, first.sort().values)
    assert torch.equal(second, second.sort().values)
    for value in set(labels):
        exact = labels.count(value) * len(first) / len(labels)
        assert abs(int((values[first] == value).sum()) - exact) < 1


def test_split_depends_on_the_seed_alone() -> None:
    labels = torch.arange(200) % 10
    torch.manual_seed(0)
    first, _ = split_indices(labels, 0.5, 1)
    torch.manual_seed(1)
    assert torch.equal(first, split_indices(labels.to(torch.int32), 0.5, 1)[0])
    assert not torch.equal(first, split_indices(labels, 0.5, 2)[0])


def test_split_chooses_each_member_equally_often() -> None:
    labels = torch.tensor([0] * 6 + [1] * 4)
    counts = torch.zeros(10)
    for seed in range(400):
        counts[split_indices(labels, 0.5, seed)[0]] += 1
    assert (counts - 200).abs().max() < 60


def test_split_names_bad_input() -> None:
    labels = torch.arange(10)
    for fraction in (0.0, 1.0, -1.0):
        with pytest.raises(ValueError, match="strictly between 0 and 1"):
            split_indices(labels, fraction, 0)
    with pytest.raises(ValueError, match="fraction is nan; a finite number is needed"):
        split_indices(labels, float("nan"), 0)
    with pytest.raises(ValueError, match=r"0\.01 of 10 images leaves one part empty"):
        split_indices(labels, 0.01, 0)
    with pytest.raises(TypeError, match="expected integers"):
        split_indices(labels.float(), 0.5, 0)
    with pytest.raises(ValueError, match=r"expected \[N\]"):
        split_indices(labels[None], 0.5, 0)
    with pytest.raises(ValueError, match="labels hold -1"):
        split_indices(labels - 1, 0.5, 0)
