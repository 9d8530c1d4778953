"""The tables of valid calls, by the part of fastnas that they call."""

from __future__ import annotations

import calls_reference
import calls_spaces
import calls_strategies
from wrong_values import Call

TABLES: dict[str, list[Call]] = {
    "spaces": calls_spaces.CALLS,
    "reference": calls_reference.CALLS,
    "strategies": calls_strategies.CALLS,
}
