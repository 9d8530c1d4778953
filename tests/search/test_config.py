import json
import math
import re
from dataclasses import fields
from pathlib import Path

import pytest

import fastnas.search
from fastnas.blackbox import BLACK_BOX
from fastnas.blackbox.config import STUDY_OPTIONS, StudyConfig
from fastnas.search.config import (
    METHOD_OPTIONS,
    ConfigError,
    SearchConfig,
    TrainConfig,
    config_text,
    make_config,
    read_settings,
)
from fastnas.search.fields import bounds_of, hints_of
from fastnas.strategies import STRATEGIES

SOURCES = "\n".join(
    path.read_text()
    for path in Path(fastnas.search.__file__).parents[1].glob("*/*.py")
    if path.name != "config.py"
)


@pytest.mark.parametrize("kind", [SearchConfig, StudyConfig, TrainConfig])
def test_every_field_is_used(kind):
    """Read by the code that runs, or an option of a method; nothing is accepted and ignored."""
    for field in fields(kind):
        used = re.search(rf'config\.{field.name}\b|resolved\("{field.name}"\)', SOURCES)
        assert used or field.name in (*METHOD_OPTIONS, *STUDY_OPTIONS), (
            f"{field.name} is read nowhere"
        )


@pytest.mark.parametrize("kind", [SearchConfig, StudyConfig, TrainConfig])
def test_every_number_is_bounded_on_both_sides(kind):
    for field in fields(kind):
        numeric = {int, float} & {*hints_of(kind)[field.name]}
        bounds = bounds_of(field)
        assert (bounds is not None) == bool(numeric), field.name
        if bounds is None:
            continue
        assert bounds.whole == (int in numeric), field.name
        for end, outside in ((bounds.low, -1), (bounds.high, 1)):
            beyond = end + outside * (1 if bounds.whole else max(1e-3, 1e-3 * abs(end)))
            for wrong in (beyond, outside * 10**31, math.copysign(math.inf, outside), math.nan):
                with pytest.raises(ConfigError, match=f"{field.name} is "):
                    kind(**{field.name: wrong}).validate()


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


@pytest.mark.parametrize("name", METHOD_OPTIONS)
def test_an_option_of_one_method_is_rejected_by_the_others(name):
    value = next(s.options[name] for s in STRATEGIES.values() if name in s.options)
    value = 0.5 if value is None else value
    for method, strategy in STRATEGIES.items():
        settings = {"method": method, name: value}
        if name in strategy.options:
            make_config(SearchConfig, settings)
        else:
            with pytest.raises(ConfigError, match=f"{name} given, which method {method}"):
                make_config(SearchConfig, settings)


@pytest.mark.parametrize("name", STUDY_OPTIONS)
def test_an_option_of_one_black_box_method_is_rejected_by_the_others(name):
    value = next(m.options[name] for m in BLACK_BOX.values() if name in m.options)
    for method, kind in BLACK_BOX.items():
        settings = {"method": method, "evaluator": "table:x.csv", name: value}
        if name in kind.options:
            make_config(StudyConfig, settings)
        else:
            with pytest.raises(ConfigError, match=f"{name} given, which method {method}"):
                make_config(StudyConfig, settings)


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
        ({"method": "enas"}, "method is 'enas'; allowed: darts, noisy-darts, fair-darts"),
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
