"""Runs a black-box search from its config to its report."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from fastnas.blackbox.config import StudyConfig
from fastnas.blackbox.domains import Distributions
from fastnas.evaluators import Evaluator, TableEvaluator
from fastnas.evaluators.supernet import SupernetEvaluator
from fastnas.evaluators.training import TrainingEvaluator
from fastnas.extras import require
from fastnas.files import write_text
from fastnas.report.curves import draw_best_so_far
from fastnas.report.simplex import draw_simplex
from fastnas.runs.report import REPORT_MD, study_text, write_report
from fastnas.search.config import ConfigError
from fastnas.search.progress import StepBar, plain_console
from fastnas.search.run_folder import claimed_folder
from fastnas.spaces import get_space, parse
from fastnas.spaces.distribution import OperationDistribution, SlotLayout, slots_of

DATABASE = "study.db"
NOT_SHARED = ("out", "study", "budget", "table_report", "space", "length")
"""Settings in which the workers of a study may differ, or that its cells say."""


def run_study(
    config: StudyConfig, *, resume: bool = False, console: Console | None = None
) -> dict[str, Any]:
    """Evaluates up to the budget, alone or with other workers on the study, and reports.

    Leaves in config.out: config.json, study.db (unless `study` names another database),
    progress.png (accuracy of the best so far), simplex.png (what was tried), genotype.txt,
    report.json, report.md.

    Args:
        resume: go on with the run that config.out holds, if any.

    Returns:
        What report.json holds.

    Raises:
        BackendError, CheckpointError, ConfigError, DataError, EvaluationError, RunFolderError,
            StudyError: what was evaluated stays.
    """
    require("optuna")
    from fastnas.blackbox.study import Study

    console = console or plain_console()
    evaluator = _evaluator(config)
    shared = _shared(config, evaluator)

    def opened(database: str | Path) -> Study:
        return Study(database, config.strategy(), evaluator, config.seed, shared)

    # A study that is refused must leave no folder behind that claims to hold its run.
    given = None if config.study is None else opened(config.study)
    with claimed_folder(config, resume) as out:
        study = given or opened(out / DATABASE)
        with StepBar(console, "evaluate", config.budget, 0) as bar:
            study.run(config.budget, lambda new, best: bar.advance(new, f"best {best:.4f}"))
        result = study.result()
        text, found = result.cells[result.best]
        distribution = None
        if isinstance(study.domain, Distributions):
            distribution = study.domain.distribution(result.points[result.best]).as_dict()
        report = {
            "method": config.method,
            "evaluator": config.evaluator,
            "training": shared.get("training"),
            "seed": config.seed,
            "evaluations": len(result.cells),
            "evaluation_seconds": sum(cell.seconds for _, cell in result.cells),
            "evaluation_epochs": sum(cell.epochs for _, cell in result.cells),
            "genotype": text,
            "distribution": distribution,
            "accuracy": found.accuracy,
            "reported": _reported(config, evaluator, text),
        }
        write_text(out / "genotype.txt", text + "\n")
        accuracies = [evaluation.accuracy for _, evaluation in result.cells]
        draw_best_so_far([accuracies[i] for i in result.incumbents()], out / "progress.png")
        layout = evaluator.layout
        tried = [OperationDistribution.of(parse(cell), layout).p for cell, _ in result.cells]
        shares = {cell_type: [p[cell_type] for p in tried] for cell_type in layout.cell_types}
        draw_simplex(shares, layout.ops, accuracies, out / "simplex.png")
        write_report(out, report, study_text(report))
        console.print(f"\nreport: {out / REPORT_MD}")
        return report


def _evaluator(config: StudyConfig) -> Evaluator:
    kind, _, where = config.evaluator.partition(":")
    if kind == "supernet":
        return SupernetEvaluator.of_run(where)
    if kind == "train":
        return TrainingEvaluator.of_file(where, _trained_slots(config))
    return TableEvaluator(where, config.resolved("table_column"), config.resolved("table_report"))


def _trained_slots(config: StudyConfig) -> SlotLayout:
    space = "S0" if config.space is None else config.space
    try:
        return slots_of(get_space(space), config.length)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _shared(config: StudyConfig, evaluator: Evaluator) -> dict[str, Any]:
    """Lists what all workers of a study must agree on. A path is another on each machine."""
    shared = {name: v for name, v in asdict(config).items() if name not in NOT_SHARED}
    shared["evaluator"] = config.evaluator.partition(":")[0]
    if isinstance(evaluator, TableEvaluator):
        shared["table_column"] = evaluator.column
    if isinstance(evaluator, TrainingEvaluator):
        shared["training"] = evaluator.settings
    return shared


def _reported(
    config: StudyConfig, evaluator: Evaluator, cell: str
) -> dict[str, dict[str, float]] | None:
    """Returns the accuracy of the best cell that the search did not see."""
    if not isinstance(evaluator, TableEvaluator):
        return None
    column = config.resolved("table_report")
    return {column: evaluator.score(parse(cell), column)}
