"""fastnas search | train | sample | bench | info | draw"""

from __future__ import annotations

import inspect
import sys
import typing
from collections.abc import Callable, Sequence
from dataclasses import Field, fields
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from fastnas.allocator import keep_freed_memory
from fastnas.backends import BackendError
from fastnas.search.checkpoint import CheckpointError
from fastnas.search.config import (
    ConfigError,
    FolderConfig,
    SearchConfig,
    StudyConfig,
    TrainConfig,
    make_config,
    read_settings,
)
from fastnas.search.data import DataError
from fastnas.search.diverged import DivergedError
from fastnas.search.evaluators import EvaluationError
from fastnas.search.folder import RunFolderError
from fastnas.strategies import BLACK_BOX, STRATEGIES

USER_ERRORS = (
    BackendError,
    CheckpointError,
    ConfigError,
    DataError,
    EvaluationError,
    RunFolderError,
)

# Typer brings its own copy of click since 0.27; before, it used the package.
ClickException: type[Exception] = next(
    kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException"
)

app = typer.Typer(
    name="fastnas",
    help="Differentiable architecture search, fused.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _config_command(
    kinds: Sequence[type[FolderConfig]],
    choose: Callable[[dict[str, Any]], type[FolderConfig]],
    run: Callable[..., Any],
    text: str,
) -> Callable[..., None]:
    """A command with one flag per field of the dataclasses, which are the only list of settings.

    Args:
        choose: says of the given settings which of the kinds they are.
    """

    def command(config: Path | None, resume: bool, **flags: Any) -> None:
        settings = read_settings(config) if config else {}
        settings |= {name: value for name, value in flags.items() if value is not None}
        run(make_config(choose(settings), settings), resume=resume, console=Console())

    settings: dict[str, tuple[Any, Field[Any]]] = {}
    for kind in kinds:
        hints = typing.get_type_hints(kind)
        for f in fields(kind):
            settings.setdefault(f.name, (hints[f.name], f))
    parameters = []
    for hint, f in settings.values():
        base = next(t for t in (typing.get_args(hint) or (hint,)))
        name = f.name.replace("_", "-")
        default = "" if f.default is None or f.default == "" else f" (default: {f.default})"
        help_text = f"{f.metadata['help']}{default}"
        if f.name == "genotype":
            flag: Any = typer.Argument(help=help_text, show_default=False)
        else:
            spelling = f"--{name}/--no-{name}" if base is bool else f"--{name}"
            flag = typer.Option(spelling, help=help_text, show_default=False)
        parameters.append(_parameter(f.name, base | None, None, flag))
    parameters += [
        _parameter("config", Path | None, None, typer.Option(help="YAML or JSON file of settings")),
        _parameter("resume", bool, False, typer.Option(help="go on with the run in --out, if any")),
    ]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    command.__doc__ = text
    return command


def _parameter(name: str, kind: Any, default: Any, flag: Any) -> inspect.Parameter:
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, flag]
    )


def _search(config: FolderConfig, **arguments: Any) -> None:
    if isinstance(config, StudyConfig):
        from fastnas.search.study_run import run_study

        run_study(config, **arguments)
    elif isinstance(config, SearchConfig):
        from fastnas.search.runs import run_search

        run_search(config, **arguments)


def _train(config: TrainConfig, **arguments: Any) -> None:
    from fastnas.search.runs import run_train

    run_train(config, **arguments)


def _kind_of_search(settings: dict[str, Any]) -> type[FolderConfig]:
    method = settings.get("method")
    if method is not None and method not in (*STRATEGIES, *BLACK_BOX):
        raise ConfigError(f"method is {method!r}; allowed: {', '.join([*STRATEGIES, *BLACK_BOX])}")
    return StudyConfig if method in BLACK_BOX else SearchConfig


app.command("search")(
    _config_command(
        (SearchConfig, StudyConfig), _kind_of_search, _search,
        "Search a cell, train it shortly, report.",
    )
)  # fmt: skip
app.command("train")(
    _config_command((TrainConfig,), lambda _: TrainConfig, _train, "Train a genotype from scratch.")
)


@app.command()
def info() -> None:
    """What is here, what is not and why, and what auto would pick."""
    from fastnas.info import print_info

    print_info(Console())


@app.command()
def sample(
    report: Annotated[Path, typer.Argument(help="report.json of an anasod search")],
    length: Annotated[int | None, typer.Option(help="operations of a cell")] = None,
    count: Annotated[int, typer.Option(help="cells")] = 1,
    seed: Annotated[int, typer.Option(help="of what is drawn")] = 0,
) -> None:
    """Draw cells of any length from the distribution that a search has found, as JSON lines."""
    from fastnas.search.sample import sampled_cells

    for text in sampled_cells(report, length, count, seed):
        typer.echo(text)


@app.command()
def draw(
    genotype: Annotated[str, typer.Argument(help="genotype file, or its text")],
    picture: Annotated[Path, typer.Argument(help="FILE.png or FILE.svg")],
    title: Annotated[str, typer.Option(help="above the cells")] = "",
    force: Annotated[bool, typer.Option(help="replace an existing picture")] = False,
) -> None:
    """Draw the cells of a genotype."""
    from fastnas.report.cell_drawing import draw_genotype
    from fastnas.search.runs import read_genotype

    parsed = read_genotype(genotype)
    if picture.exists() and not force:
        raise ConfigError(f"{picture} exists; --force replaces it")
    try:
        draw_genotype(parsed, picture, title=title)
    except (ValueError, OSError) as error:
        raise ConfigError(f"{picture}: {error}") from error


@app.command()
def bench(
    suite: Annotated[
        str, typer.Argument(help="ops, search, paths, memory, roofline or all")
    ] = "ops",
    op: Annotated[str | None, typer.Option(help="only this op")] = None,
    quick: Annotated[bool, typer.Option(help="small sizes, few repeats")] = False,
    full: Annotated[bool, typer.Option(help="also torch.compile max-autotune")] = False,
    skip: Annotated[str, typer.Option(help="providers left out, as in compile,checkpoint")] = "",
    only: Annotated[str, typer.Option(help="search: these providers, and eager")] = "",
    batch: Annotated[int | None, typer.Option(help="search: images per batch")] = None,
    dtype: Annotated[str, typer.Option(help="search: float32 or bfloat16")] = "float32",
    compile_seconds: Annotated[float | None, typer.Option(help="search: for torch.compile")] = None,
    out: Annotated[Path | None, typer.Option(help="CSV file of the results")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or auto")] = "auto",
) -> None:
    """Measure time and memory beside eager; verified before it is timed."""
    from fastnas.benchmarks.harness.run import run_suite

    try:
        rows = run_suite(
            suite, op=op, quick=quick, full=full, skip=_names(skip), only=_names(only),
            batch=batch, dtype=dtype, compile_seconds=compile_seconds,
            out=out, threads=threads, device=device,
        )  # fmt: skip
    except (ValueError, FileExistsError) as error:
        raise ConfigError(str(error)) from error
    if any(row.is_red for row in rows):
        raise typer.Exit(1)


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def main() -> None:
    """The command line: a wrong input is one line on stderr and exit code 2, a run that diverged
    one line and exit code 1."""
    keep_freed_memory()
    try:
        code = app(standalone_mode=False)
    except ClickException as error:
        _fail(error.format_message())  # type: ignore[attr-defined]
    except USER_ERRORS as error:
        _fail(str(error))
    except DivergedError as error:
        _fail(str(error), 1)
    except (KeyboardInterrupt, typer.Abort):
        print("fastnas: stopped; --resume goes on from the last checkpoint", file=sys.stderr)
        sys.exit(130)
    else:
        sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str, code: int = 2) -> typing.NoReturn:
    print(f"fastnas: error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)
