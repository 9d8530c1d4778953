"""Does what the commands promise: a run in its folder, from its settings to its report."""

from fastnas.extras import require

require("rich", "yaml")
