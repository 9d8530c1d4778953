"""The parts of the GPU model that need no compiler: listings, functions of the source, times."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fastnas.benchmarks.model.budgets import STAGES, figures
from fastnas.benchmarks.model.counting import BlockCount, LaunchCount, Work
from fastnas.benchmarks.model.functions import functions_of
from fastnas.benchmarks.model.recorded import (
    KERNELS,
    OLD_STRUCTURE,
    mixed_op_case,
    recorded,
    step_case,
)
from fastnas.benchmarks.model.regions import Region
from fastnas.benchmarks.model.report import budget_lines, read_profile, time_lines
from fastnas.benchmarks.model.sass import Instruction, Kernel, read_listing
from fastnas.benchmarks.model.timing import H100, occupancy, time_of, total

SOURCE = """\
// a brace in a comment: {
__device__ int first(int a) {
  return a;  // }
}
__device__ void declared(int a);
template <class T> __global__ void __launch_bounds__(128) kernel(T a) {
  const char* text = "}";
  first(a);
}
"""
LISTING = """\
.text.kernel:
	//## File "{file}", line 3 inlined at "{file}", line 8
	//## File "{file}", line 8
        /*0000*/              @!P0 LDG.E.128 R4, desc[UR6][R2.64+0x10] ;  /* 0x0000000602057981 */
                                                                          /* 0x000164000c1e1900 */
.L_x_0:
        /*0010*/                   FFMA R4, R4, R5, 0.5 ;  /* 0x3f00000004057223 */
                                                           /* 0x020fe40003f46270 */
	//## File "{file}", line 8
        /*0020*/               @P1 BRA `(.L_x_0) ;  /* 0xfffffffc00001947 */
                                                    /* 0x000fea0003800000 */
"""


@pytest.fixture
def kernel(tmp_path: Path) -> Kernel:
    """A kernel that was compiled and disassembled before."""
    (tmp_path / "source.cu").write_text(SOURCE)
    (tmp_path / "kept.sass").write_text(LISTING.replace("{file}", str(tmp_path / "source.cu")))
    return Kernel("kernel", "kernel()", 64, 0, 1024, 0, tmp_path / "kept.cubin")


@pytest.fixture
def instructions(kernel: Kernel) -> Sequence[Instruction]:
    return kernel.instructions


def test_a_listing_is_read(instructions: Sequence[Instruction]) -> None:
    load, multiply, branch = instructions
    assert (load.predicate, load.opcode, load.width) == ("!P0", "LDG.E.128", 16)
    assert load.operands == "R4, desc[UR6][R2.64+0x10]"
    assert [each.pipe for each in instructions] == ["MEMORY", "FFMA", "CONTROL"]
    assert multiply.code == 0x020FE40003F462703F00000004057223
    assert branch.address == 0x20


def test_labels_are_those_of_the_next_instruction() -> None:
    assert read_listing(LISTING.splitlines())[1][".L_x_0"] == 0x10


def test_an_instruction_belongs_to_all_functions_that_it_was_inlined_into(
    instructions: Sequence[Instruction],
) -> None:
    inlined = ("first", "kernel")
    assert [functions_of(each) for each in instructions] == [inlined, inlined, ("kernel",)]


def test_a_region_is_what_functions_have(kernel: Kernel) -> None:
    # Each instruction: issued by warps, for lanes, in cycles.
    sums = np.array([[4, 4, 4], [128, 128, 96], [40, 8, 8]], float)
    work = Work(kernel, sums, np.array([3.0, 2.0, 0.0]))
    inlined, whole = Region.of(work, ["first"]), Region.of(work)
    assert (inlined.total, whole.total) == (8, 12)
    assert inlined.share("FFMA") == 0.5
    assert whole.named("BRA", "LDG") == 8
    assert inlined.moved_bytes(["LDG"], least=16) == 128 * 16
    # 128 lanes load four floats each, with eight instructions of a warp: two for each float.
    assert inlined.per_element(4) == 0.5
    assert inlined.loads_in_flight() == 3
    assert math.isnan(Region.of(work, ["unknown"]).share("FFMA"))


def test_a_budget_that_is_missed_is_told(kernel: Kernel) -> None:
    work = Work(kernel, np.array([[4, 4, 4]] * 3, float), np.zeros(3))
    found = list(figures((64, 16, 32, 32), [replace(launch(132), work=work)]))
    assert {figure.part for figure in found} == {"kernel"}
    assert all(figure.holds for figure in found)
    spilled = replace(work, kernel=replace(kernel, stack=8))
    (missed,) = [
        figure
        for figure in figures((64, 16, 32, 32), [replace(launch(132), work=spilled)])
        if not figure.holds
    ]
    assert missed.bound.name == "bytes of stack" and missed.value == 8
    assert "MISSED" in list(budget_lines([missed]))[-1]


def test_a_profile_stands_beside_the_model(tmp_path: Path) -> None:
    profile = 'case,kernel,calls,us\nc,"void a::b_kernel<C, 2>(Plan, int)",3,10\nc,b_kernel,1,5\n'
    (tmp_path / "profile.csv").write_text(profile)
    measured = read_profile(tmp_path / "profile.csv")
    assert measured == {"c": {"b_kernel": 35}}
    lines = list(time_lines({"b_kernel": time_of(launch(132))}, measured["c"]))
    assert lines[0].endswith("| bytes | measured |")
    assert lines[2].startswith("| `b_kernel` | 1 | ") and lines[2].endswith("| 0.04 |")


def test_recorded_times_have_every_case() -> None:
    # A batch of 256, too, where somebody waited for it.
    steps = {step_case(64, "float32"), step_case(64, "bfloat16")}
    mixed_ops = {mixed_op_case(shape) for shape in STAGES}
    assert set(recorded(KERNELS)) - {step_case(256, "float32")} == steps | mixed_ops
    assert set(recorded(OLD_STRUCTURE)) >= mixed_ops


def launch(
    blocks: float,
    cycles: float = 100.0,
    issue: float = 10.0,
    read: float = 0.0,
    registers: int = 64,
    shared: int = 1024,
) -> LaunchCount:
    kernel = Kernel("symbol", "kernel", registers, 0, shared, 0, Path())
    return LaunchCount(
        Work(kernel, np.zeros((3, 1)), np.zeros(1)), grid=(int(blocks), 1, 1), threads=128,
        shared=shared, blocks=(BlockCount(blocks, (cycles, 2 * cycles), issue, issue / 2),),
        fold_cycles=(0.0, 0.0), read=read, written=0.0, moved=0.0,
    )  # fmt: skip


def test_occupancy_is_bound_by_what_runs_out_first() -> None:
    assert occupancy(launch(1)) == 8  # registers: 64 x 128 of 65536
    assert occupancy(launch(1, registers=16)) == 16  # threads: 2048
    assert occupancy(launch(1, registers=16, shared=100 * 1024)) == 2
    assert occupancy(launch(1, registers=255)) == 2


def test_one_wave_takes_as_long_as_its_blocks() -> None:
    assert time_of(launch(132)).latency == pytest.approx(100 / H100.mhz)
    # Eight fit on a multiprocessor at a time, and wait for their turns: 80 cycles of the 100.
    assert time_of(launch(132 * 8)).latency == pytest.approx(100 / H100.mhz)
    assert time_of(launch(132 * 9)).latency == pytest.approx(200 / H100.mhz)
    assert time_of(launch(132 * 8, issue=50)).latency == pytest.approx(400 / H100.mhz)


def test_many_waves_take_their_share_and_half_a_block() -> None:
    waves = time_of(launch(132 * 8 * 100))
    assert waves.latency == pytest.approx((100 * 100 + 50) / H100.mhz)
    assert waves.issue == pytest.approx(8 * 100 * 10 / H100.mhz)


def test_what_does_not_fit_into_l2_waits_for_memory() -> None:
    small, large = time_of(launch(132, read=1e6)), time_of(launch(132, read=300e6))
    assert large.latency == 2 * small.latency
    assert large.bytes == pytest.approx(100)
    assert large.total == pytest.approx(100 + H100.launch_us)


def test_launches_add_up() -> None:
    times = total([time_of(launch(132)).times(3), time_of(launch(132, cycles=200))])
    assert times.launches == 4
    assert times.latency == pytest.approx(500 / H100.mhz)
