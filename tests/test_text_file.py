"""The one place where a user's name becomes a path, and where text is read from it."""

import re
from pathlib import Path

import pytest

import fastnas
from fastnas.text_file import TextFileError, file_path, read_text


def test_home_is_expanded_at_the_start_only(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert file_path("~/a") == Path("/home/me/a")
    assert file_path("~") == Path("/home/me")
    assert file_path("a/~") == Path("a/~")
    assert file_path("~no such user/a") == Path("~no such user/a")


def test_home_is_expanded_in_one_place():
    package = Path(fastnas.__file__).parent
    found = [p.name for p in package.rglob("*.py") if re.search("expanduser", p.read_text())]
    assert found == ["text_file.py"]


def test_text_is_read_without_its_mark(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"\xef\xbb\xbf\xc3\xa9\r\n")
    assert read_text(path) == "é\r\n"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("absent", "absent cannot be read: No such file"),
        (".", "cannot be read: Is a directory"),
        ("x" * 300, "cannot be read: File name too long"),
        ("a\0b", "cannot be read: embedded null byte"),
        ("latin", "latin cannot be read: byte 0 is no UTF-8 text"),
        ("long", "long cannot be read: it is larger than 1 KiB"),
    ],
)
def test_what_cannot_be_read(tmp_path, name, message):
    (tmp_path / "latin").write_bytes(b"\xe4")
    (tmp_path / "long").write_bytes(b" " * 1025)
    with pytest.raises(TextFileError, match=message):
        read_text(tmp_path / name, 1024)


def test_a_file_that_may_not_be_read(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(TextFileError, match="x cannot be read: Permission denied"):
        read_text(tmp_path / "x")
