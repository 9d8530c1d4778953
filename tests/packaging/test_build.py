"""What a build leaves: wheels by build isolation, a source distribution, modules without torch."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import fastnas

ROOT = Path(__file__).resolve().parents[2]
NATIVE = sorted(Path(fastnas.__file__).parent.glob("_*.so"))


# What a run uses of the native module: the mixed sum of three ones and three twos.
MIXED_SUM = (
    "import torch, fastnas._C, fastnas.kernels, fastnas.benchmarks;"
    "x = [torch.ones(3)] * 2;"
    "print(fastnas.__file__, fastnas._C.__file__);"
    "print(fastnas.mixed_sum(x, torch.tensor([1.0, 2.0]), backend='cpu').tolist())"
)


def run(command, **options):
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


def checkout(out):
    """A copy of the checkout, without what was built in it."""
    made = {".git", ".venv", "build", "runs", "site"}  # at the top; fastnas/runs is source
    anywhere = shutil.ignore_patterns("*.so", "*.egg-info", ".*_cache", "__pycache__")

    def left_out(folder, names):
        top = made.intersection(names) if Path(folder) == ROOT else set()
        return anywhere(folder, names) | top

    return Path(shutil.copytree(ROOT, out / "source", ignore=left_out))


def wheel(out, source, wish, *options, **environment):
    """Builds a wheel as pip builds it for a user, by default in an environment without torch.

    Unoptimised, a third of the work: the installed modules are the optimised ones.
    """
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", *options]
    environment = os.environ | {"FASTNAS_BUILD": wish, "CMAKE_BUILD_TYPE": "None"} | environment
    environment.pop("PYTHONPATH", None)
    done = run([*command, "-w", out, source], env=environment)
    return done, next(iter(out.glob("*.whl")), None)


def assert_it_runs_from(site, tmp_path):
    """A fresh process finds fastnas and its native module in `site`, and mixes three numbers."""
    environment = os.environ | {"PYTHONPATH": str(site)}
    done = run([sys.executable, "-c", MIXED_SUM], env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    where, result = done.stdout.splitlines()
    assert all(path.startswith(str(site)) for path in where.split()), where
    assert result == "[3.0, 3.0, 3.0]"


def assert_threads_change_no_bit(tests, site):
    """Another OpenMP runtime than torch's: what a thread takes for its number must be its own."""
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-k", "cpu and threads_do_not"]
    files = sorted(
        f for f in (tests / "ops").glob("test_*.py") if "threads_do_not" in f.read_text()
    )
    environment = os.environ | {"PYTHONPATH": str(site), "OMP_NUM_THREADS": "2"}
    done = run([*command, *files], cwd=tests, env=environment)
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
def test_the_source_distribution_makes_a_wheel_with_the_cpu_module(sdist, tmp_path):
    """By clang where it is installed: the modules that are in use come from the other compiler."""
    source, clang = shutil.copytree(sdist, tmp_path / "source"), shutil.which("clang++")
    done, path = wheel(tmp_path, source, "cpu", "-v", **({"CXX": clang} if clang else {}))
    assert path is not None, done.stderr
    names = zipfile.ZipFile(path).namelist()
    assert any(n.startswith("fastnas/_C.") for n in names)
    for name in ("kernels/mixed_sum.py", "benchmarks/harness/run.py", "py.typed"):
        assert f"fastnas/{name}" in names
    assert not any(n.startswith(("tests/", "kernels/", "benchmarks/", "csrc/")) for n in names)
    site = tmp_path / "site"
    zipfile.ZipFile(path).extractall(site)
    assert_it_runs_from(site, tmp_path)
    if clang:
        said = done.stdout + done.stderr
        assert "CXX compiler identification is Clang" in said
        assert "[-W" not in said  # as in "warning: ... [-Wunused]"
        assert_threads_change_no_bit(source / "tests", site)


def test_wheel_without_native_modules(tmp_path):
    done, path = wheel(tmp_path, checkout(tmp_path), "python", "--no-build-isolation")
    assert path is not None, done.stderr
    assert_pure(path)


def assert_pure(path):
    assert not any(n.endswith(".so") for n in zipfile.ZipFile(path).namelist())
    assert "py3-none-any" in path.name


def test_a_wheel_that_auto_could_not_build_a_module_for_is_pure(tmp_path):
    """Without build isolation, so that nothing is fetched: this environment has what it takes."""
    without = {"CXX": "/no/such/compiler"}
    source = checkout(tmp_path)
    done, path = wheel(tmp_path, source, "auto", "--no-build-isolation", "-v", **without)
    assert path is not None, done.stderr
    assert "built no native module (pure Python)" in done.stdout + done.stderr
    assert "could not build _C" in done.stdout + done.stderr
    assert_pure(path)


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """The source distribution, unpacked."""
    out = tmp_path_factory.mktemp("sdist")
    command = [sys.executable, "-m", "build", "--sdist", "--no-isolation", "-o", out, checkout(out)]
    done = run(command, env=os.environ | {"FASTNAS_BUILD": "python"})
    assert done.returncode == 0, done.stderr
    shutil.unpack_archive(next(out.glob("*.tar.gz")), out)
    return next(out.glob("fastnas-*/"))


def test_the_source_distribution_has_every_file_of_the_repository(sdist):
    listed = run(["git", "ls-files"], cwd=ROOT)
    if listed.returncode != 0:
        pytest.skip("not a git checkout, so no list of its files")
    missing = [name for name in listed.stdout.splitlines() if not (sdist / name).exists()]
    assert not missing
    assert not list(sdist.rglob("*.so"))


def test_tools_beside_the_interpreter_come_before_those_on_the_path(tmp_path, monkeypatch):
    """Both are found with nothing on PATH, and then are not what PATH has."""
    for name in ("cmake", "ninja"):
        (tmp_path / name).write_text("#!/bin/sh\nexit 7\n")
        (tmp_path / name).chmod(0o755)
    ask = "import sys; sys.argv = ['setup.py', '--version']; from setup import find_tool as f;"
    ask += "print(f('cmake'), f('ninja'))"
    for path in (str(tmp_path), ""):
        done = run([sys.executable, "-c", ask], cwd=ROOT, env=os.environ | {"PATH": path})
        assert done.returncode == 0, done.stderr
        for tool in done.stdout.splitlines()[-1].split():
            assert not tool.startswith(str(tmp_path)), tool


ASK_CMAKE = """
import sys
sys.argv = ["setup.py", "--version"]
import setup
from setuptools import Distribution
command = setup.CMakeBuild(Distribution({"name": "fastnas"}))
command.finalize_options()
command.build_temp = sys.path[0] or "."
setup.subprocess.run = lambda words, **_: print(*words)
command.build("nvcc")
"""


@pytest.mark.parametrize("wished", ["90-real", ""])
def test_cuda_is_built_for_the_architectures_that_are_asked_for(tmp_path, wished):
    shutil.copy(ROOT / "setup.py", tmp_path)
    environment = os.environ | {"FASTNAS_CUDA_ARCHITECTURES": wished}
    done = run([sys.executable, "-c", ASK_CMAKE], cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    configured = done.stdout.splitlines()[1].split()
    given = [word for word in configured if "ARCHITECTURES" in word]
    assert given == ([f"-DFASTNAS_CUDA_ARCHITECTURES={wished}"] if wished else [])


def test_an_unknown_wish_is_refused():
    environment = os.environ | {"FASTNAS_BUILD": "rust"}
    command = [sys.executable, "setup.py", "--version"]
    done = run(command, env=environment, cwd=ROOT)
    assert done.returncode != 0
    assert "FASTNAS_BUILD is 'rust'; allowed: auto, python, cpu, cuda" in done.stderr


def test_cuda_wished_without_nvcc_fails(tmp_path):
    """In a copy of find_nvcc's world: nothing on PATH, in CUDA_HOME or in /usr/local/cuda."""
    if Path("/usr/local/cuda/bin/nvcc").exists():
        pytest.skip("nvcc is at /usr/local/cuda/bin, where setup.py looks")
    environment = os.environ | {"FASTNAS_BUILD": "cuda", "PATH": str(tmp_path)}
    command = [sys.executable, "setup.py", "build_ext"]
    done = run(command, env=environment, cwd=ROOT)
    assert done.returncode != 0 and "no nvcc" in done.stderr


@pytest.mark.skipif(not NATIVE, reason="no native module was built")
@pytest.mark.skipif(shutil.which("nm") is None, reason="no nm")
@pytest.mark.parametrize("path", NATIVE, ids=lambda p: p.name.split(".")[0])
def test_native_modules_know_no_torch_and_share_no_vector_code(path):
    symbols = subprocess.run(
        ["nm", "-D", "-C", path], capture_output=True, text=True, check=True
    ).stdout
    assert not [s for s in symbols.splitlines() if "torch" in s or "c10::" in s or " at::" in s]
    linked = subprocess.run(["ldd", path], capture_output=True, text=True, check=True).stdout
    assert "libtorch" not in linked and "libcudart" not in linked and "libcuda.so" not in linked
    # A weak kernel symbol could be the AVX-512 copy serving the baseline.
    local = subprocess.run(["nm", "-C", path], capture_output=True, text=True, check=False).stdout
    kernels = [s for s in local.splitlines() if "fastnas::" in s and " W " in s]
    assert not [s for s in kernels if "avx" in s or "baseline" in s or "philox" in s]
