"""Files of settings: numbers as YAML 1.2 and JSON have them, short errors for what is wrong."""

import math
import time

import pytest

from fastnas.checks import short
from fastnas.search.settings_file import number, read_settings_text

CORE = """\
a: 1e-3
b: 1e5
c: .5
d: 0o17
e: +1
f: 1_000
g: yes
h: 2026-02-30
i: 1:30
j: -.inf
l: 010
m: ~
n: true
o:
p: '5'
q: 0x1F
<<: text
"""


def written(tmp_path, text, suffix):
    path = tmp_path / f"settings.{suffix}"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_scalars_have_the_types_of_the_core_schema(tmp_path):
    assert read_settings_text(written(tmp_path, CORE, "yaml")) == {
        "a": 1e-3, "b": 1e5, "c": 0.5, "d": 15, "e": 1, "f": "1_000", "g": "yes",
        "h": "2026-02-30", "i": "1:30", "j": -math.inf, "l": 10, "m": None, "n": True, "o": None,
        "p": "5", "q": 31, "<<": "text",
    }  # fmt: skip


@pytest.mark.parametrize("suffix", ["json", "yaml"])
@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf"])
def test_json_is_read_as_both(tmp_path, suffix, start):
    path = written(tmp_path, start + b'{"lr": 1e-3, "epochs": 3, "flip": null}', suffix)
    assert read_settings_text(path) == {"lr": 1e-3, "epochs": 3, "flip": None}


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-3", 1e-3), ("7", 7), ("-.5", -0.5), ("+.inf", math.inf), ("0o17", 15)],
)
def test_numbers_of_flags(text, value):
    assert number(text) == value


@pytest.mark.parametrize("text", ["1_0", "", "inf", "\u0661", "1e", " 1", "1\n", "0x", "--1"])
def test_what_python_reads_as_a_number_and_yaml_does_not(text):
    assert number(text) == text


@pytest.mark.parametrize(
    ("text", "suffix", "message"),
    [
        ("a: 1\na: 2", "yaml", "key 'a' is given twice"),
        ('{"a": 1, "a": 2}', "json", "key 'a' is given twice"),
        ("a: " + "9" * 5000, "yaml", "4300 digits"),
        ('{"a": ' + "9" * 5000 + "}", "json", "4300 digits"),
        ("a: " + "[" * 3000, "yaml", "nested too deeply"),
        ('{"a": ' + "[" * 3000, "json", "nested too deeply"),
        ('{"a": NaN}', "json", "NaN is no number of JSON"),
        ('{"a": -Infinity}', "json", "-Infinity is no number of JSON"),
        ("{a: 1}", "json", "cannot be read as JSON"),
        ("- 1", "yaml", "holds a list; a mapping"),
        ("[1]", "json", "holds a list; a mapping"),
        ("", "yaml", "holds nothing; a mapping"),
        ("", "json", "cannot be read as JSON"),
        (b"a: \xff", "yaml", "byte 3 is no UTF-8 text"),
        (b"\xff\xfea\x00", "json", "byte 0 is no UTF-8 text"),
        ("a: \x07", "yaml", "cannot be read as YAML"),
        ("a: &a [*a]", "yaml", "recursive"),
        ("? [1]\n: 2", "yaml", "unhashable"),
        ("a: !!timestamp 2026-02-30", "yaml", "could not determine a constructor"),
        ("a: !!python/object/apply:os.getpid []", "yaml", "could not determine a constructor"),
        ("a: 1\n---\na: 2", "yaml", "single document"),
        ("a: '" + "x" * (1 << 20) + "'", "yaml", "larger than 1024 KiB"),
    ],
)
def test_what_is_wrong_is_told_on_a_line(tmp_path, text, suffix, message):
    path = written(tmp_path, text, suffix)
    start = time.process_time()
    with pytest.raises(ValueError, match=message) as caught:
        read_settings_text(path)
    assert time.process_time() - start < 5
    assert str(caught.value).startswith(str(path)) and len(str(caught.value)) < 500


def test_a_folder_and_a_device_without_end(tmp_path):
    with pytest.raises(ValueError, match="Is a directory"):
        read_settings_text(tmp_path)
    path = tmp_path / "endless.yaml"
    path.symlink_to("/dev/zero")
    with pytest.raises(ValueError, match="larger than 1024 KiB"):
        read_settings_text(path)


def test_aliases_of_aliases_are_shown_in_a_line(tmp_path):
    lines = ["a: &a [x,x,x,x,x,x,x,x,x]"]
    lines += [f"{c}: &{c} [{','.join(['*' + b] * 9)}]" for b, c in zip("abcdefgh", "bcdefghi")]
    found = read_settings_text(written(tmp_path, "\n".join(lines), "yaml"))
    assert len(short(found)) < 100 and len(short(found["i"])) < 100
