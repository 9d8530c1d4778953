"""The Triton kernels compiled ahead of time for GPUs that are not here.

Run as a script, this file puts a driver in Triton's place that only names an architecture, and
calls the Triton backend: every launch compiles what it would have run, with the types, tuples and
constants that a real launch has. pytest runs it in a process of its own, where
Triton is not interpreted.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

FORMS = {
    80: (torch.bfloat16, "gaussian_additive", torch.channels_last, True, True),
    90: (torch.float32, "none", torch.contiguous_format, True, False),
    100: (torch.float16, "uniform_multiplicative", torch.contiguous_format, False, True),
}
"""The form in which the sums are launched for an architecture: dtype, noise, layout, whether in
training, and whether the weights need a gradient. What Triton makes of a form differs little
between architectures, so each is compiled for one of them."""


@pytest.mark.slow
@pytest.mark.parametrize("architecture", FORMS)
def test_kernels_compile(architecture: int, kept_folder: Callable[[str], Path]) -> None:
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(kept_folder("fastnas_triton"))
    result = subprocess.run(
        [sys.executable, __file__, str(architecture)],
        capture_output=True, text=True, env=environment,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    kernels, launches = json.loads(result.stdout.splitlines()[-1])
    assert kernels
    assert {launch["kernel"] for launch in launches} == set(kernels)
    for launch in launches:
        assert launch["target"].startswith(f"sm_{architecture}"), launch
        assert launch["binary_bytes"] > 0
        if launch["kernel"] == "sample_paths_fwd_kernel":  # the others have exp, made of it
            assert "mul.rn.f64" in launch["arithmetic"]
            assert "fma.rn.f64" not in launch["arithmetic"], "other paths than on other backends"


def launch_sums(architecture: int) -> None:
    """Launches both sums, forward and backward, in the form of this architecture."""
    from fastnas.backends.calls import Noise, NormSumCall, SumCall
    from fastnas.backends.triton import TritonNormSum, TritonSum

    dtype, form, layout, training, needs_dw = FORMS[architecture]
    x = [torch.zeros(2, 3, 30, 30, dtype=dtype).to(memory_format=layout) for _ in range(3)]
    level, rng = torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.int64)
    noise = Noise([] if form == "none" else [1], form, level, rng)
    call = SumCall(x, torch.zeros(3), noise)
    y, saved = TritonSum().forward(call)
    TritonSum().backward(y, call, saved, [True, True, False, True])
    additive = Noise([1], "gaussian_additive", level, rng)  # the one with standard deviations
    TritonSum().forward(call._replace(noise=additive))
    normed = NormSumCall(x, call.w, [True, False, True], 1e-5, None, None, noise)
    y, saved = TritonNormSum().forward(normed)
    if not training:
        normed, saved = normed._replace(mean=saved[1], var=saved[2]), saved[:1]
    TritonNormSum().backward(y, normed, saved, [needs_dw, True, True, True])


def launch_paths() -> None:
    """Launches the sampling of paths, forward and backward, in each topology."""
    from fastnas.backends.calls import PathsCall
    from fastnas.backends.triton import TritonPaths

    tau, rng = torch.ones((), dtype=torch.float64), torch.zeros(2, dtype=torch.int64)
    for dtype, topology, logits in (
        (torch.float32, "none", 0),
        (torch.float32, "top2", 14),
        (torch.float64, "pairs", 20),
    ):
        beta = torch.zeros(2, logits, dtype=dtype) if logits else None
        alpha = torch.zeros(2, 14, 7, dtype=dtype)
        paths = PathsCall(alpha, beta, [2, 3, 4, 5], topology, tau, rng, 7)
        weight, saved = TritonPaths().forward(paths)
        TritonPaths().backward(weight, paths, saved, [True, beta is not None])


def compile_everything(architecture: int) -> tuple[list[str], list[dict[str, Any]]]:
    """The kernels that there are, and what was compiled for which launch."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    from fastnas.kernels import mixed_norm_sum, mixed_sum, sample_paths

    driver.set_active(
        SimpleNamespace(
            get_current_device=lambda: 0,
            get_current_stream=lambda device: 0,
            get_current_target=lambda: GPUTarget("cuda", architecture, 32),
        )
    )
    launches: list[dict[str, Any]] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        compiled = run(self, *args, grid=grid, warmup=True, **kwargs)
        ptx = compiled.asm["ptx"]
        target = next(t for t in ptx.splitlines() if t.startswith(".target"))
        launches.append(
            {
                "kernel": self.__name__,
                "target": target.split()[1],
                "binary_bytes": len(compiled.asm["cubin"]),
                "arithmetic": sorted(set(re.findall(r"(?:mul|add|fma)[.a-z]*\.f64", ptx))),
            }
        )
        return compiled

    JITFunction.run = compile_only
    launch_sums(architecture)
    launch_paths()
    names = {*vars(mixed_sum), *vars(mixed_norm_sum), *vars(sample_paths)}
    return [name for name in names if name.endswith("_kernel")], launches


if __name__ == "__main__":
    print(json.dumps(compile_everything(int(sys.argv[1]))))
