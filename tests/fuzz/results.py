"""What is known of a fuzzed call before and after it runs. Imports no torch."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field

ISAS = ("baseline", "avx2", "avx512")
OPS = ("mixed_sum", "mixed_norm_sum", "mixed_edges", "relu_conv_bn", "sample_paths")
# Cells have the most to go wrong, and the sampler the least.
OFTEN = (3, 3, 5, 2, 1)
FAULTS = ("miss", "error", "died")
BEYOND = ("ill-conditioned", "overflow", "out of range")
# The bound is twice eager's error, which is a random number: a few in thousands are just beyond it.
CLOSE = 1.2


@dataclass(frozen=True)
class Result:
    """How a call ended.

    - right
    - ill-conditioned: beyond the rule, by no more than what roundings of the inputs move
    - overflow: inf or NaN, where numbers beyond 1e9 are squared in float32
    - out of range: wrong, where float32 squares, or divides by, numbers beyond 1e9 or below 1e-9
    - refused: a ValueError or TypeError of ours; the reason says whether eager serves the call
    - unjudged: eager cannot compute it
    - close: beyond the rule, by no more than a fifth of the bound
    - miss: beyond the rule
    - error: an exception that is not ours
    - died: a signal, a report of a sanitizer, or a hang
    - skipped: this CPU lacks the instruction set
    """

    seed: int
    op: str
    isa: str
    dtype: str
    outcome: str
    reason: str = ""
    ratio: float = 0.0


def subject_of(seed: int) -> tuple[str, str]:
    """The op and the instruction set of a call, known without drawing it."""
    choice = random.Random(f"subject {seed}")  # apart from what is drawn of the seed itself
    return choice.choices(OPS, OFTEN)[0], choice.choice(ISAS)


@dataclass
class Report:
    results: list[Result] = field(default_factory=list)

    def add(self, result: Result) -> None:
        self.results.append(result)
        if result.outcome in (*FAULTS, "close"):
            print(f"{result.outcome}: {result.op} {result.dtype} {result.isa}"
                  f" ratio {result.ratio:.3g}: {result.reason}\n"
                  f"    --replay {result.seed}", flush=True)  # fmt: skip

    @property
    def faults(self) -> int:
        return sum(result.outcome in FAULTS for result in self.results)

    def text(self) -> str:
        calls = Counter((r.op, r.dtype, r.isa) for r in self.results)
        lines = ["calls of each op and dtype: " + ", ".join(ISAS)]
        for op, dtype in sorted({(op, dtype) for op, dtype, _ in calls}):
            counts = " ".join(f"{calls[op, dtype, isa]:5}" for isa in ISAS)
            lines.append(f"  {op:15} {dtype:9} {counts}")
        for outcome in ("refused", "unjudged"):
            reasons = Counter(
                (r.op, r.reason) for r in self.results if r.outcome == outcome
            ).most_common()
            lines += [f"{outcome}:"] if reasons else []
            lines += [f"  {count:5} {op}: {reason}" for (op, reason), count in reasons]
        for outcome in BEYOND:
            found = [r for r in self.results if r.outcome == outcome]
            lines += [f"{outcome}:"] if found else []
            lines += [f"  {r.op} {r.dtype} --replay {r.seed}: {r.reason}" for r in found]
        outcomes = Counter(result.outcome for result in self.results)
        counts = ", ".join(f"{count} {outcome}" for outcome, count in outcomes.most_common())
        return "\n".join([*lines, f"{len(self.results)} calls: {counts}"])
