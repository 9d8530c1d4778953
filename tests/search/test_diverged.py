"""A run whose numbers are no longer finite stops: where, by which loss, and what is kept."""

import math
import re
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from fastnas import cli
from fastnas.evaluators.supernet import SupernetEvaluator
from fastnas.evaluators.training import TrainingEvaluator
from fastnas.nn import ArchParameters
from fastnas.runs.search import run_search, run_train
from fastnas.search.config import SearchConfig, TrainConfig, make_config
from fastnas.search.diverged import DivergedError, first_not_finite
from fastnas.search.gradient_run import CHECKPOINT
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
    "images": 64,
    "batch_size": 8,
    "epochs": 2,
    "train_epochs": 0,
    "compare_steps": 0,
    "tensorboard": False,
}
GENOTYPE = (
    "Genotype(normal=[('sep_conv_3x3', 0), ('skip_connect', 1)], normal_concat=[2],"
    " reduce=[('max_pool_3x3', 0), ('sep_conv_5x5', 1)], reduce_concat=[2])"
)
TRAINING = {
    **{name: TINY[name] for name in ("channels", "layers", "images", "batch_size", "tensorboard")},
    "genotype": GENOTYPE,
    "epochs": 2,
}
ON_DISTRIBUTIONS = [name for name in STRATEGIES if name.startswith("anasod")]


def searcher(out, **settings):
    return Searcher(make_config(SearchConfig, {**TINY, "out": str(out), **settings}))


def poisoned(step, at, value=math.nan):
    """The step, whose loss is `value` from its call number `at` on."""
    calls = iter(range(10**6))

    def run(*batches):
        found = step(*batches)
        if next(calls) < at:
            return found
        if isinstance(found, tuple):
            return torch.full_like(found[0], value), *found[1:]
        return torch.full_like(found, value)

    return run


@pytest.mark.parametrize("method", STRATEGIES)
def test_every_method_stops_at_a_rate_that_diverges(method, tmp_path):
    space = "S0" if method in (*ON_DISTRIBUTIONS, "p-darts") else "S2"
    settings = {**TINY, "method": method, "space": space, "lr": 1e30, "lr_min": 1e30}
    settings |= {"samples": 2} if method.startswith("rome") else {}
    settings |= {"epochs": 3, "stage_layers": "0,0,0"} if method == "p-darts" else {}
    config = make_config(SearchConfig, {**settings, "out": str(tmp_path / "run")})
    expected = r"^search diverged: .* (is nan|is inf|not finite) in epoch 1, step \d of 4; a lower"
    with pytest.raises(DivergedError, match=expected):
        run_search(config, console=QUIET)
    assert {path.name for path in (tmp_path / "run").iterdir()} == {".lock", "config.json"}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    ("half", "loss"), [("arch_step", "valid_loss"), ("weight_step", "train_loss")]
)
def test_the_step_and_the_loss_are_named_and_the_last_checkpoint_stays(half, loss, value, tmp_path):
    run = searcher(tmp_path, checkpoint_every=2)
    setattr(run.bilevel, half, poisoned(getattr(run.bilevel, half), 6, value))
    with pytest.raises(DivergedError) as caught:
        run.search(tmp_path, QUIET)
    assert f"search diverged: {loss} is {value} in epoch 2, step 3 of 4; " in str(caught.value)
    kept = re.search(r"; (\S+), after 1 epochs and 2 steps, is kept$", str(caught.value))
    assert kept is not None and kept[1] == str(tmp_path / CHECKPOINT)
    again = searcher(tmp_path, checkpoint_every=2)
    again.resume(tmp_path / CHECKPOINT)
    assert (again.epoch, again.step) == (1, 2) and first_not_finite(again.checkpointed()) is None
    again.search(tmp_path, QUIET)  # goes on where nothing poisons it
    assert again.finished


def test_a_loss_that_a_graph_overwrites_is_told_at_its_step(tmp_path):
    """The tensors that a replay of a CUDA graph returns are the same at every step."""
    run = searcher(tmp_path)
    step, shared, losses = run.bilevel.weight_step, torch.zeros(()), iter([1.0, math.nan, 1.0, 1.0])

    def weight_step(train):
        _, logits = step(train)
        return shared.fill_(next(losses)), logits

    run.bilevel.weight_step = weight_step
    with pytest.raises(DivergedError, match="train_loss is nan in epoch 1, step 2 of 4"):
        run.search(tmp_path, QUIET)
    assert not (tmp_path / CHECKPOINT).exists()


@pytest.mark.parametrize("name", ["arch.normal", "network.classifier.weight"])
@pytest.mark.parametrize("every", [0, 1])
def test_a_state_that_is_not_finite_is_not_saved_though_the_losses_are(name, every, tmp_path):
    run = searcher(tmp_path, epochs=1, checkpoint_every=every)
    step, steps = run.bilevel.weight_step, iter(range(4))

    def weight_step(train):
        found = step(train)
        if next(steps) == 3:
            part, _, tensor = name.partition(".")
            dict(run.checkpointed()[part].named_parameters())[tensor].data.view(-1)[0] = math.nan
        return found

    run.bilevel.weight_step = weight_step
    with pytest.raises(DivergedError, match=f"{name} is not finite in epoch 1, step 4 of 4"):
        run.search(tmp_path, QUIET)
    if every:
        again = searcher(tmp_path, epochs=1)
        again.resume(tmp_path / CHECKPOINT)
        assert again.step == 3
    else:
        assert not (tmp_path / CHECKPOINT).exists()


def test_a_validation_that_is_not_finite_stops_the_search(tmp_path):
    """In evaluation the statistics of training count, which may overflow alone."""
    run = searcher(tmp_path)
    run.step = 4
    run.network.stem[1].running_var.fill_(-1.0)
    with pytest.raises(DivergedError, match="a logit of the validation is not finite in epoch 1"):
        run.validate()
    run.network.stem[1].running_var.fill_(1.0)
    assert 0 <= run.validate() <= 1


def test_a_training_stops(tmp_path):
    settings = {**TRAINING, "out": str(tmp_path / "run"), "lr": 1e30}
    with pytest.raises(DivergedError, match=r"^training diverged: .* a lower lr than 1e\+30 may"):
        run_train(make_config(TrainConfig, settings), console=QUIET)
    assert {path.name for path in (tmp_path / "run").iterdir()} == {".lock", "config.json"}
    trainer = Trainer(make_config(TrainConfig, TRAINING), parse(GENOTYPE))
    trainer.step = 1
    trainer.network.stem[1].running_var.fill_(-1.0)
    with pytest.raises(DivergedError, match="a logit of the test is not finite"):
        trainer.test()


def test_evaluators_stop(tmp_path):
    layout = slots_of(get_space("S0"))
    config = replace(make_config(TrainConfig, {**TRAINING, "lr": 1e30}), genotype="")
    cell = parse(GENOTYPE)
    with pytest.raises(DivergedError, match="training diverged"):
        TrainingEvaluator(config, layout).evaluate([cell], [0])
    run = searcher(tmp_path, space="S0")
    run.network.classifier.weight.data.fill_(math.nan)
    with pytest.raises(DivergedError, match="a logit of the supernet's paths is not finite"):
        SupernetEvaluator(run).evaluate([cell], [0])


def test_the_command_line_says_so_in_one_line_and_exits_with_1(tmp_path, monkeypatch, capsys):
    settings = {**TRAINING, "out": str(tmp_path / "run"), "lr": 1e30}
    flags = [f"--{k.replace('_', '-')}={v}" for k, v in settings.items() if k != "genotype"]
    flags = [flag for flag in flags if "tensorboard" not in flag]
    monkeypatch.setattr("sys.argv", ["fastnas", "train", GENOTYPE, *flags, "--no-tensorboard"])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    said = capsys.readouterr().err
    assert exit_.value.code == 1 and len(said.strip().splitlines()) == 1
    assert said.startswith("fastnas: error: training diverged: ")


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("layout", ["S0", "nb201"])
@pytest.mark.parametrize("method", STRATEGIES)
def test_no_method_derives_from_logits_that_are_not_finite(method, layout, value):
    strategy = get_strategy(method)
    if layout == "nb201" and (strategy.topology != "none" or strategy.chooses_edges):
        pytest.skip("the method does not search NAS-Bench-201")
    space = strategy.space(get_space(layout))
    arch = ArchParameters(space, 1e-3, strategy.topology, strategy.tied)
    strategy.derive(arch, space)
    for name, logits in arch.named_parameters():
        before = logits.detach().clone()
        logits.data.view(-1)[0] = value
        with pytest.raises(ValueError, match=f"^the logits {name} are not finite"):
            strategy.derive(arch, space)
        logits.data.copy_(before)
