"""Holds what a model of the GPU predicted beside what was measured.

    python -m fastnas.benchmarks.predictions RESULT.csv ... [STOCK.json] [PROFILE.csv]

The predictions were made before anything ran on a GPU. Those of our kernels are from a model that
counts their instructions, waits and bytes in their machine code, launch by launch
(fastnas.benchmarks.model; what fastnas.benchmarks.profile wrote is held against it kernel by
kernel). The others are a roofline model's: bytes at 3.0 TB/s (5.5 where they fit into L2),
depthwise convolutions at 35 % of the FMA rate, 4 us a launch. They are no results, and stand in no
table of results.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from fastnas.benchmarks.harness.schema import Row, read_csv
from fastnas.benchmarks.model.recorded import mixed_op_case, recorded, step_case
from fastnas.benchmarks.model.report import read_profile, time_lines
from fastnas.benchmarks.model.timing import H100

STEP = "search_step S0 C16 L8"
Profiles = Mapping[str, Mapping[str, float]]
"""us by case and kernel."""
MIXED_OP = "mixed_edges"
MIXED_OP_SHAPES = ("64x16x32x32", "64x32x16x16", "64x64x8x8")
REST_OF_STEP = 4.0
"""Guessed ms at batch 64: stem, head, matrix products of the preprocessing, optimizers."""


class Prediction(NamedTuple):
    """Gives the milliseconds of a case, and the range of the model's least certain inputs."""

    op: str
    dtype: str
    shape: str
    backend: str
    ms: float
    low: float | None = None
    high: float | None = None

    @property
    def range(self) -> tuple[float, float]:
        """Returns the range; where there is none it is a factor of two to either side."""
        return self.low or self.ms / 2, self.high or self.ms * 2


def _steps(
    backend: str, *ms: float | None, low: float | None = None, high: float | None = None
) -> Iterator[Prediction]:
    """Lists float32 at batch 64 (which has the range) and 256, then bfloat16."""
    cases = [(dtype, b) for dtype in ("float32", "bfloat16") for b in (64, 256)]
    for (dtype, batch), value in zip(cases, ms):
        if value is not None:
            # The model gave its uncertain inputs for one case; the others take the factor of two.
            own = (low, high) if (dtype, batch) == cases[0] else (None, None)
            yield Prediction(STEP, dtype, f"{batch}x3x32x32", backend, value, *own)


def _mixed_ops(backend: str, *us: float) -> Iterator[Prediction]:
    for shape, value in zip(MIXED_OP_SHAPES, us):
        yield Prediction(MIXED_OP, "float32", shape, backend, value / 1e3)


def _counted(op: str, dtype: str, shape: str, backend: str, case: str, rest: float) -> Prediction:
    """Takes a case of the model that counts our kernels; `rest` is the ms of what it leaves out.

    At least it takes what instructions or bytes alone take, were all waits hidden; at most double.
    """
    times = recorded()[case].values()
    launches = sum(time.launches for time in times) * H100.launch_us
    least = sum(max(time.issue, time.bytes) for time in times) + launches
    ms = sum(time.total for time in times) / 1e3 + rest
    return Prediction(op, dtype, shape, backend, ms, least / 1e3 + rest, 2 * ms)


def _our_kernels() -> Iterator[Prediction]:
    for batch, dtype in ((64, "float32"), (256, "float32"), (64, "bfloat16")):
        shape, case = f"{batch}x3x32x32", step_case(batch, dtype)
        if case not in recorded():
            continue
        yield _counted(STEP, dtype, shape, "fastnas-graph", case, REST_OF_STEP * batch / 64)
    for shape in MIXED_OP_SHAPES:
        case = mixed_op_case(tuple(map(int, shape.split("x"))))
        yield _counted(MIXED_OP, "float32", shape, "fastnas-cuda", case, 0.0)


PREDICTIONS: Sequence[Prediction] = (
    *_steps("eager", 200, 717, 197, 638, low=137, high=340),
    *_steps("eager-graph", 200, 717, 197, 638, low=131, high=337),
    *_steps("compile", 84, None, 84, None),
    *_steps("compile-graph", 68, 203, 66, 160, low=56, high=94),
    *_mixed_ops("eager", 1562, 818, 572),
    *_our_kernels(),
)
KERNELS: Mapping[str, tuple[float, float, float]] = {
    "batch_norm_collect_statistics": (42, 20, 90),
    "batch_norm_backward": (83, 40, 170),
    "conv_depthwise2d_grad_weight": (51, 25, 100),
}
"""torch's kernels at 64x16x32x32 in fp32: us of one call and its range, by part of the name."""
GRAPH_GAIN = 1.5
"""A CUDA graph makes the eager step at most so many times faster."""
NOT_MEASURED = "not measured"


def step_lines(rows: Iterable[Row]) -> list[str]:
    """Writes a Markdown table of times: predicted, measured, and whether within the range."""
    found = {(r.op, r.dtype, r.shape, r.backend): r for r in rows if r.pass_ in ("step", "fwd+bwd")}
    lines = ["| case | provider | model, ms | its range | measured, ms | |"]
    lines += ["|---|---|---|---|---|---|"]
    for p in PREDICTIONS:
        row = found.get((p.op, p.dtype, p.shape, p.backend))
        measured = None if row is None else row.median_ms
        low, high = p.range
        cells = [f"{p.op} {p.dtype} {p.shape}", p.backend, f"{p.ms:.3g}"]
        cells += [f"{low:.3g} to {high:.3g}"]
        cells += [NOT_MEASURED if measured is None else f"{measured:.3g}"]
        cells += [_verdict(measured, low, high)]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def gain_lines(rows: Iterable[Row]) -> list[str]:
    """Writes what a graph gained over the eager stream, case by case."""
    steps = {(r.dtype, r.shape, r.backend): r.median_ms for r in rows if r.op == STEP}
    lines = []
    for (dtype, shape, backend), stream in steps.items():
        graph = steps.get((dtype, shape, "eager-graph"))
        if backend == "eager" and stream and graph:
            gain = stream / graph
            verdict = _verdict(gain, 0, GRAPH_GAIN)
            lines.append(f"| {dtype} {shape} | at most {GRAPH_GAIN} | {gain:.2f} | {verdict} |")
    head = ["| eager as a CUDA graph | model, times faster | measured | |", "|---|---|---|---|"]
    return [*head, *(lines or [f"| all | at most {GRAPH_GAIN} | {NOT_MEASURED} | |"])]


def kernel_lines(stock: Mapping[str, float]) -> list[str]:
    """Compares torch's kernels; `stock` is name to microseconds, the first match is the slowest."""
    head = ["| torch's kernel | model, us | its range | measured, us | |", "|---|---|---|---|---|"]
    lines = []
    for part, (us, low, high) in KERNELS.items():
        # The first match is the slowest kernel of that name, as the profile is sorted by time.
        measured = next((value for name, value in stock.items() if part in name), None)
        shown = NOT_MEASURED if measured is None else f"{measured:.3g}"
        cells = [part, f"{us:g}", f"{low:g} to {high:g}", shown, _verdict(measured, low, high)]
        lines.append(f"| {' | '.join(cells)} |")
    return [*head, *lines]


def _verdict(measured: float | None, low: float, high: float) -> str:
    if measured is None:
        return ""
    return "within" if low <= measured <= high else "below" if measured < low else "above"


def profile_lines(profiles: Profiles) -> Iterator[str]:
    """Writes the model's times of our kernels in a step and in what was profiled, beside those."""
    counted = recorded()
    for case in dict.fromkeys([step_case(64, "float32"), *profiles]):
        if case in counted:
            yield f"Our kernels, {case}: the model's ms, and a profile's"
            yield from ("", *time_lines(counted[case], profiles.get(case)), "")


def report(rows: Sequence[Row], stock: Mapping[str, float], profiles: Profiles) -> str:
    device = rows[0].device if rows else "no result"
    lines = [
        "# Predictions of a model beside what was measured",
        "",
        f"Measured on: {device}. The model is of an H100; its figures are no results.",
        "",
        *step_lines(rows),
        "",
        *gain_lines(rows),
        "",
        *kernel_lines(stock),
        "",
        *profile_lines(profiles),
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, nargs="*", help="CSV files, JSON of harness.stock")
    given = parser.parse_args(arguments)
    rows: list[Row] = []
    stock: dict[str, float] = {}
    profiles: dict[str, Mapping[str, float]] = {}
    try:
        for path in given.results:
            if path.suffix == ".json":
                record = json.loads(path.read_text())
                stock |= {kernel["name"]: kernel["median_us"] for kernel in record["kernels"]}
            elif path.read_text().startswith("case,kernel,"):
                profiles |= read_profile(path)
            else:
                rows += read_csv(path)
    except (OSError, ValueError, KeyError, TypeError) as error:
        print(f"predictions: {path}: {error}", file=sys.stderr)
        return 2
    # A prediction is of one GPU, so a table of two would compare nothing.
    if len({row.device for row in rows}) > 1:
        print("predictions: the results are of several devices; give those of one", file=sys.stderr)
        return 2
    print(report(rows, stock, profiles), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
