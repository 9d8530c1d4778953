"""Defines the commands: fastnas search | train | sample | bench | info | draw | landscape."""

from __future__ import annotations

import inspect
import io
import os
import shlex
import signal
import sys
import typing
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer

from fastnas._version import __version__
from fastnas.allocator import keep_freed_memory
from fastnas.backends import BackendError
from fastnas.benchmarks.harness.limits import BATCHES, COMPILE_SECONDS
from fastnas.blackbox import BLACK_BOX
from fastnas.blackbox.config import StudyConfig
from fastnas.bounds import THREADS, Bounds
from fastnas.data.load import DataError
from fastnas.evaluators import EvaluationError
from fastnas.processes import ProcessesError, here, joined, may_tell
from fastnas.runs.landscape_settings import EXTENTS, IMAGES, STEPS, LandscapeSettings
from fastnas.runs.sample import COUNTS, sampled_cells
from fastnas.search.checkpoint import CheckpointError
from fastnas.search.config import (
    ConfigError,
    FolderConfig,
    SearchConfig,
    TrainConfig,
    make_config,
    read_settings,
)
from fastnas.search.diverged import DivergedError
from fastnas.search.fields import SEEDS, Setting, settings_of
from fastnas.search.mobile_config import MobileConfig, check_space
from fastnas.search.progress import plain_console
from fastnas.search.run_folder import RunFolderError
from fastnas.search.settings_file import number
from fastnas.signals import Stopped
from fastnas.spaces.mobile_genotype import MOBILENET
from fastnas.spaces.slots import LENGTH
from fastnas.strategies import STRATEGIES
from fastnas.text_file import file_path

USER_ERRORS = (
    BackendError,
    CheckpointError,
    ConfigError,
    DataError,
    EvaluationError,
    RunFolderError,
)

TABLES_WIDTH = 1000
LONGEST_LINE = 3000

# Typer brings its own copy of click since 0.27; before, it used the package.
ClickException: type[Exception] = next(
    kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException"
)


def command_line() -> typer.Typer:
    """Builds the command line, with a flag for each option of the methods that are there by now."""
    app = typer.Typer(
        name="fastnas",
        add_completion=False,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    # `fastnas` alone prints its help and ends with 0, where typer would end with an error.
    app.callback(invoke_without_command=True)(start)
    app.command("search", help="Search a cell or a column, train it shortly, report.")(
        _config_command((SearchConfig, MobileConfig, StudyConfig), _kind_of_search, _search)
    )
    app.command("train", help="Train a genotype from scratch.")(
        _config_command((TrainConfig,), lambda _: TrainConfig, _train)
    )
    for command in (info, sample, draw, landscape, bench):
        app.command()(command)
    return app


def start(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="print the version")] = False,
) -> None:
    """Differentiable architecture search, fused."""
    if version:
        typer.echo(f"fastnas {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help(), nl=False)


def _number(text: Any) -> Any:
    """Returns the number that a file of settings would have there, or the text where it is none."""
    try:
        return number(text) if isinstance(text, str) else text
    except ValueError:  # thousands of digits
        return text


def _numeric(*names: str, help: str, bounds: Bounds) -> Any:
    """Makes an option that is a number; whoever reads it holds it to its bounds."""
    metavar = "INTEGER" if bounds.whole else "NUMBER"
    return typer.Option(*names, help=help, parser=_number, metavar=metavar, show_default=False)


def _config_command(
    kinds: Sequence[type[FolderConfig]],
    choose: Callable[[dict[str, Any]], type[FolderConfig]],
    run: Callable[..., Any],
) -> Callable[..., None]:
    """Makes a command with one flag per setting of its kinds of runs, options of methods included.

    Args:
        choose: says of the given settings which of the kinds they are.
    """

    def command(config: str | None, resume: bool, **flags: Any) -> None:
        settings = {} if config is None else read_settings(file_path(config))
        # A flag that is not given is None, so a file's settings stay where no flag is.
        settings |= {name: value for name, value in flags.items() if value is not None}
        with joined() as processes:
            config_made = make_config(choose(settings), settings)
            if processes.size > 1 and isinstance(config_made, StudyConfig):
                raise ConfigError(
                    f"method is {config_made.method!r}, whose evaluations share no step; start as"
                    " many commands as you like on one --study, without torchrun"
                )
            run(config_made, resume=resume, console=plain_console(quiet=not processes.is_first))

    settings: dict[str, list[Setting]] = {}
    # A setting that searches and studies share is one flag, with both help texts.
    for kind in kinds:
        for name, setting in settings_of(kind).items():
            settings.setdefault(name, []).append(setting)
    parameters = [
        *(_flag(name, *alike) for name, alike in settings.items()),
        _parameter("config", str | None, None, typer.Option(help="YAML or JSON file of settings")),
        _parameter("resume", bool, False, typer.Option(help="go on with the run in --out, if any")),
    ]
    # typer reads flags off a signature; here they come from the fields of the configs.
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    return command


def _flag(name: str, first: Setting, *others: Setting) -> inspect.Parameter:
    """Makes the flag of a setting, the first of its kind of run; None where it is not given."""
    text = "; ".join(dict.fromkeys(setting.text for setting in (first, *others)))
    allowed = str(first.bounds) if first.bounds else ", ".join(first.choices or ())
    default = f"default: {first.default}" if first.default else ""
    notes = "; ".join(note for note in (allowed, default) if note)
    help_text = f"{text} ({notes})" if notes else text
    kind, spelled = first.types[0], name.replace("_", "-")
    if name == "genotype":
        flag: Any = typer.Argument(help=help_text, show_default=False)
    elif kind is bool:
        flag = typer.Option(f"--{spelled}/--no-{spelled}", help=help_text, show_default=False)
    elif first.bounds is not None:
        flag = _numeric(f"--{spelled}", help=help_text, bounds=first.bounds)
    else:
        flag = typer.Option(f"--{spelled}", help=help_text, show_default=False)
    return _parameter(name, kind | None, None, flag)


def _parameter(name: str, kind: Any, default: Any, flag: Any) -> inspect.Parameter:
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, flag]
    )


def _search(config: FolderConfig, **arguments: Any) -> None:
    if isinstance(config, StudyConfig):
        # It is imported here, as optuna and matplotlib would slow every other command down.
        from fastnas.runs.study import run_study

        run_study(config, **arguments)
    elif isinstance(config, MobileConfig):
        from fastnas.runs.mobile import run_mobile_search

        run_mobile_search(config, **arguments)
    elif isinstance(config, SearchConfig):
        from fastnas.runs.search import run_search

        run_search(config, **arguments)


def _train(config: TrainConfig, **arguments: Any) -> None:
    from fastnas.runs.search import run_train

    run_train(config, **arguments)


def _kind_of_search(settings: dict[str, Any]) -> type[FolderConfig]:
    method = settings.get("method")
    if settings.get("space") == MOBILENET:
        check_space(settings)
        return MobileConfig
    methods = [*sorted(STRATEGIES), *sorted(BLACK_BOX)]
    if method is not None and method not in methods:
        raise ConfigError(f"method is {method!r}; allowed: {', '.join(methods)}")
    if method in BLACK_BOX:
        return StudyConfig
    check_space(settings)
    return SearchConfig


def info() -> None:
    """What is here, what is not and why, and what auto would pick."""
    from fastnas.info import print_info

    # As wide as the tables are: a path that is cut, or broken over lines, cannot be copied.
    print_info(plain_console(width=TABLES_WIDTH))


def sample(
    report: Annotated[str, typer.Argument(help="report.json of an anasod search")],
    length: Annotated[
        int | None, _numeric(help=f"operations of a cell ({LENGTH})", bounds=LENGTH)
    ] = None,
    count: Annotated[int, _numeric(help=f"cells ({COUNTS}; default: 1)", bounds=COUNTS)] = 1,
    seed: Annotated[
        int, _numeric(help=f"of what is drawn ({SEEDS}; default: 0)", bounds=SEEDS)
    ] = 0,
) -> None:
    """Draw cells of any length from the distribution that a search has found, as JSON lines."""
    for text in sampled_cells(file_path(report), length, count, seed):
        typer.echo(text)


def draw(
    genotype: Annotated[str, typer.Argument(help="genotype file, or its text")],
    picture: Annotated[str, typer.Argument(help="FILE.png or FILE.svg")],
    title: Annotated[str, typer.Option(help="above the cells")] = "",
    force: Annotated[bool, typer.Option(help="replace an existing picture")] = False,
) -> None:
    """Draw the cells, or the column, of a genotype."""
    from fastnas.report.architecture_drawing import architecture_figure
    from fastnas.report.figures import picture_path, save_figure
    from fastnas.search.genotype_file import read_genotype

    parsed, path = read_genotype(genotype), file_path(picture)
    if os.path.lexists(path) and not force:
        raise ConfigError(f"{path} exists; --force replaces it")
    try:
        picture_path(path)
        save_figure(architecture_figure(parsed, title=title), path)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(str(error)) from error


def landscape(
    run: Annotated[str, typer.Argument(help="folder of a finished search")],
    steps: Annotated[
        int, _numeric(help=f"points a side ({STEPS}; default: 11)", bounds=STEPS)
    ] = 11,
    extent: Annotated[
        float,
        _numeric(
            help=f"half a side, in norms of the logits ({EXTENTS}; default: 1)", bounds=EXTENTS
        ),
    ] = 1.0,
    images: Annotated[
        int | None,
        _numeric(help=f"of the logits ({IMAGES}; default: all, at most 4096)", bounds=IMAGES),
    ] = None,
    seed: Annotated[
        int, _numeric(help=f"of the directions ({SEEDS}; default: 0)", bounds=SEEDS)
    ] = 0,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N (default: its)")] = None,
    force: Annotated[bool, typer.Option(help="replace an existing landscape")] = False,
) -> None:
    """Compute loss and accuracy around the logits of a search, as a table and pictures."""
    from fastnas.runs.landscape import leave_landscape

    settings = LandscapeSettings(steps, extent, images, seed, device)
    leave_landscape(file_path(run), settings, force=force, console=plain_console())


def bench(
    suite: Annotated[
        str, typer.Argument(help="ops, search, paths, memory, roofline or all")
    ] = "ops",
    op: Annotated[str | None, typer.Option(help="only this op")] = None,
    quick: Annotated[bool, typer.Option(help="small sizes, few repeats")] = False,
    full: Annotated[bool, typer.Option(help="also torch.compile max-autotune")] = False,
    skip: Annotated[str, typer.Option(help="providers left out, as in compile,checkpoint")] = "",
    only: Annotated[str, typer.Option(help="search: these providers, and eager")] = "",
    batch: Annotated[
        int | None, _numeric(help=f"search: images per batch ({BATCHES})", bounds=BATCHES)
    ] = None,
    dtype: Annotated[str, typer.Option(help="search: float32 or bfloat16")] = "float32",
    compile_seconds: Annotated[
        float | None,
        _numeric(help=f"search: for torch.compile ({COMPILE_SECONDS})", bounds=COMPILE_SECONDS),
    ] = None,
    out: Annotated[str | None, typer.Option(help="CSV file of the results, or a folder")] = None,
    threads: Annotated[
        int | None, _numeric(help=f"CPU threads ({THREADS})", bounds=THREADS)
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or auto")] = "auto",
) -> None:
    """Measure time and memory beside eager; verified before it is timed."""
    from fastnas.benchmarks.harness.run import run_suite

    try:
        rows = run_suite(
            suite, op=op, quick=quick, full=full, skip=_names(skip), only=_names(only),
            batch=batch, dtype=dtype, compile_seconds=compile_seconds,
            out=None if out is None else file_path(out), threads=threads, device=device,
        )  # fmt: skip
    except OSError as error:
        raise ConfigError(f"{error.filename or out}: {error.strerror or error}") from error
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if any(row.is_red for row in rows):
        # A result that is wrong fails the command, so that a script of benchmarks notices.
        raise typer.Exit(1)


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


RESUMABLE = ("search", "train")


def main() -> None:
    """Runs a command, and ends with one line on stderr where it cannot.

    The exit code is 2 for a wrong input, 1 for a run that diverged or was refused something by the
    system, and that of the signal for one that was stopped.
    """
    # It comes before the first tensor: blocks that are mapped by then stay so until they are freed.
    keep_freed_memory()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a name may have bytes that are no text
            stream.reconfigure(errors="backslashreplace")
    try:
        code = command_line()(prog_name="fastnas", standalone_mode=False)
    except ClickException as error:
        _fail(error.format_message())  # type: ignore[attr-defined]
    except USER_ERRORS as error:
        _fail(str(error))
    except (DivergedError, ProcessesError) as error:
        _fail(str(error), 1)
    except OSError as error:  # a full disk, a folder that has vanished: at any moment of a run
        name = "" if error.filename is None else f"{error.filename}: "
        _fail(f"{name}{error.strerror or error}", 1)
    except Stopped as stop:
        if may_tell():
            print(f"fastnas: {_how_to_go_on(stop, sys.argv[1:])}", file=sys.stderr)
        sys.exit(stop.code)
    sys.exit(code if isinstance(code, int) else 0)


def _how_to_go_on(stop: Stopped, arguments: list[str]) -> str:
    """Says what was saved of a run that a signal has stopped, and which command continues it."""
    name = signal.Signals(stop.number).name
    # Only these two can go on from what they have saved.
    if not arguments or arguments[0] not in RESUMABLE:
        return f"stopped by {name}"
    again = [] if "--resume" in arguments else ["--resume"]
    saved = "" if stop.saved is None else f" {stop.saved} is saved;"
    size = here().size
    started = ["fastnas"]
    if size > 1:
        started = ["torchrun", "--nproc-per-node", os.environ.get("LOCAL_WORLD_SIZE", str(size))]
        started += ["-m", "fastnas"]
    command = shlex.join([*started, *arguments, *again])
    return f"stopped by {name};{saved} this goes on: {command}"


def _fail(message: str, code: int = 2) -> typing.NoReturn:
    """Ends with one line, of bounded length and without what would move a terminal's cursor."""
    # A name in a message may hold escape sequences, which a terminal would obey.
    line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in " ".join(message.split()))
    if len(line) > LONGEST_LINE:
        line = f"{line[: LONGEST_LINE // 2]} ... {line[-LONGEST_LINE // 2 :]}"
    if may_tell():
        print(f"fastnas: error: {line}", file=sys.stderr)
    sys.exit(code)
