import json
import math
import re
from pathlib import Path

import pytest

import fastnas.search
from fastnas.blackbox import BLACK_BOX, BlackBox
from fastnas.blackbox.config import StudyConfig
from fastnas.evaluators.training import TrainingOptions
from fastnas.options import options_of
from fastnas.search.config import (
    ConfigError,
    SearchConfig,
    TrainConfig,
    config_text,
    make_config,
    read_settings,
)
from fastnas.search.fields import settings_of
from fastnas.search.mobile_config import CHAINS, MobileConfig
from fastnas.strategies import STRATEGIES, Strategy

SOURCES = "\n".join(
    path.read_text()
    for path in Path(fastnas.search.__file__).parents[1].rglob("*.py")
    if path.name != "config.py"
)


KINDS = (SearchConfig, MobileConfig, StudyConfig, TrainConfig)


@pytest.mark.parametrize("kind", KINDS)
def test_every_setting_is_used(kind):
    """Read by the code that runs; nothing is accepted and ignored."""
    for name in options_of(kind):
        used = rf'config\.{name}\b|resolved\("{name}"\)'
        assert re.search(used, SOURCES), f"{name} is read nowhere"
    for name in settings_of(kind).keys() - options_of(kind):
        used = rf"(self|strategy)\.{name}\b"
        assert re.search(used, SOURCES), f"option {name} is read nowhere"


@pytest.mark.parametrize("kind", KINDS)
def test_every_number_is_bounded_on_both_sides(kind):
    elsewhere = {name for own in STRATEGIES.values() for name in options_of(own)}
    elsewhere -= {name for chain in CHAINS.values() for name in chain.options}
    for name, setting in settings_of(kind).items():
        if kind is MobileConfig and name in elsewhere:  # it is refused whatever it is
            continue
        numeric = {int, float} & {*setting.types}
        bounds = setting.bounds
        assert (bounds is not None) == bool(numeric), name
        if bounds is None:
            continue
        assert bounds.whole == (int in numeric), name
        for end, outside in ((bounds.low, -1), (bounds.high, 1)):
            beyond = end + outside * (1 if bounds.whole else max(1e-3, 1e-3 * abs(end)))
            for wrong in (beyond, outside * 10**31, math.copysign(math.inf, outside), math.nan):
                with pytest.raises(ConfigError, match=f"{name} is "):
                    make_config(kind, {**owner_of(kind, name), name: wrong})


def owner_of(kind, name):
    """Settings that choose what has the option of that name; none for a setting of all runs."""
    if name in options_of(TrainingOptions):
        return {"evaluator": "train:x"} if kind is StudyConfig else {}
    table = {SearchConfig: STRATEGIES, StudyConfig: BLACK_BOX}.get(kind, {})
    owners = [method for method, own in table.items() if name in options_of(own)]
    if kind is MobileConfig:
        owners = [method for method, chain in CHAINS.items() if name in chain.options]
    more = {"evaluator": "table:x"} if kind is StudyConfig else {}
    return {"method": owners[0], **more} if owners else more


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (SearchConfig, {"arch_lr": 1e-5, "lr": 1e-300, "seed": 2**63 - 1, "data": "r\u00e9\udc80"}),
        (StudyConfig, {"method": "random", "evaluator": "table:x.csv"}),
        (TrainConfig, {"weight_decay": 1e-7, "genotype": "|a~0|"}),
    ],
)
@pytest.mark.parametrize("suffix", ["json", "yaml"])
def test_what_a_run_writes_it_reads_again(tmp_path, kind, settings, suffix):
    config = make_config(kind, settings)
    path = tmp_path / f"config.{suffix}"
    path.write_text(config_text(config))
    assert make_config(kind, read_settings(path)) == config


@pytest.mark.parametrize(("kind", "family"), [(SearchConfig, Strategy), (StudyConfig, BlackBox)])
def test_an_option_of_one_method_is_rejected_by_the_others(kind, family):
    more = {"evaluator": "table:x.csv"} if kind is StudyConfig else {}
    defaults = {name: f.default for own in family.table.values()
                for name, f in options_of(own).items()}  # fmt: skip
    for name, default in defaults.items():
        for method, own in family.table.items():
            settings = {"method": method, name: 0.5 if default is None else default, **more}
            if name in options_of(own):
                assert getattr(make_config(kind, settings).strategy(), name) == settings[name]
            else:
                names = ", ".join(options_of(own)) or "none"
                message = f"{name} given, which method {method} does not take; its options: {names}"
                with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
                    make_config(kind, settings)


def test_a_null_leaves_an_option_to_the_method():
    assert make_config(SearchConfig, {"method": "darts", "samples": None}).options == {}


def test_options_in_python_are_held_to_the_same():
    config = SearchConfig(method="rome", options={"samples": 3})
    assert config == make_config(SearchConfig, {"method": "rome", "samples": 3})
    config.validate()
    with pytest.raises(ConfigError, match="'sample' is no option of a run of this kind"):
        SearchConfig(method="rome", options={"sample": 3}).validate()
    with pytest.raises(ConfigError, match="'samples' is no option of a run of this kind"):
        TrainConfig(options={"samples": 3}).validate()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epoch": 3}, "unknown setting 'epoch'; did you mean epochs?"),
        ({"epochs": "3"}, "epochs is '3'; a whole number is needed, 1 to 1000000"),
        ({"epochs": 1.5}, "epochs is 1.5; a whole number is needed, 1 to 1000000"),
        ({"epochs": True}, "epochs is True; a whole number is needed, 1 to 1000000"),
        ({"epochs": 0}, "epochs is 0; a whole number is needed, 1 to 1000000"),
        ({"lr": -1}, "lr is -1.0; a number is needed, above 0 to 1e+30"),
        ({"lr": float("nan")}, "lr is nan; a number is needed, above 0 to 1e+30"),
        ({"lr": float("inf")}, "lr is inf; a number is needed, above 0 to 1e+30"),
        (
            {"lr": 10**400},
            "lr is a whole number of 1329 bits; a number is needed, above 0 to 1e+30",
        ),
        ({"seed": None}, "seed is None; a whole number is needed, 0 to 2^63-1"),
        ({"seed": 2**63}, "seed is 9223372036854775808; a whole number is needed, 0 to 2^63-1"),
        ({"seed": 10**5000}, "seed is a whole number of 16610 bits; a whole number is needed"),
        ({"momentum": 1.5}, "momentum is 1.5; a number is needed, 0 to 1"),
        ({"flip": "yes"}, "flip is 'yes'; true or false is needed"),
        ({"out": 5}, "out is 5; text is needed"),
        ({"out": "a\0b"}, "out is 'a\\x00b'; a NUL is in no name"),
        ({"out": "a\udc80"}, "out is 'a\\udc80', with bytes that are no UTF-8, where TensorBoard"),
        ({"backend": "gpu"}, "backend is 'gpu'; allowed: auto, eager, cpu, cuda, triton"),
        ({"memory": "most"}, "memory is 'most'; allowed: fast, lean, minimal"),
        ({"noise_factor": float("nan")}, "noise_factor is nan; a number is needed, 0 to 1000000"),
        ({"out": [["x"] * 9] * 9}, "out is [['x', 'x', 'x', 'x', 'x', 'x', ...], "),
        (
            {"method": "enas"},
            "method is 'enas'; allowed: anasod-darts, anasod-gdas, beta-darts, darts",
        ),
        ({"space": "S9"}, "no search space 'S9'"),
        ({"train_fraction": 1.0}, "train_fraction is 1.0"),
        ({"order": 3}, "order is 3"),
        ({"threads": 0}, "threads is 0"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        make_config(SearchConfig, settings)


def test_published_settings_of_the_methods():
    noisy = make_config(SearchConfig, {"method": "noisy-darts"})
    assert (noisy.resolved("lr"), noisy.resolved("batch_size")) == (0.05, 128)
    darts = make_config(SearchConfig, {"method": "darts", "lr": 1})
    assert (darts.resolved("lr"), darts.resolved("batch_size")) == (1.0, 64)
    assert make_config(SearchConfig, {"method": "fair-darts"}).resolved("arch_lr") == 3e-3


@pytest.mark.parametrize("suffix", ["json", "yaml"])
def test_a_file_builds_the_same_config(tmp_path, suffix):
    config = make_config(SearchConfig, {"epochs": 3, "noise_factor": 0.1})
    path = tmp_path / f"settings.{suffix}"
    path.write_text(config_text(config) if suffix == "json" else "epochs: 3\nnoise_factor: 0.1\n")
    assert make_config(SearchConfig, read_settings(path)) == config
    assert json.loads(config_text(config))["epochs"] == 3


@pytest.mark.parametrize(
    ("text", "message"), [("- 1\n- 2\n", "holds a list"), ("a: [", "cannot be read as YAML")]
)
def test_bad_files(tmp_path, text, message):
    path = tmp_path / "settings.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_settings(path)
    with pytest.raises(ConfigError, match="No such file"):
        read_settings(tmp_path / "absent.yaml")
