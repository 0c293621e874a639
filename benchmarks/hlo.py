"""What a program compiled for a GPU does, read from its text: kernels, bytes, operations, sources.

Bytes are what a kernel has to read and write, operations those of products and convolutions; both
are estimates. XLA's own cost analysis answers nothing for a program that was compiled ahead.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

BITS = {"pred": 8, "bf16": 16} | {
    f"{kind}{bits}": bits for kind in "fsu" for bits in (8, 16, 32, 64)
}
SHAPE = re.compile(r"(pred|bf16|[fsu]\d+)\[([\d,]*)\](\{[^}]*\})?")
LINE = re.compile(r"^\s+(ROOT )?%(\S+) = (.*)$")
FREE = {"bitcast", "get-tuple-element", "parameter", "tuple", "constant", "copy-start", "copy-done"}
LAUNCH = 1.5e-6  # seconds of a kernel that does nothing, in a command buffer: an estimate


@dataclass(frozen=True)
class Shape:
    """Of an array: element type, sides, and the layout as it is written."""

    dtype: str
    sides: tuple[int, ...]
    layout: str

    @property
    def bytes(self) -> int:
        return math.prod(self.sides) * BITS[self.dtype] // 8


def _shapes(text: str) -> tuple[Shape, ...]:
    return tuple(
        Shape(dtype, tuple(int(side) for side in sides.split(",") if side), layout)
        for dtype, sides, layout in SHAPE.findall(text)
    )


def _bracketed(text: str) -> tuple[str, str]:
    """What is inside of the bracket that `text` begins in, and what follows it."""
    depth = 1
    for end, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return text[:end], text[end + 1 :]
    return text, ""


class Instruction:
    """One line of a computation."""

    def __init__(self, name: str, text: str, *, root: bool) -> None:
        self.name, self.root = name, root
        if text.startswith("("):
            kind, rest = _bracketed(text[1:])
            rest = rest.lstrip()
        else:
            kind, _, rest = text.partition(" ")
        self.shapes = _shapes(kind)
        self.op, _, rest = rest.partition("(")
        operands, self.attributes = _bracketed(rest)
        self.parameter = int(operands) if self.op == "parameter" else -1  # its place
        self.operands: list[str] = re.findall(r"%([^\s,()]+)", operands)

    def attribute(self, pattern: str) -> str:
        """The first group of `pattern` in the attributes; empty if it does not occur."""
        found = re.search(pattern, self.attributes)
        return found[1] if found else ""

    @cached_property
    def calls(self) -> str:
        return self.attribute(r"calls=%([^\s,]+)")

    @cached_property
    def target(self) -> str:
        """Of a custom call: what is called."""
        return self.attribute(r'custom_call_target="([^"]+)"')

    @cached_property
    def path(self) -> str:
        """JAX's name: functions, modules, operation."""
        return self.attribute(r'op_name="([^"]*)"')

    @property
    def bytes(self) -> int:
        return sum(shape.bytes for shape in self.shapes)

    @property
    def elements(self) -> int:
        return max(1, sum(math.prod(shape.sides) for shape in self.shapes))


Computation = dict[str, Instruction]


def arrays(reference: str, computation: Computation) -> tuple[Shape, ...]:
    """What an operand refers to: all arrays of an instruction, or with "#2" the third.

    Of a tuple in a tuple ("#0#1"), the inner place is taken.
    """
    name, *places = reference.split("#")
    shapes = computation[name].shapes
    return (shapes[int(places[-1])],) if places else shapes


@dataclass(frozen=True)
class Module:
    """A program: its computations by name, which of them is the entry, and frames of Python."""

    computations: Mapping[str, Computation]
    entry: str
    sources: Mapping[str, str]  # number of a stack frame -> "file:line function" of the project

    def instructions(self) -> Iterator[Instruction]:
        """All of them, fused ones too."""
        for computation in self.computations.values():
            yield from computation.values()

    def source(self, instruction: Instruction) -> str:
        """The line of the project that an instruction comes from; empty if none is known."""
        return self.sources.get(instruction.attribute(r"stack_frame_id=(\d+)"), "")


def parse(text: str) -> Module:
    """Reads the text of a compiled program (`Compiled.as_text()`)."""
    computations: dict[str, Computation] = {}
    entry, current = "", None
    for line in text.splitlines():
        if line.startswith(("%", "ENTRY ")) and line.rstrip().endswith("{"):
            name = line.removeprefix("ENTRY ")[1:].split()[0].split("(")[0]
            current = computations[name] = {}
            if line.startswith("ENTRY"):
                entry = name
        elif current is not None and (match := LINE.match(line)):
            root, name, rest = match.groups()
            current[name] = Instruction(name, rest, root=bool(root))
    return Module(computations, entry, _sources(text))


def _sources(text: str) -> dict[str, str]:
    """The innermost line of the project of each stack frame, from the tables before the code."""

    def table(title: str, row: str) -> dict[str, tuple[str, ...]]:
        _, found, rest = text.partition(f"\n{title}\n")
        lines = rest.partition("\n\n")[0] if found else ""
        return {match[1]: match.groups()[1:] for match in re.finditer(row, lines, re.M)}

    files = table("FileNames", r'^(\d+) "(.*)"$')
    functions = table("FunctionNames", r'^(\d+) "(.*)"$')
    places = table(
        "FileLocations", r"^(\d+) \{file_name_id=(\d+) function_name_id=(\d+) line=(\d+)"
    )
    # A parent is written as its number plus one; the outermost frame has itself.
    frames = table("StackFrames", r"^(\d+) \{file_location_id=(\d+) parent_frame_id=(\d+)")
    found: dict[str, str] = {}
    for number in sorted(frames, key=int):
        place, after = frames[number]
        file, function, line = places.get(place, ("", "", ""))
        name = files.get(file, ("",))[0]
        if "/mrcnn_jax/" in name:
            where = f"{name.rpartition('/mrcnn_jax/')[2]}:{line}"
            found[number] = f"{where} {functions.get(function, ('',))[0].split('.')[-1]}"
        else:
            found[number] = found.get(str(int(after) - 1), "")
    return found


# -- costs -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kernel:
    """What runs as one kernel or one library call, and how often."""

    instruction: Instruction
    kind: str
    read: float  # bytes
    written: float
    flops: float = 0.0
    types: str = ""  # of the factors of its products
    times: int = 1

    @property
    def bytes(self) -> float:
        return self.read + self.written

    def seconds(self, bandwidth: float, matrix: float) -> float:
        """The slower of moving and multiplying, an optimistic guess.

        Args:
            bandwidth: bytes a second.
            matrix: bfloat16 operations a second.
        """
        rate = matrix if "bf16" in self.types else matrix / 2
        return max(LAUNCH, self.bytes / bandwidth, self.flops / rate) * self.times


def kernels(module: Module) -> list[Kernel]:
    """All kernels of a program, those in loops of unknown length once."""
    found: list[Kernel] = []

    def visit(name: str, times: int) -> None:
        for each in module.computations[name].values():
            if each.op in FREE:
                continue
            if each.op == "while":
                trips = each.attribute(r'"known_trip_count":\{"n":"(\d+)"')
                visit(each.attribute(r"body=%([^\s,]+)"), times * int(trips or 1))
            elif each.op in ("conditional", "call"):
                branches = re.findall(
                    r"(?:to_apply=|branch_computations=\{|, )%([^\s,}]+)", each.attributes
                )
                for branch in branches:
                    visit(branch, times)
            else:
                found.append(_kernel(each, module, name, times))

    visit(module.entry, 1)
    return found


def flops(module: Module) -> float:
    """Operations of all products and convolutions."""
    return sum(kernel.flops * kernel.times for kernel in kernels(module))


def _kernel(each: Instruction, module: Module, computation: str, times: int) -> Kernel:
    table = module.computations[computation]
    operands = [arrays(o, table) for o in dict.fromkeys(each.operands)]
    reads = sum(shape.bytes for shapes in operands for shape in shapes)
    if each.op == "fusion":
        return _fusion(each, module, times)
    if each.op != "custom-call":
        return Kernel(each, each.op, reads, each.bytes, times=times)
    factor = operands[0][0].dtype if operands else ""
    if each.target.startswith("__cudnn$conv"):
        flops = _convolution_flops(each, table)
        return Kernel(each, each.target, reads, each.shapes[0].bytes, flops, factor, times)
    if "matmul" in each.target or "gemm" in each.target:
        contracted = each.attribute(r'"lhs_contracting_dimensions":\[([^\]]*)\]')
        left = operands[0][0].sides
        length = math.prod(left[int(axis.strip('"'))] for axis in contracted.split(","))
        flops = 2.0 * math.prod(each.shapes[0].sides) * length
        return Kernel(each, each.target, reads, each.shapes[0].bytes, flops, factor, times)
    return Kernel(each, each.target, reads, each.bytes, times=times)


def fused(instruction: Instruction, module: Module) -> Iterator[tuple[Instruction, Computation]]:
    """The instructions inside of a fusion, nested ones too, with the computation they are in."""
    inside = module.computations[instruction.calls]
    for each in inside.values():
        yield each, inside
        if each.op == "fusion":
            yield from fused(each, module)


def _fusion(each: Instruction, module: Module, times: int) -> Kernel:
    read, written = _fusion_bytes(module.computations[each.calls])
    flops, types, kind = 0.0, set(), each.attribute(r"kind=k(\w+)")
    kind = each.attribute(r'"kind":"([^"]+)"') or kind
    for part, inside in fused(each, module):
        if part.op == "dot":
            left = arrays(part.operands[0], inside)[0]
            contracted = part.attribute(r"lhs_contracting_dims=\{([\d,]*)\}")
            length = math.prod(left.sides[int(axis)] for axis in contracted.split(",") if axis)
            flops += 2.0 * math.prod(part.shapes[0].sides) * length
            types |= {arrays(o, inside)[0].dtype for o in part.operands}
        elif part.op in ("sort", "scatter"):
            kind = part.op
    return Kernel(each, kind, read, written, flops, ",".join(sorted(types)), times)


def _fusion_bytes(computation: Computation) -> tuple[float, float]:
    """(read, written) by what is asked for: a slice or a gather reads a part of its operand; of a
    buffer that is updated, a part is written."""
    order = list(computation.values())
    root = next(each for each in order if each.root)
    ends = [root]
    if root.op == "tuple":
        ends = [computation[o.partition("#")[0]] for o in root.operands]
    demand: dict[str, float] = defaultdict(float)
    for end in (root, *ends):
        demand[end.name] = 1.0
    for each in reversed(order):
        share = min(1.0, demand[each.name])
        for place, name in enumerate(each.operands):
            name = name.partition("#")[0]
            operand, part = computation[name], share
            if place == 0 and each.op in ("slice", "gather", "dynamic-slice", "pad"):
                part = min(1.0, share * each.elements / operand.elements)
            elif place == 0 and each.op in ("scatter", "dynamic-update-slice"):
                updates = computation[each.operands[2 if each.op == "scatter" else 1]]
                part = updates.elements / operand.elements
            demand[name] += part
    read = sum(x.bytes * min(1.0, demand[x.name]) for x in order if x.op == "parameter")
    written = 0
    for end in ends:
        while end.op == "bitcast":
            end = computation[end.operands[0].partition("#")[0]]
        updates = {"scatter": 2, "dynamic-update-slice": 1}.get(end.op)
        written += end.bytes if updates is None else computation[end.operands[updates]].bytes
    return read, written


def _convolution_flops(each: Instruction, table: Computation) -> float:
    """Of a cuDNN call, from the kernel and the cells that it visits."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", each.attributes)
    assert labels is not None
    left, right = (arrays(o, table)[0] for o in each.operands[:2])
    if "Filter" in each.target:  # the gradient of the kernel: the right operand is the output's
        kernel, cells = each.shapes[0], right
    elif "BackwardInput" in each.target:
        kernel, cells = right, left
    else:
        kernel, cells = right, each.shapes[0]
    count = math.prod(cells.sides) / cells.sides[labels[3].index("f")]
    groups = int(each.attribute(r"feature_group_count=(\d+)") or 1)
    return 2.0 * math.prod(kernel.sides) / groups * count
