"""Defines the row of a benchmark CSV, a run's conditions, and how rows are written and read."""

from __future__ import annotations

import csv
import io
import math
import os
import platform
import re
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import datetime, timezone
from functools import cache
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Any

import torch

import fastnas
from fastnas.benchmarks.harness.timing import Roof, Timing
from fastnas.files import write_text

PASSES = ("fwd", "bwd", "fwd+bwd", "step", "saved")
"""What is timed; "saved" is a forward of which only the memory is measured."""


@dataclass(frozen=True)
class Conditions:
    """Holds what a figure depends on beside the code that it measures."""

    device: str
    driver: str
    torch: str
    triton: str
    fastnas: str
    commit: str
    time: str
    threads: int


@dataclass(frozen=True)
class Row:
    """Records one case, provider and pass. Empty fields (None) were not measured.

    `pass_` is the column `pass`. `verified` is "yes", "no: reason" (the result is wrong) or
    "not run: reason"; only "yes" has timings. `bytes_moved` is the minimum traffic of the op, the
    same for all providers, `GBps` that over the median, `copy_share` its share of the copy
    bandwidth measured in the same run. `fma` is the multiply-adds that the op is defined by,
    `GFMAps` that over the median, `fma_share` its share of the fp32 rate measured in the same run
    (tensor cores can pass 1).
    """

    suite: str
    op: str
    backend: str
    pass_: str
    dtype: str
    shape: str
    K: int | None
    layout: str
    median_ms: float | None
    p20_ms: float | None
    p80_ms: float | None
    peak_bytes: int | None
    saved_bytes: int | None
    bytes_moved: int | None
    GBps: float | None
    copy_share: float | None
    fma: int | None
    GFMAps: float | None
    fma_share: float | None
    verified: str
    device: str
    driver: str
    torch: str
    triton: str
    fastnas: str
    commit: str
    time: str
    threads: int

    @property
    def case(self) -> tuple[str, ...]:
        """Returns what rows that are to be compared have in common.

        The layout belongs to the inputs of an op, but to the provider of a search step.
        """
        layout = self.layout if self.suite == "ops" else ""
        return self.suite, self.op, self.pass_, self.dtype, self.shape, str(self.K), layout

    @property
    def is_red(self) -> bool:
        """Returns whether the provider computed something wrong."""
        return self.verified.startswith("no:")

    @property
    def is_fastnas(self) -> bool:
        return self.backend.startswith("fastnas")


def new_row(
    conditions: Conditions,
    *,
    verified: str,
    timing: Timing | None = None,
    roof: Roof | None = None,
    bytes_moved: int | None = None,
    fma: int | None = None,
    **columns: Any,
) -> Row:
    """Makes a row with its derived columns; shares are of `roof`, as measured in the same run.

    `columns` are suite, op, backend, pass_, dtype, shape, K, layout, and where measured
    peak_bytes and saved_bytes. Without `timing` (not verified) there are no figures.
    """
    roof = roof or Roof()
    moved, copy_share = _rate(bytes_moved, timing, roof.bandwidth)
    multiplied, fma_share = _rate(fma, timing, roof.fma_rate)
    return Row(
        **{"peak_bytes": None, "saved_bytes": None, **columns},
        median_ms=timing and _rounded(timing.median_ms),
        p20_ms=timing and _rounded(timing.p20_ms),
        p80_ms=timing and _rounded(timing.p80_ms),
        bytes_moved=bytes_moved,
        GBps=moved,
        copy_share=copy_share,
        fma=fma,
        GFMAps=multiplied,
        fma_share=fma_share,
        verified=verified,
        **asdict(conditions),
    )


def _rate(
    amount: int | None, timing: Timing | None, limit: float | None
) -> tuple[float | None, float | None]:
    """Returns billions per second, and that as a share of `limit` per second."""
    if amount is None or timing is None:
        return None, None
    rate = _rounded(amount / timing.median_ms / 1e6)
    return rate, None if limit is None else _rounded(rate * 1e9 / limit)


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")


SINCE_ROOFLINE = ("fma", "GFMAps", "fma_share")
"""Columns that files lack which were written before there were any."""
COLUMNS = tuple(field.name.removesuffix("_") for field in fields(Row))
_TYPES = {field.name.removesuffix("_"): str(field.type) for field in fields(Row)}


def write_csv(rows: Sequence[Row], path: Path | str, overwrite: bool = False) -> None:
    """Writes the rows of one device and commit to a new file, whole or not at all.

    Raises:
        FileExistsError: if the file exists and `overwrite` is false.
        ValueError: if there are no rows, or rows of two devices or commits.
    """
    path = Path(path)
    refuse_existing(path, overwrite)
    # A file of two devices or commits would be read as one comparison.
    sources = {(row.device, row.commit) for row in rows}
    if len(sources) != 1:
        raise ValueError(
            f"rows come from {len(sources)} pairs of device and commit, {sorted(sources)};"
            " a file holds exactly one"
        )
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows([_text(getattr(row, f.name)) for f in fields(Row)] for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text.getvalue())


def refuse_existing(path: Path, overwrite: bool = False) -> None:
    """Raises FileExistsError if a result would be overwritten unasked."""
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists, and results are not overwritten; name another")


def read_csv(path: Path | str) -> list[Row]:
    """Reads the rows of a file that `write_csv` wrote.

    Raises:
        ValueError: naming the file and the column or line that is wrong.
    """
    path = Path(path)
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.reader(file)
        header = tuple(next(reader, ()))
        # Results that were committed before there was a roofline stay readable.
        older = tuple(name for name in COLUMNS if name not in SINCE_ROOFLINE)
        if header not in (COLUMNS, older):
            missing = [name for name in COLUMNS if name not in header]
            unknown = [name for name in header if name not in COLUMNS]
            raise ValueError(
                f"{path} is no benchmark CSV of this version: missing columns {missing},"
                f" unknown columns {unknown}" + ("" if missing or unknown else ", or their order")
            )
        rows = [_row(cells, header, f"{path}:{reader.line_num}") for cells in reader]
    if not rows:
        raise ValueError(f"{path} has no rows")
    return rows


def _text(value: object) -> str:
    # `repr` of a float reads back to the same bits.
    return "" if value is None else repr(value) if isinstance(value, float) else str(value)


def _row(cells: list[str], header: tuple[str, ...], where: str) -> Row:
    if len(cells) != len(header):
        raise ValueError(f"{where} has {len(cells)} cells; {len(header)} are needed")
    given = dict(zip(header, cells))
    values: list[object] = []
    for name in COLUMNS:
        kind, cell = _TYPES[name], given.get(name, "")
        try:
            values.append(_value(kind, cell))
        except ValueError:
            raise ValueError(f"{where}: {name} is {cell!r}; {kind} is needed") from None
    row = Row(*values)  # type: ignore[arg-type]
    if row.pass_ not in PASSES:
        raise ValueError(f"{where}: pass is {row.pass_!r}; allowed: {', '.join(PASSES)}")
    # A file that was edited by hand must not bring a time for a wrong result.
    if row.verified != "yes" and row.median_ms is not None:
        raise ValueError(f"{where}: a time for a result that is not verified ({row.verified!r})")
    return row


def _value(kind: str, cell: str) -> object:
    if kind == "str":
        return cell
    if not cell:
        if "None" in kind:
            return None
        raise ValueError
    value = int(cell) if kind.startswith("int") else float(cell)
    if not math.isfinite(value):
        raise ValueError
    return value


def slug(text: str) -> str:
    """Returns lower-case words joined by hyphens: a device name in a file name."""
    text = re.sub(r"\((r|tm|c)\)", " ", text.lower())
    return re.sub(r"[^a-z0-9.]+", "-", text).strip("-")


def result_name(conditions: Conditions, suite: str = "all", quick: bool = False) -> str:
    """Names a result `<device>-<commit>.csv`, with the part of the suites or small sizes."""
    parts = [slug(conditions.device), slug(conditions.commit)]
    parts += [suite] if suite != "all" else []
    parts += ["quick"] if quick else []
    return "-".join(parts) + ".csv"


def current_conditions(device: str) -> Conditions:
    """Reads the conditions of a run on `device` ("cpu" or "cuda") in this process, from now."""
    return Conditions(
        device=device_name(device),
        driver=_driver() if device == "cuda" else "",
        torch=torch.__version__,
        triton=_version("triton"),
        fastnas=fastnas.__version__,
        commit=commit(),
        time=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        threads=torch.get_num_threads(),
    )


def device_name(device: str) -> str:
    """Returns the GPU's name, or the CPU's model name."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    if info.exists():
        match = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE)
        if match:
            return " ".join(match.group(1).split())
    return platform.processor() or platform.machine()


def checkout() -> Path | None:
    """Returns the git checkout that fastnas is imported from; None if it is installed."""
    package = Path(fastnas.__file__).resolve().parent
    top = _git(package, "rev-parse", "--show-toplevel")
    # An installed fastnas may lie inside of another project's checkout, whose commit is not ours.
    return Path(top) if top and Path(top).resolve() == package.parent else None


@cache
def commit() -> str:
    """Returns the checkout's short hash, "+dirty" if more than results changed, or "unknown".

    FASTNAS_COMMIT names it for a copy of the files that came without their git folder.
    """
    root = checkout()
    short = root and _git(root, "rev-parse", "--short", "HEAD")
    if not root or not short:
        return os.environ.get("FASTNAS_COMMIT") or "unknown"
    # A run writes into benchmarks/results, which must not make its own commit dirty.
    changes = _git(root, "status", "--porcelain", "--", ".", ":!benchmarks/results")
    return short + ("+dirty" if changes else "")


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=folder, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return f"unknown, CUDA {torch.version.cuda}"
    return f"{done.stdout.splitlines()[0].strip()}, CUDA {torch.version.cuda}"


def _version(package: str) -> str:
    try:
        return installed_version(package)
    except PackageNotFoundError:
        return ""


def by_case(rows: Iterable[Row]) -> dict[tuple[str, ...], dict[str, Row]]:
    """Maps case to provider to row, in the order of the rows."""
    cases: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in rows:
        cases.setdefault(row.case, {})[row.backend] = row
    return cases


def speedup(row: Row, over: Row | None) -> float | None:
    """Returns how many times faster `row` is than `over`; None where either has no time."""
    if over is None or over.median_ms is None or row.median_ms is None:
        return None
    return over.median_ms / row.median_ms
