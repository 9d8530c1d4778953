"""Searches with topology disentanglement off/on x accumulation off/on (ROME's table 6).

    python -m fastnas.benchmarks.search.ablation OUT.csv --data digits --epochs 4

Off is `single-path-darts`, on is `rome`; with accumulation 7 samples a step for `--epochs` epochs,
without it one sample for 7 times as many, as many sampled sub-networks as the paper's table 5
compares. A row is a whole search: parameter-free operations of the cells that it derives, and the
accuracy of the likeliest path in the supernet on the images of the logits; nothing is trained from
scratch. Run again, it goes on with the rows, and the search, that are missing.
"""

from __future__ import annotations

import argparse
import csv
import io
import itertools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from rich.console import Console

from fastnas.benchmarks.harness.readme import updated
from fastnas.benchmarks.harness.schema import current_conditions
from fastnas.files import write_text
from fastnas.search.config import SearchConfig, make_config
from fastnas.search.gradient_run import CHECKPOINT
from fastnas.search.searcher import Searcher

SAMPLES = 7
BLOCK = "ablation"
"""The block of docs/benchmarks.md that `--page` replaces."""
METHODS = {"off": "single-path-darts", "on": "rome"}
SETTINGS = ("data", "images", "image_size", "channels", "layers", "batch_size", "epochs", "seed")
FOUND = (
    *("parameter_free_normal", "parameter_free_reduce", "skips_normal", "skips_reduce"),
    *("train_accuracy", "valid_accuracy"),
)

Row = dict[str, Any]


def configs(given: argparse.Namespace) -> Iterator[tuple[Row, SearchConfig]]:
    """Lists what is searched, row by row: all combinations of a seed before the next seed."""
    for data, seed in itertools.product(given.data, range(given.seeds)):
        for topology, accumulation in itertools.product(METHODS, METHODS):
            accumulates = accumulation == "on"
            row = {"topology": topology, "accumulation": accumulation}
            name = "-".join([re.sub(r"\W+", "_", Path(data).stem), *row.values(), str(seed)])
            settings = {
                "method": METHODS[topology],
                "samples": SAMPLES if accumulates else 1,
                "data": data,
                "images": given.images,
                "image_size": given.image_size,
                "channels": given.channels,
                "layers": given.layers,
                "batch_size": given.batch_size,
                "epochs": given.epochs * (1 if accumulates else SAMPLES),
                "validate_every": 0,
                "space": "S0",
                "seed": seed,
                "threads": given.threads,
                "tensorboard": False,
                "train_epochs": 0,
                "compare_steps": 0,
                "out": str(given.csv.with_suffix("") / name),
            }
            config = make_config(SearchConfig, settings)
            yield {**row, "samples": settings["samples"], **_settings(config)}, config


def _settings(config: SearchConfig) -> Row:
    values = config.settings()
    return {name: values[name] for name in SETTINGS} | {"data": Path(config.data).name}


def searched(config: SearchConfig) -> Row:
    """Runs the search, from its last checkpoint if there is one, and returns what it found."""
    searcher, out = Searcher(config), Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    if (out / CHECKPOINT).exists():
        searcher.resume(out / CHECKPOINT)
    searcher.search(out, Console(quiet=True))
    last = searcher.history[-1]
    return {
        **{name: last[name] for name in FOUND},
        "seconds": round(searcher.seconds, 1),
        "genotype": last["genotype"],
    }


def read(path: Path) -> list[Row]:
    return list(csv.DictReader(path.open(newline=""))) if path.exists() else []


def write(path: Path, rows: Sequence[Row]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def summary(rows: Sequence[Row]) -> str:
    """Writes Markdown: mean and standard deviation over the seeds."""
    lines = [
        "| data | topology | accumulation | seeds | parameter-free, normal | reduce | accuracy |",
        "|---|---|---|---:|---:|---:|---:|",
    ]
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        case = row["data"], row["topology"], row["accumulation"]
        groups.setdefault(case, []).append(row)
    for names, group in groups.items():
        cells = [*names, str(len(group))]
        for name in ("parameter_free_normal", "parameter_free_reduce", "valid_accuracy"):
            values = [float(row[name]) for row in group]
            spread = stdev(values) if len(values) > 1 else 0.0
            cells.append(f"{mean(values):.3g} +- {spread:.2g}")
        lines.append(f"| {' | '.join(cells)} |")
    settings = (
        f"{row['data']}: at most {int(row['images']):,} images"
        + (f" of {row['image_size']} pixels a side" if row["image_size"] else "")
        + f", {row['channels']} channels, {row['layers']} cells, batches of {row['batch_size']},"
        f" {row['epochs']} epochs with 7 samples a step and 7 times as many with one"
        for row in {row["data"]: row for row in rows if int(row["samples"]) == SAMPLES}.values()
    )
    commits = ", ".join(dict.fromkeys(str(row["commit"]) for row in rows))
    return "\n".join([*lines, "", f"{'; '.join(settings)}. fastnas {commits}."])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("csv", type=Path, help="a row per search; its checkpoints lie beside it")
    parser.add_argument("--data", action="append", help="digits, FILE.npz ...; may be repeated")
    parser.add_argument("--epochs", type=int, default=4, help="with 7 samples a step")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--images", type=int, default=10_000, help="at most, of each data set")
    parser.add_argument("--image-size", type=int, default=None)
    parser.add_argument("--channels", type=int, default=8)
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rows", type=int, default=None, help="stop after so many new rows")
    parser.add_argument("--page", type=Path, default=None, help="puts the summary into its block")
    given = parser.parse_args(arguments)
    given.data = given.data or ["digits"]
    rows, new = read(given.csv), 0
    done = {
        tuple(str(row[name]) for name in ("topology", "accumulation", *SETTINGS)) for row in rows
    }
    conditions = current_conditions("cpu")
    for row, config in configs(given):
        key = tuple(_text(row[name]) for name in ("topology", "accumulation", *SETTINGS))
        # A row that a former run has measured is kept; --rows ends this one after a few.
        if key in done or new == given.rows:
            continue
        new += 1
        rows.append(
            {
                **row,
                **searched(config),
                "device": conditions.device,
                "threads": given.threads,
                "torch": conditions.torch,
                "commit": conditions.commit,
            }
        )
        # It is written after every search: a run that is killed loses one at most.
        write(given.csv, rows)
        print(", ".join(f"{name} {value}" for name, value in rows[-1].items()), flush=True)
    print(summary(rows))
    if given.page is not None:
        write_text(given.page, updated(given.page.read_text(), BLOCK, summary(rows)))


def _text(value: object) -> str:
    """Returns a value as a CSV gives it back."""
    return "" if value is None else str(value)


if __name__ == "__main__":
    main()
