"""Counts the CUDA kernels without a GPU, in their machine code. What it prints is a model's.

    make budget
    PYTHONPATH=tests python -m fastnas.benchmarks.model budget | step ... | functions ...

Needs nvcc, nvdisasm and cuobjdump (Triton's wheel has the last two) and g++. The launches are those
of the build for the host, which tests/host_cuda.py makes: hence PYTHONPATH.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from fastnas.benchmarks.model import report
from fastnas.benchmarks.model.budgets import STAGES, Figure, figures
from fastnas.benchmarks.model.counting import LaunchCount, Work
from fastnas.benchmarks.model.machine import load_machine
from fastnas.benchmarks.model.recorded import (
    OLD_STRUCTURE,
    TERMS,
    mixed_op_case,
    recorded,
    step_case,
)
from fastnas.benchmarks.model.sass import read_cubins
from fastnas.benchmarks.model.step import HostModel, mixed_op, search_step
from fastnas.benchmarks.model.timing import Time, time_of
from fastnas.benchmarks.model.toolchain import MissingToolError, compile_sources

ROOT = Path(__file__).parents[2]
CACHE = ROOT / "build" / "model"
STEPS = ((64, "float32"), (64, "bfloat16"), (256, "float32"))

Launches = Sequence[tuple[LaunchCount, int]]


@contextmanager
def host_model(cache: Path = CACHE) -> Iterator[HostModel]:
    """Builds what is needed, into `cache` where that does not hold it yet."""
    from host_cuda import load_host_cuda
    from targets import registered

    kernels = read_cubins(compile_sources(ROOT / "csrc", cache))
    backend = load_host_cuda(cache)
    if isinstance(backend, str):
        raise MissingToolError(backend)
    with registered(backend, backend.kernels, table="cuda"):
        yield HostModel(backend, load_machine(cache), {each.name: each for each in kernels})


def by_kernel(launches: Launches) -> dict[str, Time]:
    """Adds up the times of launches by kernel."""
    times: defaultdict[str, Time] = defaultdict(Time)
    for launch, calls in launches:
        times[report.short_name(launch.kernel.name)] += time_of(launch).times(calls)
    return dict(times)


def print_budget(model: HostModel) -> bool:
    """Prints the table of budgets and the times of the mixed ops; returns whether all hold."""
    found: list[Figure] = []
    cases: dict[str, report.Times] = {}
    for shape in STAGES:
        launches = model.count(mixed_op(shape))
        cases[mixed_op_case(shape)] = by_kernel(launches)
        found += figures(shape, (launch for launch, _ in launches))
    found.sort(key=lambda each: (each.part, each.kernel))
    print(
        *report.budget_lines(found),
        "",
        *report.case_lines(cases, recorded(OLD_STRUCTURE)),
        sep="\n",
    )
    return all(each.holds for each in found)


def print_step(model: HostModel, batch: int, dtype: str, profile: Path | None) -> None:
    """Prints the times of a step of the default network, kernel by kernel."""
    times = by_kernel(model.count(search_step(batch, getattr(torch, dtype))))
    name = step_case(batch, dtype)
    measured = report.read_profile(profile).get(name) if profile else None
    print(f"{name}: what the model counts, in ms", *report.time_lines(times, measured), sep="\n")
    print("", *report.case_lines({name: times}, recorded(OLD_STRUCTURE)), sep="\n")


def print_functions(model: HostModel, kernel: str, shape: tuple[int, ...]) -> None:
    """Prints which functions of the source a kernel's cycles and instructions come from."""
    works: dict[str, Work] = {}
    for launch, _ in model.count(mixed_op(shape)):
        name = launch.kernel.name
        if kernel in name:
            works[name] = works[name] + launch.work if name in works else launch.work
    for name, work in works.items():
        print(f"`{name}`, {mixed_op_case(shape)}", *report.function_lines(work), "", sep="\n")


def record(model: HostModel, out: Path) -> None:
    """Writes the times of all cases, kernel by kernel, for what has no nvcc to count them."""
    works = {mixed_op_case(shape): mixed_op(shape) for shape in STAGES}
    works |= {step_case(b, d): search_step(b, getattr(torch, d)) for b, d in STEPS}
    with out.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("case", "kernel", *TERMS))
        for name, work in works.items():
            times = by_kernel(model.count(work))
            writer.writerows(report.time_rows(name, times))
            file.flush()  # a step takes minutes, and the next may not be waited for
            print(*report.case_lines({name: times}, recorded(OLD_STRUCTURE)), sep="\n")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("budget", help="figures of the hot parts of kernels beside their bounds")
    step = commands.add_parser("step", help="the step of the default network, kernel by kernel")
    step.add_argument("--batch", type=int, default=64)
    step.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    step.add_argument("--profile", type=Path, help="CSV of fastnas.benchmarks.profile")
    recording = commands.add_parser("record", help="the times of all cases, into a CSV")
    recording.add_argument("out", type=Path)
    functions = commands.add_parser("functions", help="what the functions of a kernel take")
    functions.add_argument("kernel", help="part of its name")
    functions.add_argument("--shape", default="64x16x32x32", help="of the mixed op that runs it")
    given = parser.parse_args(arguments)
    try:
        with host_model() as model:
            if given.command == "budget":
                return 0 if print_budget(model) else 1
            if given.command == "step":
                print_step(model, given.batch, given.dtype, given.profile)
            elif given.command == "record":
                record(model, given.out)
            else:
                shape = tuple(int(size) for size in given.shape.split("x"))
                print_functions(model, given.kernel, shape)
    except (MissingToolError, OSError) as error:
        print(f"model: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
