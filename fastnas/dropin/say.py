"""Tells of calls that run a module's own forward."""

from __future__ import annotations

import functools
import logging

logger = logging.getLogger("fastnas")


class NotFused(RuntimeError):
    """Tells that the fused ops cannot serve a call; the message says why."""


@functools.lru_cache(maxsize=64)
def say_once(called: str, reason: str) -> None:
    logger.warning("fastnas: %s runs its own forward: %s", called, reason)
