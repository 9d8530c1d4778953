"""A method, an evaluator and a space of one's own, each in one place: all the ways in know them."""

import re
from dataclasses import dataclass

import pytest
import torch
import yaml
from rich.console import Console
from typer.testing import CliRunner

from fastnas import cli
from fastnas.blackbox import BLACK_BOX
from fastnas.blackbox.config import StudyConfig
from fastnas.blackbox.methods.base import BlackBox, Observation
from fastnas.bounds import Bounds, whole
from fastnas.evaluators import EVALUATORS, Evaluation
from fastnas.evaluators.base import EvaluatorOptions
from fastnas.options import option
from fastnas.runs.search import run_search
from fastnas.search.checkpoint import load_checkpoint
from fastnas.search.config import ConfigError, SearchConfig, config_text, make_config
from fastnas.search.fields import settings_of
from fastnas.search.searcher import Searcher
from fastnas.spaces import SPACES, uniform_space
from fastnas.spaces.nb201 import NB201Slots
from fastnas.strategies import STRATEGIES
from fastnas.strategies.mixture import Mixture

pytestmark = pytest.mark.usefixtures("no_pictures")

TINY = {
    "method": "tempered", "space": "S2", "channels": 2, "layers": 1, "images": 64,
    "batch_size": 16, "epochs": 2, "train_epochs": 0, "compare_steps": 0, "tensorboard": False,
    "threads": 1,
}  # fmt: skip
QUIET = Console(quiet=True)


@pytest.fixture(scope="module", autouse=True)
def method():
    class Tempered(Mixture):
        """Divides the logits before their softmax."""

        name = "tempered"
        source = "a test"
        heat: float = option(1.0, "divides the logits", Bounds(0, 100, above=True))
        side: str = option("all", "whose logits", choices=("all", "normal"))

        def mixing_weights(self, arch):
            heat = {
                cell: self.heat if self.side in ("all", cell) else 1.0 for cell in arch.alphas()
            }
            return {cell: (a / heat[cell]).softmax(-1) for cell, a in arch.alphas().items()}

    yield Tempered
    del STRATEGIES["tempered"]


@pytest.fixture(scope="module")
def expected(tmp_path_factory, method):
    """The logits of a search from Python, and of one with the option's default."""
    found = []
    for settings in ({"heat": 4}, {}):
        out = tmp_path_factory.mktemp("run") / "run"
        config = make_config(SearchConfig, {**TINY, **settings, "out": str(out)})
        assert run_search(config, console=QUIET)["method"] == "tempered"
        found.append(logits(out))
    assert not torch.equal(*found)
    return found[0]


def logits(out):
    return torch.cat([*load_checkpoint(out / "search.pt", "search")["arch"].values()])


def flags(settings):
    given = {name: value for name, value in settings.items() if name != "tensorboard"}
    return [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]


def test_by_flags(fastnas, tmp_path, expected):
    code, _, error = fastnas("search", *flags(TINY), "--no-tensorboard", "--heat=4", "--out=run")
    assert code == 0, error
    assert torch.equal(logits(tmp_path / "run"), expected)


def test_by_a_file_and_resumed(fastnas, tmp_path, expected, monkeypatch):
    settings = {**TINY, "heat": 4, "out": "run", "checkpoint_every": 1}
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump(settings))
    run_step, done = Searcher.run_step, []

    def step(self):
        if len(done) == 3:
            raise OSError("the disk is full")
        run_step(self)
        done.append(1)

    with monkeypatch.context() as patched:
        patched.setattr(Searcher, "run_step", step)
        assert fastnas("search", "--config=settings.yaml")[0] == 1
    code, _, error = fastnas("search", "--config=settings.yaml", "--resume", "--heat=5")
    assert code == 2 and "run holds another run: heat 4.0 -> 5.0" in error
    code, _, error = fastnas("search", "--config=run/config.json", "--resume")
    assert code == 0, error
    assert torch.equal(logits(tmp_path / "run"), expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--heat=0"], "heat is 0.0; a number is needed, above 0 to 100"),
        (["--side=left"], "side is 'left'; allowed: all, normal"),
        (["--method=darts"], "heat given, which method darts does not take; its options: order"),
        (["--samples=2"], "samples given, which method tempered does not take; its options: order"),
        (["--method=random"], "unknown setting 'heat'"),
    ],
)
def test_what_is_refused(fastnas, arguments, message):
    code, _, error = fastnas("search", "--method=tempered", "--heat=4", *arguments)
    assert code == 2 and message in error, error


def test_help_tells_its_options():
    result = CliRunner().invoke(cli.command_line(), ["search", "--help"], env={"COLUMNS": "400"})
    (line,) = (line for line in result.output.splitlines() if "--heat" in line)
    assert "tempered: divides the logits (above 0 to 100; default: 1.0)" in line


@pytest.mark.parametrize("method", ["darts", "gdas"])
def test_the_other_methods_still_search(fastnas, tmp_path, method):
    settings = {**TINY, "method": method, "epochs": 1, "out": "run"}
    code, _, error = fastnas("search", *flags(settings), "--no-tensorboard")
    assert code == 0, error


def test_an_option_that_cannot_be_a_flag_is_refused(method):
    class Twice(method):
        name = "twice"
        epochs: int = option(1, "of its own", whole(1, 3))

    with pytest.raises(TypeError, match="epochs of method twice is a setting of the run"):
        settings_of(SearchConfig)
    del STRATEGIES["twice"]

    class Other(method):
        name = "other"
        heat: str = option("hot", "another type")

    with pytest.raises(TypeError, match="heat has other types in other and in tempered"):
        settings_of(SearchConfig)
    del STRATEGIES["other"]


def test_a_black_box_method_and_an_evaluator(tmp_path):
    pytest.importorskip("optuna", reason="no Optuna")
    from fastnas.runs.study import run_study

    class Steps(BlackBox):
        """Walks through the cells by a stride."""

        name = "steps"
        source = "a test"
        stride: int = option(1, "operations to go on by", whole(1, 4))

        def _propose(self, domain, past, rng, count):
            point = [(i + self.stride * len(past)) % n for i, n in enumerate(domain.sizes.values())]
            return [Observation(tuple(point))] * count

    class Share(EvaluatorOptions):
        """Counts an operation."""

        name = "share"
        place = "OPERATION"
        best: float = option(1.0, "accuracy of nothing else", Bounds(0, 1))
        layout = NB201Slots()

        def open(self, place):
            self.counted = place
            self.settings = {"counted": place}
            return self

        def evaluate(self, cells, seeds):
            slots = [self.layout.slots(cell)["normal"] for cell in cells]
            return [Evaluation(self.best * names.count(self.counted) / 6) for names in slots]

        def reported(self, cell):
            return None

    settings = {
        "method": "steps", "stride": 3, "evaluator": "share:nor_conv_3x3", "best": 0.6, "budget": 5,
        "out": str(tmp_path / "run"),
    }  # fmt: skip
    try:
        config = make_config(StudyConfig, settings)
        assert run_study(config, console=QUIET)["accuracy"] == pytest.approx(0.2)
        for wrong, message in [
            ({"stride": 5}, "stride is 5; a whole number is needed, 1 to 4"),
            ({"evaluator": "table:x"}, "best given, which evaluator table does not take; its opt"),
            ({"evaluator": "share"}, "share:OPERATION, supernet:FOLDER, table:FILE or train:FILE"),
        ]:
            with pytest.raises(ConfigError, match=re.escape(message)):
                make_config(StudyConfig, {**settings, **wrong})
    finally:
        del BLACK_BOX["steps"], EVALUATORS["share"]


def test_a_setting_is_one_field():
    @dataclass(frozen=True)
    class Patient(SearchConfig):
        patience: int = option(3, "epochs to wait", whole(1, 9))

    config = make_config(Patient, {"patience": 4, "method": "rome", "samples": 2})
    assert config.patience == 4 and '"patience": 4' in config_text(config)
    assert settings_of(Patient)["patience"].default == "3"
    with pytest.raises(ConfigError, match="patience is 10; a whole number is needed, 1 to 9"):
        make_config(Patient, {"patience": 10})


def test_a_space_is_one_entry(fastnas, tmp_path, monkeypatch):
    space = uniform_space("own", ["skip_connect", "sep_conv_5x5"])
    monkeypatch.setitem(SPACES, "own", space)
    settings = {**TINY, "space": "own", "epochs": 1, "out": "run"}
    code, _, error = fastnas("search", *flags(settings), "--no-tensorboard")
    assert code == 0, error
    assert logits(tmp_path / "run").shape == (28, 2)
