"""Cells evaluated by a training from scratch, of any length and in both layouts."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from rich.console import Console

from fastnas.blackbox.config import StudyConfig
from fastnas.data.load import DataError
from fastnas.evaluators import EvaluationError
from fastnas.evaluators.training import TrainingEvaluator
from fastnas.search.config import ConfigError, TrainConfig, make_config
from fastnas.search.trainer import Trainer
from fastnas.spaces import get_space, parse
from fastnas.spaces.distribution import OperationDistribution, slots_of

SMALL = {
    "channels": 4, "layers": 2, "epochs": 1, "batch_size": 32, "images": 200, "threads": 1,
}  # fmt: skip


def layout_of(name, length=None):
    return slots_of(get_space(name), length)


def cells_of(layout, count):
    rng = np.random.default_rng(0)
    return [OperationDistribution.dirichlet(layout, rng).sample(layout, rng) for _ in range(count)]


@pytest.mark.parametrize(("space", "length"), [("S0", 4), ("S0", 8), ("S0", 16), ("nb201", None)])
def test_an_evaluation_is_a_training(space, length):
    """Of the network of that cell, from the evaluation's seed, on images the test does not have."""
    layout = layout_of(space, length)
    evaluator = TrainingEvaluator(make_config(TrainConfig, SMALL), layout)
    cells = cells_of(layout, 2)
    found = evaluator.evaluate(cells, [3, 4])
    for cell, seed, evaluation in zip(cells, (3, 4), found):
        config = replace(evaluator.config, seed=seed)
        trainer = Trainer(config, cell, evaluator.images)
        assert evaluation.accuracy == trainer.train(None, Console(quiet=True))
        assert evaluation.epochs == 1 and evaluation.seconds > 0


def test_it_looks_at_training_images_only():
    evaluator = TrainingEvaluator(make_config(TrainConfig, SMALL), layout_of("S0"))
    images = Trainer(make_config(TrainConfig, SMALL), cells_of(layout_of("S0"), 1)[0]).images
    seen = torch.cat([evaluator.images.train, evaluator.images.test]).flatten(1)
    assert (len(evaluator.images.train), len(evaluator.images.test)) == (160, 40)
    assert len(seen.unique(dim=0)) == 200
    there = {row.numpy().tobytes() for row in images.train.flatten(1)}
    assert all(row.numpy().tobytes() in there for row in seen)


def test_a_study_of_trainings(tmp_path):
    pytest.importorskip("optuna", reason="no Optuna")
    from fastnas.blackbox.study import StudyError
    from fastnas.runs.study import run_study

    file = tmp_path / "train.yaml"
    file.write_text("".join(f"{name}: {value}\n" for name, value in SMALL.items()))
    settings = {
        "method": "evolution", "evaluator": f"train:{file}", "length": 4, "budget": 3,
        "out": str(tmp_path / "out"),
    }  # fmt: skip
    config = make_config(StudyConfig, settings)
    report = run_study(config, console=Console(quiet=True))
    assert report["evaluations"] == 3 and report["evaluation_epochs"] == 3
    assert len(parse(report["genotype"]).edges("normal")) == 4 and report["reported"] is None
    file.write_text(file.read_text().replace("epochs: 1", "epochs: 2"))
    assert report["training"]["epochs"] == 1
    with pytest.raises(StudyError, match=r"other settings: training .*'epochs': 1.*'epochs': 2"):
        run_study(replace(config, budget=4), resume=True, console=Console(quiet=True))


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("epochs: 1\ngenotype: x\n", ConfigError, "genotype has no meaning for evaluations"),
        ("epoch: 1\n", ConfigError, "unknown setting 'epoch'; did you mean epochs"),
        ("data: none.npz\n", DataError, "none.npz"),
        ("images: 1\n", ConfigError, "1 images are too few"),
        (
            "epochs: one\n",
            ConfigError,
            r"config file .*train.yaml: epochs is 'one'; a whole",
        ),
        ("images: 100\nbatch_size: 81\n", ConfigError, "batch_size is 81; at most 80 is allowed"),
    ],
)
def test_bad_settings(text, error, message, tmp_path):
    path = tmp_path / "train.yaml"
    path.write_text(text)
    with pytest.raises(error, match=message):
        TrainingEvaluator.of_file(path, layout_of("S0"))
    with pytest.raises(ConfigError, match=r"config file .*: No such file"):
        TrainingEvaluator.of_file(tmp_path / "no.yaml", layout_of("S0"))


def test_cells_that_cannot_be_trained_so():
    settings = make_config(TrainConfig, {**SMALL, "drop_path": 0.2})
    with pytest.raises(ConfigError, match=r"drop_path is 0\.2"):
        TrainingEvaluator(settings, layout_of("nb201"))
    with pytest.raises(EvaluationError, match=r"drop_path is 0\.2"):
        TrainingEvaluator(settings, layout_of("S0")).evaluate(cells_of(layout_of("nb201"), 1), [0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"evaluator": "train:x", "table_report": "a"},
            "table_report given, which evaluator train does not take; its",
        ),
        ({"evaluator": "table:x", "length": 8}, "length given, which evaluator table does not"),
        (
            {"evaluator": "supernet:x", "space": "S0"},
            "space given, which evaluator supernet does not take; its options: none",
        ),
        ({"evaluator": "trains:x"}, "supernet:FOLDER, table:FILE or train:FILE is needed"),
    ],
)
def test_settings_of_other_evaluators(settings, message):
    with pytest.raises(ConfigError, match=message):
        make_config(StudyConfig, {"method": "random", **settings})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"space": "S1"}, "space S1 offers other candidates"),
        ({"space": "S9"}, "S9"),
        ({"length": 0}, "length is 0"),
        ({"space": "nb201", "length": 8}, "length is 8"),
    ],
)
def test_cells_that_there_are_not(settings, message, tmp_path):
    pytest.importorskip("optuna", reason="no Optuna")
    from fastnas.runs.study import run_study

    common = {"method": "random", "evaluator": "train:x", "out": str(tmp_path / "out")}
    with pytest.raises(ConfigError, match=message):
        run_study(make_config(StudyConfig, {**common, **settings}), console=Console(quiet=True))
    assert not (tmp_path / "out").exists()
