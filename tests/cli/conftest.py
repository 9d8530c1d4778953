"""The command line, run in this process in an empty folder."""

import pytest

from fastnas.__main__ import main


@pytest.fixture
def fastnas(monkeypatch, capsys, tmp_path):
    """Runs the command in an empty folder; returns exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["fastnas", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            main()
        output = capsys.readouterr()
        return caught.value.code, output.out, output.err

    return run
