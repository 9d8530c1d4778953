import os
import random

import numpy as np
import pytest
import torch

from fastnas.files import write_atomically
from fastnas.search.checkpoint import (
    CheckpointError,
    load_checkpoint,
    random_state,
    restore_random_state,
    save_checkpoint,
)


def test_round_trip_with_weights_only(tmp_path):
    path = tmp_path / "search.pt"
    save_checkpoint(path, "search", {"a": torch.arange(3), "n": 3, "history": [{"x": 1.0}]})
    state = load_checkpoint(path, "search")
    assert torch.equal(state["a"], torch.arange(3)) and state["history"] == [{"x": 1.0}]


def test_a_failing_write_leaves_the_old_checkpoint(tmp_path):
    path = tmp_path / "search.pt"
    save_checkpoint(path, "search", {"n": 1})

    def half(stream):
        stream.write(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, half)
    assert load_checkpoint(path, "search")["n"] == 1
    assert os.listdir(tmp_path) == ["search.pt"]


def test_broken_checkpoints(tmp_path):
    path = tmp_path / "search.pt"
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        load_checkpoint(path, "search")
    save_checkpoint(path, "search", {"n": torch.ones(1000)})
    whole = path.read_bytes()
    for content in (b"", b"garbage", whole[: len(whole) // 2], whole[:-30]):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match="is broken") as caught:
            load_checkpoint(path, "search")
        assert "\n" not in str(caught.value)
    torch.save([1, 2], path)
    with pytest.raises(CheckpointError, match="has version 1, without a hash"):
        load_checkpoint(path, "search")
    save_checkpoint(path, "training", {})
    with pytest.raises(CheckpointError, match="is of a training, not of a search"):
        load_checkpoint(path, "search")


def test_a_single_damage_anywhere_is_one_error(tmp_path):
    path = tmp_path / "search.pt"
    save_checkpoint(path, "search", {"weights": torch.rand(5000), "history": [{"x": 1.0}]})
    whole = path.read_bytes()
    draw = random.Random(0)
    for trial in range(200):
        content = bytearray(whole)
        at = trial if trial < 60 else draw.randrange(len(whole))  # the header, then anywhere
        if trial % 3 == 0:
            content[at] ^= 1 << draw.randrange(8)
        elif trial % 3 == 1:
            content[at] = (content[at] + draw.randrange(1, 256)) % 256
        else:
            content[at : at + 512] = bytes(len(content[at : at + 512]))
        if content == whole:
            continue
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match="is broken"):
            load_checkpoint(path, "search")


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    path = tmp_path / "search.pt"

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "evil"),)

    save_checkpoint(path, "search", {"x": Evil()})
    with pytest.raises(CheckpointError, match="is broken"):
        load_checkpoint(path, "search")
    assert not (tmp_path / "evil").exists()


def test_random_state_of_every_generator(tmp_path):
    def draw():
        return torch.rand(2).tolist(), random.random(), np.random.rand()  # noqa: NPY002

    path = tmp_path / "state.pt"
    draw()
    save_checkpoint(path, "search", {"random": random_state()})
    expected = draw()
    draw()
    restore_random_state(load_checkpoint(path, "search")["random"])
    assert draw() == expected
