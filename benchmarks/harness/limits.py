"""Says which numbers a benchmark's settings may have; the command line's help reads it as well."""

from fastnas.bounds import Bounds, whole

BATCHES = whole(2, 2**16)
COMPILE_SECONDS = Bounds(0, 1e6, above=True)
