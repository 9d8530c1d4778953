"""Runs blocks of a kernel's machine code on the memory of this process (machine/machine.cpp)."""

from __future__ import annotations

import ctypes
import hashlib
import re
import shutil
import struct
import subprocess
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fastnas.benchmarks.model.sass import Instruction, Kernel
from fastnas.benchmarks.model.toolchain import MissingToolError, kept

SOURCE = Path(__file__).parent / "machine"
FLAGS = ("-std=c++17", "-O3", "-march=native", "-frounding-math", "-shared", "-fPIC")


class Counters(ctypes.Structure):
    """Counts what a block did.

    Attributes:
        cycles: of its longest warp, where loads that miss L1 find their line in L2, and where not.
        issued: instructions of all its warps.
    """

    _fields_ = [
        ("cycles", ctypes.c_int64 * 2),
        ("issued", ctypes.c_int64),
        ("shared_wavefronts", ctypes.c_int64),
        ("global_wavefronts", ctypes.c_int64),
        ("l1_misses", ctypes.c_int64),
        ("load_sectors", ctypes.c_int64),
        ("store_sectors", ctypes.c_int64),
        ("atomic_address", ctypes.c_uint64),
    ]


TALLY_NAMES = ("issued", "lanes", "cycles", "in_flight")
TALLY = np.dtype([(name, np.uint64) for name in TALLY_NAMES])


class Shape(NamedTuple):
    """Holds a launch as CUDA gets it; `parameters` are the bytes of the kernel's arguments."""

    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    dynamic_shared: int
    parameters: bytes


class MachineError(RuntimeError):
    """Says what the machine could not run."""


def load_machine(cache: Path) -> ctypes.CDLL:
    """Loads the machine, built into `cache` where that does not hold it yet."""
    gxx = shutil.which("g++")
    if gxx is None:
        raise MissingToolError("no g++")
    text = b"".join(path.read_bytes() for path in sorted(SOURCE.iterdir()))
    built = kept(
        cache / f"machine-{hashlib.sha256(text).hexdigest()[:16]}.so",
        lambda target: subprocess.run(
            [gxx, *FLAGS, str(SOURCE / "machine.cpp"), "-o", str(target)], check=True
        ),
    )
    library = ctypes.CDLL(str(built))
    library.machine_problem.restype = ctypes.c_char_p
    library.machine_load.restype = ctypes.c_void_p
    library.machine_open.restype = ctypes.c_void_p
    library.machine_unload.argtypes = [ctypes.c_void_p]
    library.machine_close.argtypes = [ctypes.c_void_p, ctypes.c_int]
    library.machine_sectors.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]
    library.machine_open.argtypes = [
        *(ctypes.c_void_p, ctypes.c_uint32, ctypes.c_char_p, ctypes.c_size_t),
        *(ctypes.c_char_p, ctypes.c_size_t),
    ]
    library.machine_block.argtypes = [
        *(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int),
        *(ctypes.c_void_p, ctypes.c_void_p),
    ]
    return library


class Program:
    """Holds a kernel as the machine runs it."""

    def __init__(self, machine: ctypes.CDLL, kernel: Kernel) -> None:
        self.machine, self.kernel = machine, kernel
        listing = "\n".join(_line(kernel, each) for each in kernel.instructions)
        self.handle = machine.machine_load(listing.encode())
        if not self.handle:
            raise MachineError(f"{kernel.name}: {machine.machine_problem().decode()}")
        self.tables = section_bytes(kernel.cubin, f".nv.constant2.{kernel.symbol}")

    def __del__(self) -> None:
        self.machine.machine_unload(self.handle)


class Run:
    """Runs blocks of one launch; they see each other's writes, the process does not.

    Attributes:
        tally: of each instruction, by all warps that ran: how often it was issued, for how many
            lanes, the cycles that warps spent on it, and how many loads of global memory a warp
            had under way behind it at most.
    """

    def __init__(self, program: Program, shape: Shape) -> None:
        self.program, self.shape = program, shape
        self.tally = np.zeros(len(program.kernel.instructions), TALLY)
        sizes = (ctypes.c_uint32 * 6)(*shape.grid, *shape.block)
        self.handle = program.machine.machine_open(
            sizes,
            program.kernel.shared + shape.dynamic_shared,
            shape.parameters,
            len(shape.parameters),
            program.tables,
            len(program.tables),
        )

    def block(self, index: Sequence[int], last: bool = False) -> Counters:
        """Runs a block; with `last`, of those that count themselves it is the last one."""
        counters = Counters()
        failed = self.program.machine.machine_block(
            self.handle,
            self.program.handle,
            (ctypes.c_uint32 * 3)(*index),
            int(last),
            self.tally.ctypes.data,
            ctypes.byref(counters),
        )
        if failed:
            problem = self.program.machine.machine_problem().decode()
            raise MachineError(f"{self.program.kernel.name}, block {tuple(index)}: {problem}")
        return counters

    def sectors(self) -> tuple[int, int]:
        """Returns how many sectors of 32 bytes have been read and written, each counted once."""
        read, written = ctypes.c_int64(), ctypes.c_int64()
        self.program.machine.machine_sectors(self.handle, ctypes.byref(read), ctypes.byref(written))
        return read.value, written.value

    def close(self, keep: bool = False) -> None:
        """Ends the launch; with `keep`, what it wrote is then in memory."""
        self.program.machine.machine_close(self.handle, int(keep))
        self.handle = None


def run_whole(program: Program, shape: Shape) -> None:
    """Runs every block of a launch, one after the other; then what it wrote is in memory."""
    run = Run(program, shape)
    done = False
    try:
        for index in product(*map(range, shape.grid)):
            run.block(index)
        done = True
    finally:
        run.close(keep=done)


def _line(kernel: Kernel, instruction: Instruction) -> str:
    """Writes an instruction as program.h reads it."""
    target = kernel.target(instruction)
    operands = re.sub(r"\(\*.*\*\)", "", instruction.operands).strip()
    if instruction.name.startswith("BRX"):
        operands = re.sub(r"\s+(-?0x)", r", \1", operands)
    if instruction.name == "RET":
        operands = operands.split()[0]
    elif target is not None:
        operands = re.sub(r"`\(\S+\)", f"0x{target:x}", operands)
    low, high = instruction.code & (1 << 64) - 1, instruction.code >> 64
    columns = (f"{instruction.address:x}", instruction.predicate or "-", instruction.opcode)
    return "\t".join([*columns, operands or "-", f"{low:x}", f"{high:x}"])


def section_bytes(elf: Path, name: str) -> bytes:
    """Returns a section of an ELF file of 64 bits; empty where there is none."""
    data = elf.read_bytes()
    (table,) = struct.unpack_from("<Q", data, 0x28)
    size, count, names_at = struct.unpack_from("<HHH", data, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", data, table + i * size) for i in range(count)]
    strings = headers[names_at][4]
    for header in headers:
        begin = strings + header[0]
        if data[begin : data.index(b"\0", begin)].decode() == name:
            return data[header[4] : header[4] + header[5]]
    return b""
