"""nvcc takes the CUDA sources, for every architecture that a wheel is built for."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
from pathlib import Path

import pytest

CUDA = Path(__file__).parents[2] / "csrc" / "cuda"
HOME = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path=f"{HOME}/bin")


@pytest.mark.slow
@pytest.mark.skipif(NVCC is None, reason="no nvcc")
@pytest.mark.skipif(
    importlib.util.find_spec("fastnas._cuda") is not None,
    reason="the build of fastnas._cuda compiled every source for every architecture",
)
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize("source", sorted(CUDA.glob("*.cu")), ids=lambda path: path.name)
def test_source_compiles(source: Path, architecture: str, tmp_path: Path) -> None:
    command = [str(NVCC), "-std=c++17", f"-arch={architecture}", "-c", str(source)]
    result = subprocess.run(
        [*command, "-o", str(tmp_path / "compiled.o")], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
