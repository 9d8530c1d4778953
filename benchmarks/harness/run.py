"""Runs the suites: verify, time, weigh, write the CSV, print the table."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from time import perf_counter

import torch
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from torch._functorch import config as functorch_config

from fastnas.backends import BACKENDS, MEMORY
from fastnas.benchmarks.harness.cudnn import cudnn_as_measured
from fastnas.benchmarks.harness.memory import peak_bytes, saved_bytes
from fastnas.benchmarks.harness.roofline import measure_roof, roofline_rows
from fastnas.benchmarks.harness.schema import (
    Conditions,
    Row,
    checkout,
    current_conditions,
    new_row,
    refuse_existing,
    result_name,
    write_csv,
)
from fastnas.benchmarks.harness.table import print_rows
from fastnas.benchmarks.harness.timing import Roof, Timing, measure
from fastnas.benchmarks.harness.verify import EAGER, YES, Case, Problem, not_run, verify
from fastnas.benchmarks.search.memory import memory_rows
from fastnas.benchmarks.search.providers import PROVIDERS, StepSettings
from fastnas.benchmarks.search.single_path import single_path_rows
from fastnas.benchmarks.search.step import search_rows
from fastnas.bounds import THREADS
from fastnas.checks import short
from fastnas.ops import OPS

OP_PASSES = ("fwd", "bwd", "fwd+bwd")
SUITES = ("ops", "search", "paths", "memory", "roofline", "all")
DEVICES = ("cpu", "cuda", "auto")
OP_PROVIDERS = (
    *("eager-stack", "eager-addcmul", "eager-channels-last", "eager-edges"),
    *("compile", "compile-max", "kernels-cpu"),
    *(
        f"fastnas-{name}{suffix}"
        for name in BACKENDS
        for suffix in ("", *(f"-{memory}" for memory in MEMORY if memory != "lean"))
    ),
)
SKIPPABLE: dict[str, tuple[str, ...]] = {
    "ops": OP_PROVIDERS,
    "search": tuple(name for name in PROVIDERS if name != EAGER),
    "paths": (),
    "memory": (),
    "roofline": (),
}
"""Suite to the providers that `skip` may leave out."""
REPEATS = {"cpu": 30, "cuda": 100}
QUICK_REPEATS = 7
WARMUP = 3
SECONDS = 20
"""For the repeats of one pass of a case; slow calls get fewer, down to `QUICK_REPEATS`."""
WIDTH = 192
BUSY = 0.5

Say = Callable[[str], object]


def run_suite(
    suite: str = "all",
    *,
    op: str | None = None,
    quick: bool = False,
    full: bool = False,
    skip: Collection[str] = (),
    only: Collection[str] = (),
    batch: int | None = None,
    dtype: str = "float32",
    compile_seconds: float | None = None,
    out: Path | None = None,
    threads: int | None = None,
    device: str = "auto",
) -> list[Row]:
    """Runs benchmarks, writes their CSV and prints a table.

    Args:
        suite: "ops", "search", "paths" (single-path steps), "memory", "roofline" or "all".
        op: only this op of the ops suite.
        quick: small sizes and few repeats; the result is no record.
        full: more cases, and torch.compile's max-autotune.
        skip: providers that are left out, but never eager: torch.compile takes minutes a case.
        only, batch, dtype, compile_seconds: of the search step, see `StepSettings`.
        out: a .csv file, or a folder for a file named after device and commit. By default
            benchmarks/results of the checkout, or ./results where fastnas is installed.
        threads: CPU threads; by default torch's.
        device: "cpu", "cuda", or "auto": cuda where there is one.

    Returns:
        All rows. Those of providers that computed something wrong (`Row.is_red`) have no timings;
        a caller that is a program should then exit nonzero.

    Raises:
        ValueError: an argument that is not allowed.
        FileExistsError: before anything runs, if the result would overwrite another.
    """
    device = _check(suite, op, quick, full, threads, device)
    _check_skip(skip, suite)
    settings = StepSettings(quick, full, skip, only, batch, dtype, compile_seconds)
    asked = only or dtype != StepSettings.dtype or (batch, compile_seconds) != (None, None)
    if asked and suite not in ("search", "all"):
        raise ValueError(
            f"only, batch, dtype and compile_seconds are of the search suite, not {suite!r}"
        )
    settings.providers(device)
    with _threads(threads), cudnn_as_measured():
        conditions = current_conditions(device)
        path = result_path(conditions, out, suite if op is None else op, quick)
        # It is asked before anything runs, not after half an hour of measuring.
        refuse_existing(path)
        console = Console(width=None if sys.stdout.isatty() else WIDTH)
        _warn_if_busy(console)
        with _progress(console) as say:
            say("copy bandwidth, multiply-adds")
            roof = measure_roof(device, quick)
            found: dict[tuple[str, ...], Row] = {}
            for row in _rows(suite, op, settings, conditions, device, roof, say):
                # A later row of a case and provider is the better one.
                found[(*row.case, row.backend)] = row
                # Written as they come: a run that is killed leaves what it measured.
                write_csv([*found.values()], path, overwrite=True)
    rows = [*found.values()]
    print_rows(rows, roof, console)
    console.print(f"written: {path}", soft_wrap=True, highlight=False)
    return rows


def _rows(
    suite: str,
    op: str | None,
    settings: StepSettings,
    conditions: Conditions,
    device: str,
    roof: Roof | None,
    say: Say,
) -> Iterator[Row]:
    """Yields the rows of the suites that are asked for, each as soon as it is measured."""
    quick, full, skip = settings.quick, settings.full, settings.skip
    if suite in ("roofline", "all"):
        yield from roofline_rows(conditions, device, quick, say)
    if suite in ("ops", "all"):
        for case in op_cases(device, op, quick, full):
            yield from op_rows(case, conditions, device, quick, full, roof, say, skip)
    if suite in ("search", "all"):
        yield from search_rows(conditions, device, settings, say)
    if suite in ("paths", "all"):
        yield from single_path_rows(conditions, device, quick, say)
    if suite in ("memory", "all"):
        yield from memory_rows(conditions, device, quick, say)


def result_path(conditions: Conditions, out: Path | None, suite: str, quick: bool) -> Path:
    """Says where the result goes: `out` if it names a file, else device and commit name it."""
    if out is not None and out.suffix == ".csv":
        return out
    if out is None:
        root = checkout()
        out = Path("results") if root is None else root / "benchmarks" / "results"
    return out / result_name(conditions, suite, quick)


def _check(
    suite: str, op: str | None, quick: bool, full: bool, threads: int | None, device: str
) -> str:
    for name, value, allowed in (("suite", suite, SUITES), ("device", device, DEVICES)):
        if value not in allowed:
            raise ValueError(f"{name} is {value!r}; allowed: {', '.join(allowed)}")
    if op is not None and suite != "ops":
        raise ValueError(f"op is {op!r}, but the suite is {suite!r}; only 'ops' has ops")
    if op is not None and op not in OPS:
        raise ValueError(f"op is {op!r}; allowed: {', '.join(OPS)}")
    if quick and full:
        raise ValueError("quick and full exclude each other")
    if threads is not None:
        THREADS.check("threads", threads)
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is 'cuda', but torch finds no CUDA device")
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return device


def _check_skip(skip: Collection[str], suite: str) -> None:
    """Raises ValueError for a provider that no case of the suite has, as a misspelt one."""
    if EAGER in skip:
        raise ValueError(f"skip has {EAGER!r}, which everything is compared with")
    allowed = list(dict.fromkeys(name for part in _parts(suite) for name in SKIPPABLE[part]))
    for name in skip:
        if name not in allowed:
            raise ValueError(
                f"skip has {short(name)}; allowed in {suite!r}: {', '.join(allowed) or 'none'}"
            )


def _parts(suite: str) -> list[str]:
    """Lists the suites that run."""
    return [part for part in SUITES if part != "all"] if suite == "all" else [suite]


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(before if count is None else count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _warn_if_busy(console: Console) -> None:
    """Warns of a busy machine: eager's OpenMP threads then take ten times as long and more."""
    # Windows has no load average.
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if load > BUSY * (os.cpu_count() or 1):
        console.print(
            f"the machine is busy (load {load:.1f} on {os.cpu_count()} cores):"
            " these timings will be no record",
            style="yellow",
        )


@contextmanager
def _progress(console: Console) -> Iterator[Say]:
    columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("")

        def say(what: str) -> None:
            progress.update(task, description=what)
            if not console.is_terminal:
                print(what, file=sys.stderr, flush=True)

        yield say


def op_cases(device: str, op: str | None, quick: bool, full: bool) -> list[Case]:
    """Finds the case tables of the ops in `fastnas.ops.OPS`, one module of the op's name each."""
    cases: list[Case] = []
    for stem in OPS if op is None else [op]:
        table = importlib.import_module(f"fastnas.benchmarks.ops.{stem}")
        cases += table.cases(device, quick, full)
    if not cases:
        raise ValueError(f"op is {op!r}, which has no kernels on {device}")
    return cases


def op_rows(
    case: Case,
    conditions: Conditions,
    device: str,
    quick: bool,
    full: bool,
    roof: Roof | None,
    say: Say = lambda what: None,
    skip: Collection[str] = (),
) -> list[Row]:
    """Makes rows of every pass and provider of a case; only what was just verified is timed."""
    shape, dtype = "x".join(map(str, case.shape)), str(case.dtype).removeprefix("torch.")
    label = f"{case.op} {dtype} {shape} K={case.K} {case.layout}"
    repeats = QUICK_REPEATS if quick else REPEATS[device]
    # What was compiled for the last case would count towards the limit of recompilations.
    torch._dynamo.reset()
    rows = []
    # A compiled backward gives its buffers away otherwise, and can run only once.
    with functorch_config.patch(donated_buffer=False):
        problem = case.problem(device, full)
        forwards = {name: f for name, f in problem.forwards.items() if name not in skip}
        problem = replace(problem, forwards=forwards)
        say(f"{label}: verifying")
        verdicts = verify(problem)
        weights = {name: _weights(problem, name, device) for name in _right(verdicts)}
        results = {}
        for pass_ in OP_PASSES:
            say(f"{label}: {pass_}")
            results[pass_] = _time(problem, verdicts, pass_, repeats, device)
    # Of the alternatives of one name the fastest of both passes is reported, for every pass.
    whole, _ = results[OP_PASSES[-1]]
    for pass_, (timings, status) in results.items():
        for name in _reported(problem, whole):
            rows.append(
                new_row(
                    conditions,
                    suite="ops",
                    op=case.op,
                    backend=problem.alternatives.get(name, name),
                    pass_=pass_,
                    dtype=dtype,
                    shape=shape,
                    K=case.K,
                    layout=case.layout,
                    verified=status[name],
                    timing=timings.get(name),
                    roof=roof,
                    bytes_moved=case.bytes_moved(pass_),
                    fma=case.fma(pass_),
                    **weights.get(name, {}),
                )
            )
    return rows


def _right(verdicts: Mapping[str, str]) -> list[str]:
    """Lists the providers that were verified, the only ones to be weighed and timed."""
    return [name for name, verdict in verdicts.items() if verdict == YES]


def _weights(problem: Problem, provider: str, device: str) -> dict[str, int | None]:
    def forward_and_backward() -> None:
        problem.gradients(provider, problem.forwards[provider]())

    leaves = problem.inputs(provider).leaves.values()
    saved = saved_bytes(problem.forwards[provider], exclude=leaves)
    return {"saved_bytes": saved, "peak_bytes": peak_bytes(forward_and_backward, device)}


def _time(
    problem: Problem, verdicts: dict[str, str], pass_: str, repeats: int, device: str
) -> tuple[dict[str, Timing], dict[str, str]]:
    """Times one pass, and returns the verdicts with what a first call adds to them."""
    status, calls, seconds = dict(verdicts), {}, 0.0
    for name in _right(verdicts):
        try:
            call = pass_call(problem, name, pass_)
            start = perf_counter()
            call()
            # This is also where torch.compile compiles a pass, before any clock that counts.
            seconds += perf_counter() - start
        except Exception as error:
            # A provider that cannot run one pass loses that row alone.
            status[name] = not_run(error)
        else:
            calls[name] = call
    # Slow calls get fewer repeats: a part of `make gpu` has to end within 9 minutes.
    if seconds:
        repeats = min(repeats, max(QUICK_REPEATS, int(SECONDS / seconds)))
    return measure(calls, repeats=repeats, warmup=WARMUP, device=device), status


def pass_call(problem: Problem, provider: str, pass_: str) -> Callable[[], object]:
    """Returns what is timed: the forward, the backward through a graph that is kept, or both."""
    forward = problem.forwards[provider]
    if pass_ == "fwd":
        return forward
    if pass_ == "bwd":
        # The graph is kept, so that every repeat runs the same backward and no forward.
        y = forward()
        return lambda: problem.gradients(provider, y, retain_graph=True)
    return lambda: problem.gradients(provider, forward())


def _reported(problem: Problem, timings: dict[str, Timing]) -> list[str]:
    """Picks the providers that get rows: of those of one name the fastest in `timings`."""
    groups: dict[str, list[str]] = {}
    for name in problem.forwards:
        groups.setdefault(problem.alternatives.get(name, name), []).append(name)

    def median(name: str) -> float:
        return timings[name].median_ms if name in timings else float("inf")

    return [min(names, key=median) for names in groups.values()]
