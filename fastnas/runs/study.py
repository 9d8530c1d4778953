"""Runs a black-box search from its config to its report."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from fastnas.blackbox.config import StudyConfig
from fastnas.blackbox.domains import Distributions
from fastnas.evaluators import Evaluator
from fastnas.extras import require
from fastnas.files import write_text
from fastnas.options import options_of
from fastnas.report.curves import draw_best_so_far
from fastnas.report.simplex import draw_simplex
from fastnas.runs.cost import study_cost
from fastnas.runs.report import REPORT_MD, study_text, write_report
from fastnas.search.progress import StepBar, plain_console
from fastnas.search.run_folder import claimed_folder
from fastnas.spaces import parse
from fastnas.spaces.distribution import OperationDistribution

if TYPE_CHECKING:
    from fastnas.blackbox.study import Result, Study

DATABASE = "study.db"


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
        ConfigError, DataError, StudyError: a setting, the data or the study cannot be used.
        BackendError, EvaluationError, RunFolderError, CheckpointError: what was evaluated stays.
    """
    # Optuna belongs to an extra, so only a study asks for it.
    require("optuna")
    from fastnas.blackbox.study import Study

    console = console or plain_console()
    # The evaluator comes before any folder or database: a wrong table leaves nothing behind.
    evaluator = config.opened()
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
        report = _report(config, study, result)
        write_text(out / "genotype.txt", report["genotype"] + "\n")
        _draw(study, result, out)
        write_report(out, report, study_text(report))
        console.print(f"\nreport: {out / REPORT_MD}")
        return report


def _report(config: StudyConfig, study: Study, result: Result) -> dict[str, Any]:
    """Returns what report.json holds."""
    evaluator, evaluations = study.evaluator, [evaluation for _, evaluation in result.cells]
    text, found = result.cells[result.best]
    distribution = None
    if isinstance(study.domain, Distributions):
        distribution = study.domain.distribution(result.points[result.best]).as_dict()
    return {
        "method": config.method,
        "evaluator": config.evaluator,
        "training": evaluator.settings.get("training"),
        "seed": config.seed,
        "evaluations": len(evaluations),
        "evaluation_seconds": sum(evaluation.seconds for evaluation in evaluations),
        "evaluation_epochs": sum(evaluation.epochs for evaluation in evaluations),
        "genotype": text,
        "distribution": distribution,
        "accuracy": found.accuracy,
        # After each evaluation, as progress.png shows it.
        "best_so_far": [evaluations[i].accuracy for i in result.incumbents()],
        **study_cost(evaluator, parse(text)),
        "reported": evaluator.reported(parse(text)),
    }


def _draw(study: Study, result: Result, out: Path) -> None:
    """Draws how the best so far rose, and what was tried."""
    accuracies = [evaluation.accuracy for _, evaluation in result.cells]
    draw_best_so_far([accuracies[i] for i in result.incumbents()], out / "progress.png")
    layout = study.evaluator.layout
    # Cells are drawn by the shares of their operations also where cells, not distributions, were
    # searched.
    tried = [OperationDistribution.of(parse(cell), layout).p for cell, _ in result.cells]
    shares = {cell_type: [p[cell_type] for p in tried] for cell_type in layout.cell_types}
    draw_simplex(shares, layout.ops, accuracies, out / "simplex.png")


def _shared(config: StudyConfig, evaluator: Evaluator) -> dict[str, Any]:
    """Returns what all workers of a study must agree on."""
    of_method = options_of(type(config.strategy()))
    return {
        "seed": config.seed,
        "method": config.method,
        # Its place is left out: it is a path, which is another one on each machine.
        "evaluator": config.evaluator.partition(":")[0],
        **{name: value for name, value in config.options.items() if name in of_method},
        **evaluator.settings,
    }
