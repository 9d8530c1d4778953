"""Reads the machine code of kernels: instructions, their source functions, registers and memory."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import NamedTuple

from fastnas.benchmarks.model.toolchain import demangle, disassemble, resource_usage

_SECTION = re.compile(r"^\.text\.(\S+):$", re.MULTILINE)
_LABEL = re.compile(r"^(\S+):$")
_FRAME = re.compile(r'^\s*//## File "([^"]+)", line (\d+)')
_INSTRUCTION = re.compile(
    r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([\w.]+)\s*(.*?)\s*;\s+/\* 0x([0-9a-f]{16}) \*/"
)
_REST = re.compile(r"^\s+/\* 0x([0-9a-f]{16}) \*/")
_USAGE = re.compile(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
_TARGET = re.compile(r"`\((\S+?)\)")

# The pipe of an instruction, by the first part of its name; what is in none is integer work.
PIPES: Mapping[str, frozenset[str]] = {
    "FFMA": frozenset({"FFMA"}),
    "HMMA": frozenset({"HMMA"}),
    "FP32": frozenset({"FADD", "FMUL", "FSEL", "FSETP", "FMNMX", "FCHK", "FSWZADD"}),
    "FP16": frozenset({"HADD2", "HFMA2", "HMUL2", "HMNMX2", "HSETP2"}),
    "FP64": frozenset({"DFMA", "DADD", "DMUL", "DSETP"}),
    "MUFU": frozenset({"MUFU"}),
    "CONVERT": frozenset({"F2F", "F2FP", "F2I", "I2F", "I2FP", "FRND"}),
    "MEMORY": frozenset(
        {"LDG", "STG", "LD", "ST", "LDS", "STS", "LDL", "STL", "LDGSTS", "LDSM", "ATOMG", "ATOM"}
        | {"ATOMS", "RED", "REDG", "SHFL", "LDC", "ULDC", "UBLKCP", "LDGDEPBAR", "DEPBAR"}
    ),
    "CONTROL": frozenset(
        {"BRA", "BRX", "JMP", "BSSY", "BSYNC", "BREAK", "CALL", "RET", "EXIT", "WARPSYNC", "BAR"}
        | {"NOP", "YIELD", "MEMBAR", "ERRBAR", "CCTL", "ENDCOLLECTIVE", "BMOV"}
    ),
}
_PIPE_OF = {name: pipe for pipe, names in PIPES.items() for name in names}


class Instruction(NamedTuple):
    """Holds one machine instruction.

    Attributes:
        code: its 128 bits; immediates and the compiler's stall counts are read from them.
        frames: file and line it comes from, the innermost of inlined calls first.
    """

    address: int
    predicate: str
    opcode: str
    operands: str
    code: int
    frames: tuple[tuple[str, int], ...]

    @property
    def name(self) -> str:
        """Returns the first part of the opcode: LDG of LDG.E.128."""
        return self.opcode.split(".", 1)[0]

    @property
    def pipe(self) -> str:
        return _PIPE_OF.get(self.name, "INTEGER")

    @property
    def width(self) -> int:
        """Returns the bytes that a lane moves."""
        parts = self.opcode.split(".")
        sizes = {"128": 16, "64": 8, "U8": 1, "S8": 1, "U16": 2, "S16": 2}
        return next((sizes[part] for part in parts if part in sizes), 4)


@dataclass(frozen=True)
class Kernel:
    """Holds the machine code of a kernel with what it occupies of a multiprocessor."""

    symbol: str
    name: str
    registers: int
    stack: int
    shared: int
    local: int
    cubin: Path

    @cached_property
    def _code(self) -> tuple[Sequence[Instruction], Mapping[str, int]]:
        return read_listing(_listings(self.cubin)[self.symbol].splitlines())

    @property
    def instructions(self) -> Sequence[Instruction]:
        return self._code[0]

    @cached_property
    def index(self) -> Mapping[int, int]:
        """Maps an address to the place of its instruction."""
        return {each.address: i for i, each in enumerate(self.instructions)}

    def target(self, instruction: Instruction) -> int | None:
        """Returns the address that a branch names."""
        found = _TARGET.search(instruction.operands)
        return self._code[1].get(found.group(1)) if found else None


def read_cubins(cubins: Sequence[Path]) -> list[Kernel]:
    """Lists all kernels of some cubins by name; their code is read when it is asked for."""
    kernels = [kernel for cubin in cubins for kernel in _kernels(cubin)]
    return sorted(kernels, key=lambda kernel: kernel.name)


def _kernels(cubin: Path) -> Iterator[Kernel]:
    found = _USAGE.findall(resource_usage(cubin))
    for (symbol, *usage), name in zip(found, demangle([symbol for symbol, *_ in found])):
        registers, stack, shared, local = map(int, usage)
        yield Kernel(symbol, name, registers, stack, shared, local, cubin)


@lru_cache
def _listings(cubin: Path) -> Mapping[str, str]:
    """Splits a cubin's listing by kernel."""
    parts = _SECTION.split(disassemble(cubin))
    return dict(zip(parts[1::2], parts[2::2]))


def read_listing(lines: Sequence[str]) -> tuple[list[Instruction], dict[str, int]]:
    """Reads the instructions and the labels of a kernel."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    waiting: list[str] = []  # labels of the instruction that comes next
    frames: list[tuple[str, int]] = []
    begins_frames = True
    for number, line in enumerate(lines):
        if found := _INSTRUCTION.match(line):
            address, predicate, opcode, operands, low = found.groups()
            rest = _REST.match(lines[number + 1])
            assert rest is not None, line
            at = int(address, 16)
            code = int(rest.group(1) + low, 16)
            instructions.append(
                Instruction(at, predicate or "", opcode, operands, code, tuple(frames))
            )
            labels.update(dict.fromkeys(waiting, at))
            waiting, begins_frames = [], True
        elif found := _FRAME.match(line):
            frames = [] if begins_frames else frames
            begins_frames = False
            frames.append((found.group(1), int(found.group(2))))
        elif found := _LABEL.match(line):
            waiting.append(found.group(1))
    return instructions, labels
