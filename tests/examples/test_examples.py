"""Runs every example as a user does, and looks for what it claims to show."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = sorted(path.name for path in (ROOT / "examples").glob("*.py"))
LONGEST = 80

# No example may reach for the network: every address but this machine's is refused.
OFFLINE = """
import socket
connect = socket.socket.connect
def refuse(self, address):
    if self.family != socket.AF_UNIX:
        raise OSError(f"an example asked for {address}")
    return connect(self, address)
socket.socket.connect = refuse
"""


def output(name, tmp_path):
    """What an example prints, run in an empty folder without the network."""
    (tmp_path / "sitecustomize.py").write_text(OFFLINE)
    paths = [str(tmp_path), str(ROOT)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / name],
        capture_output=True, text=True, check=False, cwd=tmp_path, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix != ".pyc") in (
        ["sitecustomize.py"],
        ["__pycache__", "sitecustomize.py"],
    ), "it leaves files behind"
    return done.stdout


def numbers(pattern, text):
    return [float(found) for found in re.findall(pattern, text)]


def test_accelerate_on_a_public_network_changes_no_result(tmp_path):
    text = output("accelerate_public_darts.py", tmp_path)
    before, after = numbers(r"loss (\d\.\d+)", text)
    (error,) = numbers(r"gradient: (\S+)", text)
    assert abs(before - after) < 1e-4 and error < 1e-2
    assert "replaced (3)" in text and "cells.0 .. cells.2 (3)" in text
    assert "left (0)" in text


def test_a_search_leaves_its_genotype_and_report(tmp_path):
    text = output("search_from_python.py", tmp_path)
    assert re.search(r"genotype: Genotype\(normal=\[\('(skip_connect|sep_conv_3x3)', \d\)", text)
    files = re.search(r"files: (.*)", text)[1].split(", ")
    assert {"genotype.json", "cell.png", "report.md", "search.pt"} <= set(files)


def test_a_candidate_of_ones_own_leaves_the_others_fused(tmp_path):
    text = output("own_candidate.py", tmp_path)
    own, fused = numbers(r"loss (\d+\.\d+)", text)
    (error,) = numbers(r"gradient: (\S+)", text)
    assert abs(own - fused) < 1e-9 and error < 1e-9
    assert "6 of 7 candidates: mixed_edges" in text and "ChannelAttention" in text


def test_sampled_paths_move_what_ran(tmp_path):
    text = output("sampled_paths.py", tmp_path)
    for moved, there in re.findall(r"([\d,]+) of ([\d,]+) parameters moved", text):
        moved, there = (int(n.replace(",", "")) for n in (moved, there))
        assert 0 < moved < there / 2
    # Two paths of two cell types with four nodes, into each of which two edges run.
    assert text.count("32 of 56 edges ran") == 3


def test_a_benchmark_of_ones_own_shapes_verifies_and_times(tmp_path):
    text = output("benchmark_own_shapes.py", tmp_path)
    assert re.search(r"mixed_sum on 32x24x28x28, fastnas-\w+: \d+\.\d times as fast", text)
    assert re.search(r"mixed_edges on 16x24x14x14, fastnas-\w+: \d+\.\d times as fast", text)
    assert "wrong" not in text


def test_a_choice_holds_less_and_computes_the_same(tmp_path):
    text = output("choice_of_blocks.py", tmp_path)
    eager, recompute, minimal = numbers(r"holds +(\d+\.\d+) MiB", text)
    assert minimal < recompute / 5 and recompute < eager / 2
    assert len(set(re.findall(r"loss (\d\.\d+)", text))) == 1
    assert len(set(re.findall(r"derived: (.*)", text))) == 1


def test_networks_of_ones_own_learn_and_are_derived(tmp_path):
    text = output("search_own_network.py", tmp_path)
    first, *_, last = numbers(r"train (\d+\.\d+)", text)
    assert last < 0.7 * first
    assert numbers(r"accuracy (\d\.\d+) on images", text)[0] > 0.7


def test_a_graph_network_learns_and_is_derived(tmp_path):
    text = output("search_graph.py", tmp_path)
    first, *_, last = numbers(r"train (\d+\.\d+)", text)
    assert last < 0.7 * first
    assert numbers(r"accuracy (\d\.\d+) on 1197 nodes", text)[0] > 0.6


def test_a_transformer_learns_and_is_derived(tmp_path):
    text = output("search_transformer.py", tmp_path)
    first, *_, last = numbers(r"train (\d+\.\d+)", text)
    assert last < first
    assert "Choice" not in text and "MultiheadAttention" in text


def test_a_mobilenet_search_learns_and_derives(tmp_path):
    text = output("mobilenet_search.py", tmp_path)
    first, *_, last = numbers(r"epoch \d: loss (\d+\.\d+)", text)
    assert last < first
    (derived,) = re.findall(r"derived: (.*)", text)
    assert re.fullmatch(r"k[357]_e[36]( (k[357]_e[36]|skip)){5}", derived)
    ((before, after),) = re.findall(r"loss (\S+) at first, (\S+) at last", text)
    assert float(after) < float(before)


def test_every_example_is_short_run_and_named_in_the_readme():
    tests, readme = Path(__file__).read_text(), (ROOT / "README.md").read_text()
    for name in EXAMPLES:
        assert len((ROOT / "examples" / name).read_text().splitlines()) < LONGEST, name
        is_library = name == "public_darts.py"
        assert is_library or f'output("{name}"' in tests, f"{name} is run by no test"
        assert is_library or f"examples/{name}" in readme, f"README.md does not name {name}"
