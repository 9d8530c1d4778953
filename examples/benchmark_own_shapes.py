"""Measures ops on shapes of one's own: every provider is verified against fp64, then timed."""

import tempfile
from pathlib import Path

import torch
from rich.console import Console

from fastnas.benchmarks.harness.roofline import measure_roof
from fastnas.benchmarks.harness.run import op_rows
from fastnas.benchmarks.harness.schema import current_conditions, read_csv, speedup, write_csv
from fastnas.benchmarks.harness.table import print_rows
from fastnas.benchmarks.ops.mixed_edges import MixedOpCase
from fastnas.benchmarks.ops.mixed_sum import MixedSumCase

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = (
    MixedSumCase((32, 24, 28, 28), K=5),  # any five tensors of one shape
    MixedOpCase((16, 24, 14, 14)),  # the eight candidates of DARTS on one edge
)

conditions, roof = current_conditions(DEVICE), measure_roof(DEVICE, quick=True)
rows = []
for case in CASES:
    # quick: few repeats. torch.compile takes a minute a case; leave `skip` out to see it.
    rows += op_rows(case, conditions, DEVICE, quick=True, full=False, roof=roof, skip=("compile",))

with tempfile.TemporaryDirectory() as folder:
    csv = Path(folder) / "mine.csv"
    write_csv(rows, csv)
    rows = read_csv(csv)
print_rows(rows, roof, Console(width=192))

eager = {row.case: row for row in rows if row.backend == "eager"}
for row in rows:
    if row.is_fastnas and row.pass_ == "fwd+bwd":
        times = speedup(row, eager[row.case])
        print(f"{row.op} on {row.shape}, {row.backend}: {times:.1f} times as fast as eager")
