"""Starts the command line, or says in one line which library of it is missing."""

import sys

from fastnas import signals
from fastnas.extras import MissingPackage, require


def main() -> None:
    """Runs the command line; a library that is absent is one line on stderr and exit code 2."""
    with signals.handled():
        try:
            require("typer", "rich")
            from fastnas import cli

            signals.started()
            cli.main()
        except MissingPackage as error:
            print(f"fastnas: error: {error}", file=sys.stderr)
            sys.exit(2)


if __name__ == "__main__":
    main()
