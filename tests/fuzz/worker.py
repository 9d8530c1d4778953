"""Runs fuzzed calls in this process: a line of JSON for each, or with --tell all about it."""

from __future__ import annotations

import argparse
import faulthandler
import importlib.util
import json
import re
import sys
import traceback
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(path) for path in (HERE, HERE.parent, HERE.parent / "ops")]

import torch  # noqa: E402
from poison import poison_fresh_memory  # noqa: E402
from results import CLOSE, Result, subject_of  # noqa: E402
from rule import NOTHING, Miss  # noqa: E402

HANGS_AFTER = 120  # seconds; a call takes 0.02, and 20 times that under a sanitizer


def load(module: str) -> None:
    """Takes this file for fastnas._C."""
    spec = importlib.util.spec_from_file_location("fastnas._C", module)
    assert spec is not None and spec.loader is not None
    sys.modules["fastnas._C"] = native = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(native)


def run(seed: int, backend: str = "cpu", tell: bool = False) -> Result:
    """Draws the call of this seed, runs it and judges what it gave."""
    from calls import DRAW
    from draws import Draws

    op, isa = subject_of(seed)
    draws = Draws(seed)
    call = DRAW[op](draws)
    threads = draws.pick("threads", [1, 1, 2, 3, 4])
    if tell:
        print(f"{op} on {isa}:", *(f"    {k}: {v}" for k, v in draws.log.items()), sep="\n")
    dtype = str(draws.log["dtype"]).removeprefix("torch.")
    return Result(seed, op, isa, dtype, *judge(call, backend, op, isa, threads, tell))


def judge(
    call: Any, backend: str, op: str, isa: str, threads: int, tell: bool
) -> tuple[str, str, float]:
    """The outcome of a call, its reason, and how far it is off as a multiple of the bound."""
    import fastnas._C as native

    if isa not in native.supported_isas():
        return "skipped", f"this CPU has no {isa}", 0.0
    native.use_isa(isa)
    torch.set_num_threads(threads)
    try:
        got = call.run(backend)
    except Exception as error:
        if tell:
            traceback.print_exc()
        if is_ours(error, op):
            by_eager = "served" if is_served(call) else "refused"
            return "refused", f"{in_general(error)} ({by_eager} by eager)", 0.0
        return "error", f"{type(error).__name__}: {in_general(error)}", float("inf")
    torch.set_num_threads(1)
    try:
        return compared(call, got)
    except AssertionError as miss:
        if tell:
            traceback.print_exc()
        ratio = miss.ratio if isinstance(miss, Miss) else float("inf")
        return "close" if ratio <= CLOSE else "miss", str(miss), ratio
    except Exception as error:
        return "unjudged", f"eager raises {type(error).__name__}: {in_general(error)}", 0.0


def compared(call: Any, got: Any) -> tuple[str, str, float]:
    """By the rule, and where that is missed by what the call may be off beyond it."""
    try:
        call.compare(got)
    except Miss as miss:
        allowance = call.allowance()
        if allowance == NOTHING:
            raise
        outcome = "overflow" if miss.ratio == torch.inf else "ill-conditioned"
        try:
            call.compare(got, allowance)
        except Miss:
            if not allowance.overflow:
                raise
            outcome = "out of range"
        return outcome, str(miss), miss.ratio
    return "right", "", 0.0


def is_ours(error: Exception, op: str) -> bool:
    """Whether it is an error that the op raises on purpose; of one value it raises torch's."""
    words = (f"{op}: ", "Expected more than 1 value per channel when training")
    return isinstance(error, ValueError | TypeError) and str(error).startswith(words)


def is_served(call: Any) -> bool:
    """Whether the reference computes what we refuse."""
    try:
        call.by_eager()
    except Exception:
        return False
    return True


def in_general(error: Exception) -> str:
    """The first line of a message without its numbers, so that like ones are counted together."""
    first = (str(error).splitlines() or [""])[0]
    return re.sub(r"-?\d+(\.\d+)?(e[+-]?\d+)?", "#", re.sub(r"\[[\d, -]*\]", "[...]", first))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--module", default="")
    parser.add_argument("--tell", action="store_true")
    parser.add_argument("seeds", type=int, nargs="+")
    options = parser.parse_args()
    if options.module:
        load(options.module)
    poison_fresh_memory(setattr)
    warnings.simplefilter("ignore")  # of torch, about empty tensors
    for seed in options.seeds:
        faulthandler.dump_traceback_later(HANGS_AFTER, exit=True)
        result = run(seed, tell=options.tell)
        faulthandler.cancel_dump_traceback_later()
        print(json.dumps(asdict(result)), flush=True)
    return 0


if __name__ == "__main__":
    faulthandler.enable()
    sys.exit(main())
