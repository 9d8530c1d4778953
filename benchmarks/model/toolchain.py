"""Compiles the CUDA sources to cubins and lists their machine code: no GPU is needed for either."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from filelock import FileLock

ARCHITECTURE = "sm_90"
# -lineinfo names the source line of each instruction and leaves the instructions as they are.
NVCC_FLAGS = ("-std=c++17", "-cubin", "-lineinfo")


class MissingToolError(RuntimeError):
    """Says which program is missing, and what brings it."""


def find_tool(name: str) -> str:
    """Finds nvcc, or a tool of CUDA: on PATH, in CUDA's folder, or in Triton's wheel."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    triton = importlib.util.find_spec("triton")
    packaged = (
        Path(triton.origin).parent / "backends/nvidia/bin" if triton and triton.origin else ""
    )
    places = (None, f"{home}/bin", str(packaged))
    found = next((tool for place in places if (tool := shutil.which(name, path=place))), None)
    if found is None:
        raise MissingToolError(f"no {name} on PATH, in {home}/bin or in Triton's wheel")
    return found


def compile_sources(csrc: Path, cache: Path, patterns: Sequence[str] = ("*.cu",)) -> list[Path]:
    """Compiles sources of csrc/cuda, one process for each core; `cache` keeps what was compiled."""
    nvcc = find_tool("nvcc")
    command = [nvcc, f"-arch={ARCHITECTURE}", *NVCC_FLAGS]
    version = _output([nvcc, "--version"])
    headers = b"".join(path.read_bytes() for path in _headers(csrc))
    # The longest begin first, so that none of them is left over when the others are done.
    found = {path for pattern in patterns for path in (csrc / "cuda").glob(pattern)}
    sources = sorted(found, key=lambda path: -path.stat().st_size)

    def compiled(source: Path) -> Path:
        text = "\n".join([*command, version]).encode() + source.read_bytes() + headers
        return kept(
            cache / f"{source.stem}-{hashlib.sha256(text).hexdigest()[:16]}.cubin",
            lambda target: _output([*command, str(source), "-o", str(target)]),
        )

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return sorted(pool.map(compiled, sources))


def _headers(csrc: Path) -> list[Path]:
    """Lists what nvcc may read, which no header of the CPU's kernels or of the host shim is."""
    found = [path for path in csrc.rglob("*.h") if not path.name.startswith("host_simt")]
    return sorted(path for path in found if "cpu" not in path.relative_to(csrc).parts)


def disassemble(cubin: Path) -> str:
    """Lists a cubin's code: instructions with their encoding, and the source lines of each."""
    return kept(
        cubin.with_suffix(".sass"),
        lambda target: target.write_text(
            # Columns are aligned over a whole kernel: without that a listing is a quarter as long.
            re.sub(" +", " ", run_tool("nvdisasm", "-c", "-hex", "-gi", str(cubin)))
        ),
    ).read_text()


def resource_usage(cubin: Path) -> str:
    """Prints registers, stack, shared and local memory of each kernel of a cubin."""
    return kept(
        cubin.with_suffix(".usage"),
        lambda target: target.write_text(run_tool("cuobjdump", "-res-usage", str(cubin))),
    ).read_text()


def demangle(symbols: list[str]) -> list[str]:
    """Returns C++ names without their namespaces and return types."""
    text = run_tool("c++filt", given="\n".join(symbols))
    names = text.replace("(anonymous namespace)::", "").replace("fastnas::cuda::", "")
    return [name.removeprefix("void ") for name in names.splitlines()]


def kept(path: Path, make: Callable[[Path], object]) -> Path:
    """Returns the file, made where it is not there yet; of several processes one makes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        if not path.exists():
            unfinished = path.with_suffix(".part")
            make(unfinished)
            unfinished.replace(path)
    return path


def run_tool(name: str, *arguments: str, given: str | None = None) -> str:
    """Runs a tool and returns what it prints."""
    return _output([find_tool(name), *arguments], given)


def _output(command: list[str], given: str | None = None) -> str:
    done = subprocess.run(command, capture_output=True, text=True, input=given)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    return done.stdout
