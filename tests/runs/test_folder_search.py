"""A search on a folder of pictures, from the first step to the report, interrupted and not."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from pictures import write_folder
from rich.console import Console
from tiny_runs import answer_signals, difference, results

from fastnas.data.load import DataError
from fastnas.evaluators.supernet import SupernetEvaluator
from fastnas.evaluators.training import TrainingEvaluator
from fastnas.runs.search import run_search, run_train
from fastnas.search.build import augmentation, load_data
from fastnas.search.config import SearchConfig, TrainConfig, make_config
from fastnas.search.searcher import Searcher
from fastnas.signals import Stopped
from fastnas.spaces import get_space
from fastnas.spaces.distribution import slots_of

QUIET = Console(quiet=True)
TINY = {
    "space": "S2", "channels": 2, "layers": 1, "batch_size": 4, "epochs": 2, "image_size": 16,
    "train_epochs": 1, "train_channels": 2, "train_layers": 1, "train_batch_size": 8,
    "compare_steps": 1, "threads": 1, "tensorboard": False, "workers": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return str(write_folder(tmp_path_factory.mktemp("data") / "pets", ("",), count=15))


def config(pictures, out, **settings):
    return make_config(SearchConfig, {**TINY, "data": pictures, "out": str(out), **settings})


@pytest.fixture(scope="module")
def whole(pictures, tmp_path_factory):
    """A run that nothing has stopped."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    return out, run_search(config(pictures, out), console=QUIET)


def test_the_report_names_the_classes(whole):
    out, report = whole
    assert report["classes"] == ["cat", "dog"]
    assert json.loads((out / "report.json").read_text())["classes"] == ["cat", "dog"]
    assert report["test_images"] == 6 and 0 <= report["test_accuracy"] <= 1
    assert report["step_speedup_vs_eager"] > 0


@pytest.mark.parametrize("step", [1, 4])
def test_it_resumes_to_the_same_bits_with_other_workers(
    step, whole, pictures, tmp_path, monkeypatch
):
    """Six steps: stopped in the first pass over the images and in the second."""
    out, taken = tmp_path / "run", 0
    run_step = Searcher.run_step

    def stopping(searcher):
        nonlocal taken
        if taken == step:
            raise Stopped(signal.SIGTERM)
        taken += 1
        run_step(searcher)

    with monkeypatch.context() as patched:
        patched.setattr(Searcher, "run_step", stopping)
        settings = config(pictures, out, workers=2, checkpoint_every=1)
        with pytest.raises(Stopped):
            run_search(settings, console=QUIET)
    run_search(config(pictures, out, workers=1), resume=True, console=QUIET)
    assert difference(results(whole[0]), results(out)) is None


def test_settings_that_change_images_are_compared(whole, pictures, tmp_path):
    shutil.copytree(whole[0], tmp_path / "run")
    for setting, value in (("crop_scale", 0.5), ("centre_share", 1.0), ("image_size", 15)):
        changed = config(pictures, tmp_path / "run", **{setting: value})
        with pytest.raises(ValueError, match=f"holds another run: {setting} "):
            run_search(changed, resume=True, console=QUIET)


def test_what_is_found_trains_on_the_folder(whole, pictures, tmp_path):
    settings = {
        "data": pictures, "image_size": 16, "genotype": str(whole[0] / "genotype.json"),
        "out": str(tmp_path / "t"), "channels": 2, "layers": 2, "epochs": 1, "batch_size": 8,
        "auxiliary": False, "cutout": 4, "threads": 1, "tensorboard": False, "workers": 1,
    }  # fmt: skip
    report = run_train(make_config(TrainConfig, settings), console=QUIET)
    assert report["classes"] == ["cat", "dog"] and report["test_images"] == 6


def test_evaluators_read_folders(whole, pictures):
    layout = slots_of(get_space("S2"), 4)
    settings = {**TINY, "data": pictures, "batch_size": 4, "epochs": 1, "auxiliary": False}
    own = {
        name: value for name, value in settings.items() if name in TrainConfig.__dataclass_fields__
    }
    trained = TrainingEvaluator(make_config(TrainConfig, own), layout)
    # 24 of 30 pictures are to train on; a fifth of these evaluates.
    assert (len(trained.images.train_labels), len(trained.images.test_labels)) == (19, 5)
    assert "workers" not in trained.settings["training"]
    shared = SupernetEvaluator.of_run(whole[0])
    [found] = shared.evaluate([shared.searcher.genotype()], [0])
    assert 0 <= found.accuracy <= 1


def test_random_crops_are_not_shifted_besides(pictures, tmp_path):
    def crop(**settings):
        given = config(pictures, tmp_path, **settings)
        return augmentation(given, load_data(given, torch.device("cpu")), 0).crop

    assert crop() == 0 and crop(crop_scale=1.0) == 4
    assert crop(crop=2) == crop(crop=2, crop_scale=1.0) == 2


def test_a_picture_that_is_damaged_later_ends_the_run_and_keeps_the_checkpoint(pictures, tmp_path):
    data = shutil.copytree(pictures, tmp_path / "data")
    searcher_config = config(str(data), tmp_path / "run", epochs=50, checkpoint_every=1)
    end_epoch = Searcher.end_epoch

    def damaging(searcher):
        for file in data.rglob("*.png"):
            file.write_bytes(b"damaged")
        return end_epoch(searcher)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Searcher, "end_epoch", damaging)
        with pytest.raises(DataError, match=r"\.png: cannot be read: no picture"):
            run_search(searcher_config, console=QUIET)
    assert (tmp_path / "run/search.pt").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_whole_group_saves_the_step(number, pictures, tmp_path):
    """As a terminal sends Ctrl-C: the workers must live until the step is done."""
    given = {**TINY, "data": pictures, "out": tmp_path / "run", "epochs": 500, "workers": 2,
             "checkpoint_every": 1}  # fmt: skip
    given.pop("tensorboard")
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]
    process = subprocess.Popen(
        [sys.executable, "-m", "fastnas", "search", "--no-tensorboard", *flags],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, preexec_fn=answer_signals,
        start_new_session=True,
    )  # fmt: skip
    ends = time.monotonic() + 60
    while not (tmp_path / "run/search.pt").exists():
        assert process.poll() is None and time.monotonic() < ends
        time.sleep(0.02)
    os.killpg(process.pid, number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143}[number]
    said, line = error.splitlines()
    assert said == "fastnas: stopping after this step; once more stops at once"
    assert f"stopped by {number.name}" in line and "is saved; this goes on: " in line
