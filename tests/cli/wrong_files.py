"""Fills a folder with files of every kind that a name on a command line may lead to."""

from __future__ import annotations

from pathlib import Path

import numpy as np

CELL = (
    "Genotype(normal=[('sep_conv_3x3', 0), ('skip_connect', 1)], normal_concat=[2],"
    " reduce=[('max_pool_3x3', 0), ('sep_conv_5x5', 1)], reduce_concat=[2])"
)


def populate(folder: Path) -> None:
    """Files of every kind that a name may lead to."""
    (folder / "dir").mkdir()
    (folder / "empty").write_text("")
    (folder / "text").write_text("a text\n")
    (folder / "latin").write_bytes(b"\xe4\xff: 1\n")
    (folder / "list.yaml").write_text("- 1\n- 2\n")
    (folder / "study.yaml").write_text("method: random\nevaluator: table:table.csv\n")
    (folder / "out.yaml").write_text("out: elsewhere\n")
    (folder / "table.csv").write_text("arch_str,c10_valid_12ep\nx,1\n")
    (folder / "picture.png").write_text("kept")
    (folder / "genotype.txt").write_text(CELL)
    (folder / "dangling").symlink_to("nowhere")
    (folder / "endless").symlink_to("/dev/zero")
    np.savez(folder / "tables.npz", prices=np.ones(3))
    (folder / "text.npz").write_text("no archive")
    lists = ["a: &a [x,x,x,x,x,x,x,x,x]"]
    lists += [f"{c}: &{c} [{','.join(['*' + b] * 9)}]" for b, c in zip("abcdefgh", "bcdefghi")]
    settings = {
        "bomb.yaml": "\n".join(lists).replace("i:", "lr:"),
        "deep.yaml": "lr: " + "[" * 3000,
        "deep.json": '{"lr": ' + "[" * 3000,
        "twice.yaml": "lr: 1\nlr: 2\n",
        "twice.json": '{"lr": 1, "lr": 2}',
        "nan.json": '{"lr": NaN}',
        "inf.yaml": "lr: .inf\n",
        "text.yaml": "lr: abc\n",
        "digits.yaml": "seed: " + "9" * 5000,
        "twenty.json": '{"seed": 12345678901234567890}',
        "date.yaml": "epochs: 2026-02-30\n",
        "sexagesimal.yaml": "epochs: 1:30\n",
        "yes.yaml": "flip: yes\n",
        "null.yaml": "seed: null\n",
        "unknown.yaml": "epoch: 3\n",
        "tag.yaml": "lr: !!python/object/apply:os.getpid []\n",
        "key.yaml": "? [1]\n: 2\n",
        "zero.json": '{"out": "a\\u0000b"}',
        "control.yaml": "lr: \x07\n",
        "other.json": '{"distribution": {"normal": {"a": "x"}}}',
        "none.json": '{"distribution": null}',
    }
    for name, text in settings.items():
        (folder / name).write_text(text)


SETTINGS_FILES = (
    *("bomb.yaml", "deep.yaml", "deep.json", "twice.yaml", "twice.json", "nan.json", "inf.yaml"),
    *("text.yaml", "digits.yaml", "twenty.json", "date.yaml", "sexagesimal.yaml", "yes.yaml"),
    *("null.yaml", "unknown.yaml", "tag.yaml", "key.yaml", "zero.json", "control.yaml"),
)
