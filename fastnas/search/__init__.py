"""Runs searches and trainings: their settings, steps, checkpoints and folders."""

from fastnas.extras import require

require("rich", "yaml")
