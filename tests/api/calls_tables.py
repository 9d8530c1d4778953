"""The tables of valid calls, by the part of fastnas that they call."""

from __future__ import annotations

import calls_choice
import calls_nn
import calls_ops
import calls_reference
import calls_report
import calls_search
import calls_spaces
import calls_strategies
from wrong_values import Call

TABLES: dict[str, list[Call]] = {
    "spaces": calls_spaces.CALLS,
    "reference": calls_reference.CALLS,
    "strategies": calls_strategies.CALLS,
    "ops": calls_ops.CALLS,
    "nn": [*calls_nn.CALLS, *calls_choice.CALLS],
    "report": calls_report.CALLS,
    "search": calls_search.CALLS,
}
