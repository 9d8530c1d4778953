"""Builds the native modules with CMake and ninja. Imports no torch: the build environment has none.

FASTNAS_BUILD=auto    _C where there is a C++ compiler, _cuda where there is nvcc (default)
             =python  neither: pure Python, eager and Triton backends only
             =cpu     _C, or fail
             =cuda    _C and _cuda, or fail
FASTNAS_CUDA_ARCHITECTURES, as CMake names them ("90-real"), is what _cuda is compiled for where the
default, all that are supported, takes too long.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from importlib import metadata
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
WISHES = ("auto", "python", "cpu", "cuda")


def wish() -> str:
    value = os.environ.get("FASTNAS_BUILD", "auto")
    if value not in WISHES:
        sys.exit(f"FASTNAS_BUILD is '{value}'; allowed: {', '.join(WISHES)}")
    return value


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    candidates = [shutil.which("nvcc"), home and f"{home}/bin/nvcc", "/usr/local/cuda/bin/nvcc"]
    return next((c for c in candidates if c and Path(c).is_file()), None)


def find_tool(name: str) -> str:
    """Finds cmake or ninja: beside the interpreter, in the package of that name, then on PATH.

    What pip has installed for this build comes first: a system's cmake may be older than ours asks.
    """
    beside = shutil.which(name, path=sysconfig.get_path("scripts"))
    try:
        installed = [file.locate() for file in metadata.files(name) or []]
    except metadata.PackageNotFoundError:
        installed = []
    packaged = [str(path) for path in installed if path.name == name and os.access(path, os.X_OK)]
    found = next((tool for tool in (beside, *packaged, shutil.which(name)) if tool), None)
    if found is None:
        raise FileNotFoundError(
            f"no {name} beside {sys.executable} or on PATH; `pip install {name}` brings it"
        )
    return found


class CMakeBuild(build_ext):
    """One CMake run builds and installs all modules beside the Python package."""

    def run(self) -> None:
        wanted = wish()
        nvcc = find_nvcc()
        if wanted == "cuda" and nvcc is None:
            sys.exit("FASTNAS_BUILD=cuda: no nvcc on PATH, in CUDA_HOME or in /usr/local/cuda")
        plans = {
            "cpu": [False],
            "cuda": [True],
            "auto": [True, False] if nvcc else [False],
        }[wanted]
        failures = []
        for with_cuda in plans:
            try:
                self.build(nvcc if with_cuda else None)
            except (subprocess.CalledProcessError, OSError) as error:
                failures.append(f"{'_C and _cuda' if with_cuda else '_C'}: {error}")
                continue
            self.summary(["_C", "_cuda"] if with_cuda else ["_C"], failures, nvcc)
            return
        if wanted != "auto":
            sys.exit(f"FASTNAS_BUILD={wanted} failed: {'; '.join(failures)}")
        self.distribution.ext_modules = []  # so that the wheel is tagged as the pure Python it is
        self.summary([], failures, nvcc)

    def build(self, nvcc: str | None) -> None:
        import pybind11

        package = Path(self.get_ext_fullpath("fastnas._C")).parent.resolve()
        # A folder per compiler: CMake keeps the one that a folder began with, whatever CXX says.
        compiler = Path(os.environ.get("CXX") or "default").name
        temporary = Path(self.build_temp).resolve() / f"{'cuda' if nvcc else 'cpu'}-{compiler}"
        temporary.mkdir(parents=True, exist_ok=True)
        arguments = [
            f"-DCMAKE_INSTALL_PREFIX={package}",
            f"-DCMAKE_MAKE_PROGRAM={find_tool('ninja')}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DFASTNAS_CUDA={'ON' if nvcc else 'OFF'}",
        ]
        if nvcc:
            arguments.append(f"-DCMAKE_CUDA_COMPILER={nvcc}")
            if architectures := os.environ.get("FASTNAS_CUDA_ARCHITECTURES"):
                arguments.append(f"-DFASTNAS_CUDA_ARCHITECTURES={architectures}")
        cmake = find_tool("cmake")
        for command in (
            [cmake, "-G", "Ninja", *arguments, str(ROOT)],
            [cmake, "--build", "."],
            [cmake, "--install", "."],
        ):
            subprocess.run(command, cwd=temporary, check=True)

    def summary(self, built: list[str], failures: list[str], nvcc: str | None) -> None:
        lines = [f"fastnas: built {', '.join(built) or 'no native module (pure Python)'}"]
        lines += [f"fastnas: could not build {failure}" for failure in failures]
        if not nvcc:
            lines.append("fastnas: no nvcc found, so no _cuda")
        print("\n".join(lines), file=sys.stderr)

    def get_outputs(self) -> list[str]:
        package = Path(self.get_ext_fullpath("fastnas._C")).parent
        return [str(path) for path in package.glob("_*.so")]


class Wheel(bdist_wheel):
    """A wheel that names this platform only where a native module was built."""

    def run(self) -> None:
        self.run_command("build")
        self.root_is_pure = not self.distribution.has_ext_modules()
        super().run()


benchmark_packages = find_packages(include=["benchmarks", "benchmarks.*"])
setup(
    packages=[
        *find_packages(include=["fastnas", "fastnas.*"]),
        "fastnas.kernels",
        *(f"fastnas.{name}" for name in benchmark_packages),
    ],
    package_dir={"fastnas.kernels": "kernels", "fastnas.benchmarks": "benchmarks"},
    package_data={"fastnas": ["py.typed"]},
    ext_modules=[] if wish() == "python" else [Extension("fastnas._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": Wheel},
)
