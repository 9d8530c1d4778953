"""Runs a NoisyDARTS search from Python: settings, search, short training, report."""

import tempfile
from pathlib import Path

from fastnas.runs.search import run_search
from fastnas.search.config import SearchConfig, make_config

with tempfile.TemporaryDirectory() as folder:
    settings = {
        "method": "noisy-darts",
        "space": "S2",  # skip connection or separable convolution
        "data": "digits",  # scikit-learn's, 8x8 pixels, in the package
        "images": 256,
        "channels": 4,
        "layers": 3,
        "epochs": 2,
        "batch_size": 64,
        "train_epochs": 1,  # of the network that is derived
        "train_channels": 4,
        "train_layers": 3,
        "train_batch_size": 64,
        "compare_steps": 0,  # that many would be timed beside the eager step
        "tensorboard": False,
        "out": str(Path(folder) / "run"),
    }
    # Every setting has its flag: `fastnas search --method noisy-darts --space S2 ...` is the same.
    config = make_config(SearchConfig, settings)
    report = run_search(config)

    print("genotype:", report["genotype"])
    print("accuracy of the supernet:", report["supernet_accuracy"])
    print("files:", ", ".join(sorted(path.name for path in Path(config.out).iterdir())))
