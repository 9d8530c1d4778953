"""The numbers that a benchmark's settings may have, read by the command line's help as well."""

from fastnas.bounds import Bounds, whole

BATCHES = whole(2, 2**16)
COMPILE_SECONDS = Bounds(0, 1e6, above=True)
