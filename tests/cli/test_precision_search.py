"""A search in bf16 and in fp16, from the command line to the report."""

import json

import pytest
import torch

from fastnas.search.checkpoint import load_checkpoint

TINY = {
    "space": "S2",
    "channels": 2,
    "layers": 3,
    "images": 64,
    "batch_size": 8,
    "epochs": 1,
    "train_epochs": 1,
    "train_channels": 2,
    "train_layers": 3,
    "compare_steps": 1,
    "threads": 1,
}


@pytest.mark.parametrize(("method", "name"), [("noisy-darts", "bf16"), ("rome", "fp16")])
def test_a_whole_search_from_the_command_line(fastnas, tmp_path, method, name):
    """Trained and compared with eager in the same precision, which the report tells."""
    settings = {**TINY, "method": method, **({"samples": 2} if method == "rome" else {})}
    flags = [f"--{k.replace('_', '-')}={v}" for k, v in settings.items()]
    code, _, err = fastnas("search", *flags, "--no-tensorboard", f"--precision={name}", "--out=run")
    assert code == 0, err
    report = json.loads((tmp_path / "run/report.json").read_text())
    assert report["precision"] == name and report["step_speedup_vs_eager"] > 0
    # There are no cells in float16 on the CPU.
    assert report["backend"] == {"bf16": "cpu", "fp16": "eager"}[name]
    assert 0 <= report["test_accuracy"] <= 1
    assert f" {name}," in (tmp_path / "run/report.md").read_text()
    for file, kind in (("search.pt", "search"), ("train.pt", "training")):
        state = load_checkpoint(tmp_path / "run" / file, kind)
        tensors = [*state["network"].values(), *state.get("arch", {}).values()]
        assert {t.dtype for t in tensors} <= {torch.float32, torch.int64}
        assert ("precision" in state) == (name == "fp16")
        assert ("skipped_weight_steps" in state["history"][0]) == (name == "fp16")
