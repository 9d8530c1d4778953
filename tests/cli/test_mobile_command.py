"""The MobileNet-like space by commands: search, resume, train, draw, and what is refused."""

import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from fastnas.search.checkpoint import load_checkpoint
from fastnas.search.config import TrainConfig, make_config
from fastnas.search.trainer import Trainer
from fastnas.spaces import MOBILE_ARCHITECTURES, format_column
from fastnas.spaces.mobile_genotype import read_column

pytestmark = pytest.mark.usefixtures("no_pictures", "one_thread")

SEARCH = [
    *("search", "--space=mobilenet", "--method=noisy-darts", "--data=images.npz", "--width=0.05"),
    *("--batch-size=4", "--epochs=2", "--images=16", "--checkpoint-every=1", "--threads=1"),
    *("--train-epochs=1", "--compare-steps=0", "--no-tensorboard", "--validate-every=0"),
]
TRAIN = ["--data=images.npz", "--epochs=1", "--threads=1", "--no-tensorboard", "--batch-size=16"]
COLUMN = format_column(MOBILE_ARCHITECTURES["FairNAS-A"])
SKIP_WHERE_CHANNELS_CHANGE = "skip " + " ".join(COLUMN.split()[1:])


@pytest.fixture(autouse=True)
def images(tmp_path):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (40, 8, 8, 1), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", images=pixels, labels=np.arange(40) % 4)


def state(path, kind):
    found = load_checkpoint(path, kind)
    del found["seconds"]
    return found


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def test_a_search_that_is_killed_goes_on_to_the_same_bits(fastnas, tmp_path):
    """By the system, at whatever step it was; what it has found is then drawn."""
    code, _, error = fastnas(*SEARCH, "--out=whole")
    assert code == 0, error
    process = subprocess.Popen(
        [sys.executable, "-m", "fastnas", *SEARCH, "--out=killed"], cwd=tmp_path,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    checkpoint = tmp_path / "killed/search.pt"
    for _ in range(6000):
        if checkpoint.exists() or process.poll() is not None:
            break
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL, "it had ended before it could be killed"
    code, _, error = fastnas(*SEARCH, "--out=killed", "--resume")
    assert code == 0, error
    for name, kind in (("search.pt", "search"), ("train.pt", "training")):
        ours, expected = (state(tmp_path / out / name, kind) for out in ("killed", "whole"))
        assert same(ours, expected), name
    reports = [
        json.loads((tmp_path / out / "report.json").read_text()) for out in ("killed", "whole")
    ]
    for name in ("genotype", "test_accuracy", "macs", "supernet_accuracy"):
        assert reports[0][name] == reports[1][name] is not None


def test_a_column_is_trained_and_what_is_left_is_trained_again(fastnas, tmp_path):
    """By a name, by its text, by the file of a run; sizes are those of the file, or of flags."""
    sizes = ["--width=0.05", "--stem-stride=1", "--squeeze", "--activation=swish"]
    code, _, error = fastnas("train", "NoisyDARTS-A", *TRAIN, *sizes, "--out=a")
    assert code == 0, error
    left = read_column((tmp_path / "a/genotype.json").read_text())
    assert (left.width, left.stem_stride) == (0.05, 1)
    assert left.architecture == MOBILE_ARCHITECTURES["NoisyDARTS-A"]
    report = json.loads((tmp_path / "a/report.json").read_text())
    network = report["network"]
    assert network["squeeze"] and network["activation"] == "swish"
    assert len(report["layers"]) == 22 and report["test_images"] == 8
    assert report["macs"] == sum(row["macs"] for row in report["layers"])
    text = (tmp_path / "a/report.md").read_text()
    assert f"{report['parameters']:,} parameters" in text and "| 19 | k7_e6 |" in text
    assert (tmp_path / "a/column.svg").exists()
    code, _, error = fastnas("train", "a/genotype.json", *TRAIN, "--out=b")
    assert code == 0, error
    again = json.loads((tmp_path / "b/report.json").read_text())
    network = again["network"]
    assert (network["width"], network["stem_stride"], network["squeeze"]) == (0.05, 1, False)
    assert again["parameters"] < report["parameters"]
    assert again["macs"] < report["macs"]
    code, _, error = fastnas("train", "NoisyDARTS-A", *TRAIN, *sizes[:3], "--out=a", "--resume")
    assert code == 2 and "a holds another run: activation 'swish' -> 'relu6'" in error


def test_none_given_trains_as_published():
    settings = {"data": "digits", "genotype": COLUMN, "tensorboard": False, "width": 0.05}
    config = Trainer(make_config(TrainConfig, settings), read_column(COLUMN)).config
    assert (config.epochs, config.batch_size, config.lr) == (300, 256, 0.05)
    assert (config.nesterov, config.weight_decay, config.cutout) == (True, 4e-5, 0)
    assert (config.stem_stride, config.squeeze, config.activation) == (2, False, "relu6")
    assert config.channels is None and config.layers is None


@pytest.mark.pictures
@pytest.mark.parametrize("what", ["FairNAS-B", COLUMN, "column.json"])
@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_a_column_is_drawn(fastnas, tmp_path, what, suffix):
    (tmp_path / "column.json").write_text(json.dumps({"mobilenet": COLUMN, "width": 0.5}))
    code, _, error = fastnas("draw", what, f"x.{suffix}", "--title=A column")
    assert code == 0, error
    drawn = (tmp_path / f"x.{suffix}").read_bytes()
    assert drawn.startswith(b"\x89PNG" if suffix == "png" else b"<?xml")
    code, _, error = fastnas("draw", what, f"x.{suffix}")
    assert code == 2 and "exists; --force replaces it" in error


MOBILENET = ["search", "--space=mobilenet"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*MOBILENET, "--method=rome"], "method is 'rome'; space mobilenet is searched by darts,"),
        ([*MOBILENET, "--method=random"], "method is 'random'; space mobilenet is searched by dar"),
        ([*MOBILENET, "--method=anasod-gdas"], "method is 'anasod-gdas'; space mobilenet is sear"),
        ([*MOBILENET, "--method=enas"], "method is 'enas'; space mobilenet is searched by darts, "),
        ([*MOBILENET, "--channels=8"], "channels is given, which space mobilenet does not have;"),
        ([*MOBILENET, "--layers=3"], "layers is given, which space mobilenet does not have"),
        ([*MOBILENET, "--table=x.csv"], "table is given, which space mobilenet does not have"),
        ([*MOBILENET, "--cuda-graph"], "cuda_graph is given, which space mobilenet does not have"),
        ([*MOBILENET, "--no-channels-last"], "channels_last is given, which space mobilenet doe"),
        ([*MOBILENET, "--train-layers=3"], "train_layers is given, which space mobilenet does no"),
        ([*MOBILENET, "--memory=fast"], "memory is 'fast'; allowed: eager, lean, recompute, mini"),
        ([*MOBILENET, "--width=17"], "width is 17.0; a number is needed, above 0 to 16"),
        ([*MOBILENET, "--stem-stride=3"], "stem_stride is 3; a whole number is needed, 1 to 2"),
        ([*MOBILENET, "--activation=tanh"], "activation is 'tanh'; allowed: relu6, swish"),
        ([*MOBILENET, "--order=2", "--method=gdas"], "order given, which method gdas does not ha"),
        ([*MOBILENET, "--budget=3"], "unknown setting 'budget'"),
        (["search", "--width=0.5"], "width is given, which space S0 does not have; what it has of"),
        (["search", "--space=nb201", "--squeeze"], "squeeze is given, which space nb201 does not"),
        (["search", "--memory=recompute"], "memory is 'recompute'; allowed: fast, lean, minimal"),
        (["search", "--space=mobilenets"], "no search space 'mobilenets'; there are S0, S1, S2, S"),
        (["search", "--method=random", "--width=0.5"], "unknown setting 'width'"),
        (["train", "FairNAS-A", "--layers=3"], "layers is 3; the network of a MobileNet-like col"),
        (["train", "FairNAS-A", "--auxiliary"], "auxiliary is True; the network of a MobileNet-l"),
        (["train", "FairNAS-A", "--width=0"], "width is 0.0; a number is needed, above 0 to 16"),
        (["train", "k3_e6 k5_e3"], "genotype: architecture has 2 layers; the space has 19, and a"),
        (["train", "k3_e6 sep_conv"], "genotype: text: layer 1 is 'sep_conv'; 'skip' or a name"),
        (["train", SKIP_WHERE_CHANNELS_CHANGE], "genotype: architecture[0] is 'skip'; allowed"),
        (["train", "FairNAS-Z"], "genotype file FairNAS-Z cannot be read: No such file"),
        (["train", '{"mobilenet": 3}'], "genotype: mobilenet is 3; names of blocks in a text"),
        (["train", '{"mobilenet": "skip", "depth": 3}'], "genotype: unknown key 'depth'; allowed"),
        (["train", json.dumps({"mobilenet": COLUMN, "width": "x"})], "genotype: width is 'x'; a n"),
        (["train", json.dumps({"mobilenet": COLUMN, "stem_stride": 4})], "genotype: stem_stride i"),
        (
            ["train", "|none~0|+|none~0|none~1|+|none~0|none~1|nor_conv_1x1~2|", "--squeeze"],
            "squeeze is True; the network of a NAS-Bench-201 cell has no drop_path, auxiliary, aux",
        ),
        (["draw", "NoisyDARTS-A", "x.gif"], "path 'x.gif' has suffix '.gif'; expected .png or .sv"),
    ],
)  # fmt: skip
def test_what_is_refused(fastnas, tmp_path, arguments, message):
    before = sorted(tmp_path.rglob("*"))
    code, _, error = fastnas(*arguments)
    assert code == 2, error
    assert error.startswith("fastnas: error: ") and error.count("\n") == 1
    assert message in error, error
    assert sorted(tmp_path.rglob("*")) == before


def test_a_column_of_a_narrow_space_that_no_wide_one_has(fastnas, tmp_path):
    """Rounded to 8 channels a layer may skip that changes them elsewhere."""
    column = COLUMN.split()
    column[10] = "skip"
    text = json.dumps({"mobilenet": " ".join(column), "width": 0.05})
    code, _, error = fastnas("train", text, *TRAIN, "--width=1")
    assert code == 2 and "architecture[10] is 'skip'; allowed: k3_e6" in error
    assert not (tmp_path / "runs").exists()
