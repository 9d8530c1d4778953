"""Starts the command line, or says in one line which library of it is missing."""

import sys

from fastnas import signals
from fastnas.extras import MissingPackage, require


def main() -> None:
    """Runs the command line; a library that is absent is one line on stderr and exit code 2."""
    with signals.handled():
        try:
            # The command line imports both at its top, where their absence would be a traceback.
            require("typer", "rich")
            from fastnas import cli

            # Up to here a signal ends the process at once; from here on it may be raised.
            signals.started()
            cli.main()
        except MissingPackage as error:
            print(f"fastnas: error: {error}", file=sys.stderr)
            sys.exit(2)


if __name__ == "__main__":
    main()
