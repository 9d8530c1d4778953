"""Runs of a search, a study or a training; and what the command line does."""

from fastnas.extras import require

require("rich", "yaml")
