"""Runs a whole search (then trains what it derives, then compares), or a training."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from fastnas.evaluators import TableEvaluator
from fastnas.evaluators.supernet import SupernetEvaluator
from fastnas.evaluators.table import reported_column
from fastnas.processes import joined
from fastnas.runs.compare import comparison
from fastnas.runs.derived import check_derived, trained_cost
from fastnas.runs.eigenvalue_report import check_memory, eigenvalue_figures
from fastnas.runs.genotype import leave_genotype, table_of
from fastnas.runs.report import (
    REPORT_MD,
    environment,
    search_text,
    train_text,
    write_report,
)
from fastnas.runs.whole_search import Answers, search_to_the_report
from fastnas.search.build import load_data, seeded
from fastnas.search.config import SearchConfig, TrainConfig
from fastnas.search.genotype_file import read_genotype
from fastnas.search.progress import plain_console, stage
from fastnas.search.run_folder import claimed_folder
from fastnas.search.searcher import Searcher
from fastnas.search.trainer import Trainer
from fastnas.spaces import AnyGenotype, layout_of
from fastnas.strategies.anasod import OnDistributions
from fastnas.text_file import file_path


def run_search(
    config: SearchConfig, *, resume: bool = False, console: Console | None = None
) -> dict[str, Any]:
    """Searches, trains the derived network shortly, compares with eager, reports.

    Leaves in config.out: config.json, search.pt and train.pt (checkpoints), genotype.json,
    cell.png, cell.svg, history.png, tensorboard logs, report.json, report.md.

    Args:
        resume: go on with the run that config.out holds, if any.

    Returns:
        What report.json holds.

    Raises:
        ConfigError, DataError, BackendError, CheckpointError, RunFolderError: with nothing
            overwritten.
    """
    with joined() as processes:
        console = console or plain_console(quiet=not processes.is_first)
        return _run_search(config, resume, console)


def _run_search(config: SearchConfig, resume: bool, console: Console) -> dict[str, Any]:
    # All that can be refused is refused here, before hours of search: the table, the data, the
    # training of what will be derived.
    table = _table(config)
    # The searcher seeds again, so what reading the data draws is in no result.
    images = load_data(config, seeded(config))
    check_derived(config, images)
    searcher = Searcher(config, images)
    goes_on = resume and (file_path(config.out) / searcher.checkpoint).exists()
    if not goes_on:
        check_memory(searcher)
    with claimed_folder(config, resume, searcher) as out:
        # A search that is finished measures nothing more, whatever memory there is by now.
        if goes_on and not searcher.finished:
            check_memory(searcher)
        answers = Answers(
            searcher.space.name,
            derive=lambda: _final_genotype(searcher, console),
            found=lambda genotype: _found(searcher, genotype, table, console),
            text=search_text,
            compare=lambda steps: comparison(searcher, steps),
        )
        return search_to_the_report(searcher, out, resume, console, answers)


def _found(
    searcher: Searcher, genotype: AnyGenotype, table: TableEvaluator | None, console: Console
) -> dict[str, Any]:
    """Returns what a report says of the search itself."""
    config, stop = searcher.config, searcher.early_stop
    # The logits that are derived are those of this epoch, and so are the figures beside them.
    last = searcher.history[-1 if stop is None else stop.rollback]
    choices = searcher.strategy.undecided(searcher.arch, searcher.space)
    undecided = {cell: str(of_cell) for cell, of_cell in choices.items() if of_cell.count}
    for cell, text in undecided.items():
        console.print(f"undecided: {text} of the {cell} cell are within the initial noise")
    return {
        "method": config.method,
        "space": config.space,
        "data": config.data,
        "classes": list(searcher.images.class_names),
        "seed": config.seed,
        "epochs": searcher.epoch,
        "genotype": layout_of(genotype).text(genotype),
        "undecided": undecided,
        "collapsed": last["collapsed"],
        **{f"skips_{cell}": last[f"skips_{cell}"] for cell in searcher.space.cell_types},
        # An epoch that is gone back to may be one that was not validated.
        "supernet_accuracy": last.get("valid_accuracy"),
        **eigenvalue_figures(searcher),
        **searcher.strategy.findings(searcher.arch, searcher.space),
        "table": table and {table.column: table.score(genotype, table.column)},
        "search_seconds": searcher.seconds,
        "backend": searcher.backend,
        "precision": config.precision,
        "cuda_graph": searcher.is_graphed,
        "environment": environment(searcher.device),
    }


def run_train(
    config: TrainConfig, *, resume: bool = False, console: Console | None = None
) -> dict[str, Any]:
    """Trains a genotype and reports its test accuracy; arguments and errors as `run_search`.

    Leaves in config.out: config.json, train.pt, genotype.json, cell.png, cell.svg (column.png,
    column.svg), tensorboard logs, report.json, report.md.
    """
    with joined() as processes:
        console = console or plain_console(quiet=not processes.is_first)
        return _run_train(config, resume, console)


def _run_train(config: TrainConfig, resume: bool, console: Console) -> dict[str, Any]:
    trainer = Trainer(config, read_genotype(config.genotype))
    with claimed_folder(config, resume, trainer) as out:
        console.print(f"training {trainer.parameters:,} parameters on {config.data}", style="bold")
        test_accuracy = trainer.train(out, console)
        genotype = trainer.genotype
        report = {
            "data": config.data,
            "classes": list(trainer.images.class_names),
            "seed": config.seed,
            "epochs": trainer.epochs,
            "genotype": trainer.what.text,
            **trained_cost(trainer),
            "test_accuracy": test_accuracy,
            "test_images": len(trainer.images.test_labels),
            "train_seconds": trainer.seconds,
            "precision": config.precision,
            "environment": environment(trainer.device),
        }
        if trainer.processes.is_first:
            leave_genotype(out, genotype, f"trained on {config.data}")
            write_report(out, report, train_text(report, table_of(genotype, report)))
        console.print(f"\nreport: {out / REPORT_MD}")
        return report


def _final_genotype(searcher: Searcher, console: Console) -> AnyGenotype:
    """Returns what the search derives; of a distribution the supernet's best of some cells."""
    strategy = searcher.strategy
    if not isinstance(strategy, OnDistributions):
        return searcher.genotype()
    cells = strategy.cells(searcher.arch, searcher.space, strategy.final_cells)
    with stage(console, f"evaluating {len(cells)} cells of the distribution"):
        # These cells are of the distribution; which of them is best is not in the logits.
        found = SupernetEvaluator(searcher).evaluate(cells, range(len(cells)))
    return max(zip(cells, found), key=lambda pair: pair[1].accuracy)[0]


def _table(config: SearchConfig) -> TableEvaluator | None:
    """Opens the table in which the derived cell is looked up."""
    if config.table is None:
        return None
    return TableEvaluator(config.table, config.table_report or reported_column(config.table))
