"""What the last stage of a run would refuse is refused before its first step, by its own name."""

import numpy as np
import pytest
from rich.console import Console

from fastnas.evaluators.training import TrainingEvaluator
from fastnas.runs.search import run_search, run_train
from fastnas.search.checkpoint import load_checkpoint
from fastnas.search.config import ConfigError, SearchConfig, TrainConfig, make_config
from fastnas.search.run_folder import RunFolderError, claimed_folder
from fastnas.search.searcher import Searcher
from fastnas.search.trainer import Trainer
from fastnas.spaces import get_space, parse
from fastnas.spaces.distribution import slots_of
from fastnas.strategies import STRATEGIES, get_strategy

pytestmark = pytest.mark.usefixtures("no_pictures")

QUIET = Console(quiet=True)
TINY = {
    "space": "S2",
    "channels": 2,
    "layers": 3,
    "batch_size": 8,
    "epochs": 1,
    "train_epochs": 1,
    "train_channels": 2,
    "train_layers": 3,
    "compare_steps": 0,
    "tensorboard": False,
}
GENOTYPE = (
    "Genotype(normal=[('skip_connect', 0), ('skip_connect', 1)], normal_concat=[2],"
    " reduce=[('max_pool_3x3', 0), ('max_pool_3x3', 1)], reduce_concat=[2])"
)
NB201 = "|nor_conv_3x3~0|+|none~0|skip_connect~1|+|skip_connect~0|avg_pool_3x3~1|nor_conv_1x1~2|"


def images(folder):
    """50, of which 10 are held back for the test."""
    drawn = np.random.default_rng(0).integers(0, 256, (50, 8, 8, 3), dtype=np.uint8)
    np.savez(folder / "images.npz", images=drawn, labels=np.arange(50) % 4)
    return str(folder / "images.npz")


def config(folder, data, **settings):
    return make_config(SearchConfig, {**TINY, "data": data, "out": str(folder / "run"), **settings})


def refused(folder, message, data, **settings):
    with pytest.raises(ConfigError, match=message):
        run_search(config(folder, data, **settings), console=QUIET)
    assert not (folder / "run").exists()


def test_a_batch_of_the_derived_network_is_refused_before_the_search(tmp_path):
    refused(
        tmp_path,
        "^train_batch_size is 41; at most 40 is allowed, the images to train on$",
        images(tmp_path),
        train_batch_size=41,
    )
    for space in ("S2", "nb201"):
        settings = {"space": space, "layers": 1, "train_layers": 1, "train_batch_size": 1}
        message = "^train_batch_size is 1; at least 2 is needed for images of 2x2 pixels"
        refused(tmp_path, message, images(tmp_path), image_size=2, **settings)


def test_the_default_batch_is_what_there_is(tmp_path):
    """40 images, not the 96 of the published setting."""
    report = run_search(config(tmp_path, images(tmp_path)), console=QUIET)
    assert report["test_images"] == 10 and report["test_accuracy"] is not None


def test_a_training_of_few_images_takes_them_all_at_once(tmp_path):
    """40, not the 96 of the published setting; the batch that a user asks for is another matter."""
    assert train(tmp_path, images(tmp_path), batch_size=None)["test_images"] == 10
    assert load_checkpoint(tmp_path / "t/train.pt", "training")["batches"]["batch_size"] == 40


def test_without_a_last_stage_nothing_of_it_is_refused(tmp_path):
    settings = {"train_epochs": 0, "train_batch_size": 41}
    assert run_search(config(tmp_path, images(tmp_path), **settings), console=QUIET)["genotype"]


@pytest.mark.parametrize("method", STRATEGIES)
@pytest.mark.parametrize("space", ["S2", "nb201"])
def test_one_image_a_batch_searches_or_is_refused(method, space, tmp_path):
    """As eager: batch norm trains on one value per channel nowhere, on 2x2 values anywhere."""
    try:
        get_strategy(method).space(get_space(space))
    except ValueError:
        pytest.skip("the method does not search the space")
    settings = {"method": method, "space": space, "batch_size": 1, "images": 4}
    settings["layers"] = 1 if space == "nb201" else 3
    message = "batch_size is 1; at least 2 is needed for images of 4x4 pixels, of which a batch"
    with pytest.raises(ConfigError, match=message):
        Searcher(config(tmp_path, "digits", image_size=4, **settings))
    served = Searcher(config(tmp_path, "digits", image_size=5, **settings))
    served.start_epoch()
    served.run_step()
    served.step = 1
    served.check_finite()


def train(folder, data, genotype=GENOTYPE, **settings):
    names = "channels", "layers", "epochs", "tensorboard", "batch_size"
    shared = {name: TINY[name] for name in names}
    settings = {**shared, "data": data, "genotype": genotype, "out": str(folder / "t"), **settings}
    return run_train(make_config(TrainConfig, settings), console=QUIET)


def test_a_training_of_one_image_a_batch_trains_or_is_refused(tmp_path):
    data, one = images(tmp_path), {"batch_size": 1, "images": 4, "image_size": 5}
    with pytest.raises(ConfigError, match="batch_size is 1; at least 2, or no auxiliary classifie"):
        train(tmp_path, data, **one)
    with pytest.raises(ConfigError, match="batch_size is 1; at least 2 is needed for images of 4x"):
        train(tmp_path, data, NB201, **{**one, "image_size": 4, "layers": 1})
    with pytest.raises(ConfigError, match="batch_size is 51; at most 40 is allowed, the images to"):
        train(tmp_path, data, batch_size=51)
    assert not (tmp_path / "t").exists()
    assert train(tmp_path, data, auxiliary=False, **one)["parameters"] > 0


def test_an_evaluator_refuses_before_its_study(tmp_path):
    shared = {"data": images(tmp_path), "channels": 2, "layers": 3, "tensorboard": False}
    settings = make_config(TrainConfig, {**shared, "batch_size": 33})
    with pytest.raises(ConfigError, match="batch_size is 33; at most 32 is allowed"):
        TrainingEvaluator(settings, slots_of(get_space("S0")))


@pytest.mark.parametrize("name", ["train_batch_size", "train_lr", "train_epochs"])
def test_a_setting_of_the_last_stage_may_change_until_it_begins(name, tmp_path):
    first = config(tmp_path, "digits")
    changed = config(tmp_path, "digits", **{name: 3})
    with claimed_folder(first, resume=False) as folder:
        pass
    with claimed_folder(changed, resume=True):
        (folder / "train.pt").touch()
    with claimed_folder(changed, resume=True):  # it is the run's setting now
        pass
    with pytest.raises(RunFolderError, match=f"another run: {name} 3"), claimed_folder(first, True):
        pass


def test_a_cutout_leaves_something_of_the_images(tmp_path):
    """16 pixels are published for 32: of 8x8 pixels they would leave nothing, and 4 are cut out."""
    small = {"genotype": GENOTYPE, "channels": 2, "layers": 3, "auxiliary": False}
    assert Trainer(TrainConfig(**small), parse(GENOTYPE)).config.cutout == 4
    message = "cutout is 16; below 16 is needed for images of 8x8 pixels, of which nothing"
    with pytest.raises(ConfigError, match=message):
        Trainer(TrainConfig(**small, cutout=16), parse(GENOTYPE))
    with pytest.raises(ConfigError, match=message):
        Searcher(config(tmp_path, "digits", cutout=16))
