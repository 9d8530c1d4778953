"""nvcc takes the CUDA sources for the oldest architecture that a wheel is built for.

What it takes, the later ones take: no source asks which architecture it is compiled for. Without
optimising, which is three quarters of the time: whether a source compiles does not depend on it.
"""

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
@pytest.mark.parametrize("source", sorted(CUDA.glob("*.cu")), ids=lambda path: path.name)
def test_source_compiles(source: Path, tmp_path: Path) -> None:
    command = [str(NVCC), "-std=c++17", "-arch=sm_80", "-G", "-c", str(source)]
    result = subprocess.run(
        [*command, "-o", str(tmp_path / "compiled.o")], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr


def test_no_source_asks_for_its_architecture() -> None:
    """One that does has to be compiled above for each architecture that it tells apart."""
    sources = [p for p in CUDA.parent.rglob("*") if p.suffix in (".cu", ".h")]
    texts = {p.name: p.read_text().replace("defined(__CUDA_ARCH__)", "") for p in sources}
    assert len(texts) > 30
    assert not [name for name, text in texts.items() if "__CUDA_ARCH" in text]
