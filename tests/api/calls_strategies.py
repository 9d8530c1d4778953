"""Valid calls of fastnas.strategies: every method with every option, and what the loop asks."""

from __future__ import annotations

from typing import Any

import numpy as np
from wrong_values import Argument, Call, choice, flag, instance, integer, number, one_of, text

from fastnas import blackbox, spaces, strategies
from fastnas.blackbox.domains import Cells
from fastnas.blackbox.methods.base import Observation
from fastnas.nn import ArchParameters
from fastnas.options import options_of
from fastnas.spaces.nb201 import NB201Slots

OPTIONS: dict[str, Argument] = {
    "order": integer(1, 1, 2),
    "noise_kind": choice("gaussian").called("kind"),
    "noise_mixture": choice("additive").called("mixture"),
    "noise_mean": number(0.0, optional=True),
    "noise_factor": number(0.2, 0.0).called("factor"),
    "noise_decay": choice("none"),
    "skip_drop_path": number(0.0, 0.0, below=1.0),
    "stage_layers": text("0,6,12"),
    "stage_operations": text("5,3"),
    "skip_dropout": text("0,0.4,0.7"),
    "skip_cap": integer(2, 0, 1000),
    "beta_decay_weight": number(50.0, 0.0),
    "auxiliary_skip": number(1.0, 0.0),
    "auxiliary_decay": choice("linear"),
    "perturbation_start": number(0.03, 0.0, 1.0),
    "perturbation_end": number(0.3, 0.0, 1.0),
    "attack_steps": integer(7, 1),
    "kl_weight": number(0.0, 0.0),
    "tune_epochs": integer(5, 1),
    "zero_one_weight": number(10.0),
    "zero_one_loss": choice("l2"),
    "threshold": number(0.85, 0.0, 1.0),
    "single_level": flag(False),
    "samples": integer(1, 1),
    "tau_schedule": choice("linear"),
    "tau_start": number(10.0, above=0.0),
    "tau_end": number(0.1, above=0.0, optional=True),
    "arch_accumulation": choice("mean"),
    "params_accumulation": choice("sum"),
    "clip_samples": choice("together"),
    "paths_at_once": flag(False),
    "gdas_gradient": choice("executed"),
    "final_cells": integer(8, 1),
    "concentration": number(1.0, above=0.0, high=1e6),
    "population": integer(10, 1).but("below", "far below").plus(zero=0),
    "sample": integer(3, 1, 10),
    "arch_rate": number(0.1, above=0.0, high=10.0),
    "initial": integer(10, 2),
}
METHODS: dict[str, type[Any]] = {**strategies.STRATEGIES, **blackbox.BLACK_BOX}


def logits(name: str = "S2") -> ArchParameters:
    return ArchParameters(spaces.get_space(name))


def methods(names: str, **arguments: Argument) -> list[Call]:
    """A call of a method of DARTS' loop, on strategies that answer it in their own ways."""
    made: dict[str, dict[str, Any]] = {
        "darts": {}, "noisy-darts": {"noise_decay": "cosine"}, "gdas": {}, "anasod-darts": {},
        "fair-darts": {}, "beta-darts": {}, "drnas": {},
    }  # fmt: skip
    return [
        Call("Strategy", getattr(strategies.get_strategy(strategy, **options), name), arguments,
             f"{strategy}.{name}")
        for name in names.split()
        for strategy, options in made.items()
    ]  # fmt: skip


space = instance(lambda: spaces.get_space("S2"))
epochs = {"epoch": integer(0, 0, 9), "epochs": integer(10, 1)}
arch = instance(logits).plus(**{"of another space": logits("S0")})
observations = one_of(
    lambda: [Observation((0,) * 6, 0.5)],
    **{"None": None, "a number": 3, "numbers": [1], "points": [(0,) * 6]},
)

CALLS = [
    *(
        Call(cls.__name__, cls, {option: OPTIONS[option] for option in options_of(cls)}, name)
        for name, cls in METHODS.items()
        if options_of(cls)
    ),
    Call("get_strategy", strategies.get_strategy, {"name": choice("darts").called("method")}),
    Call("get_black_box", blackbox.get_black_box, {"name": choice("random").called("method")}),
    *methods("start_epoch", **epochs),
    *methods("noise_amplitude", epoch=integer(0, 0), epochs=integer(10, 1)),
    *methods("space", space=space),
    *methods("mixing_weights", arch=instance(logits)),
    *methods("derive", arch=arch, space=space),
    *(
        Call("BlackBox", blackbox.get_black_box(name).propose, {
            "domain": instance(lambda: Cells(NB201Slots())), "past": observations,
            "rng": instance(lambda: np.random.default_rng(0)), "count": integer(1, 1)},
            f"{name}.propose")
        for name in ("random", "local", "reinforce", "evolution")
    ),
    Call("BlackBox", blackbox.get_black_box("random").domain, {
        "layout": instance(NB201Slots)}, "random.domain"),
]  # fmt: skip
