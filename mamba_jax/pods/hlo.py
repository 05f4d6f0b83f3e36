"""Reads what a compiled program runs from its text (HLO).

A program is a list of computations, one of which is its entry; each is a list of instructions, one a line:

    ENTRY %main (p: f32[8]) -> f32[8] {
      %gather.1 = bf16[8,128]{1,0} all-gather(%p), channel_id=5, replica_groups=[2,8]<=[16]
      %while.2 = (s32[]) while(%gather.1), condition=%cond, body=%body
    }

That is: name, type of the result with its layout, operation, operands, attributes. `bf16[8,128]` is 8 x 128 numbers of
16 bits. Loops, fusions and calls name other computations.
"""

import collections
import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence

# Pallas kernels that a step may call.
KERNELS = (
    "selective_scan_pallas_tpu_forward",
    "selective_scan_pallas_tpu_backward",
    "causal_conv1d_pallas_tpu_forward",
    "causal_conv1d_pallas_tpu_backward",
    "selective_scan_pallas_tpu_edge",
    "ssd_pallas_tpu_forward",
    "ssd_pallas_tpu_backward",
)
_REDUCE_SCATTER = "all-reduce-scatter"
_COLLECTIVES = r"all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"


def compiled_instructions(text: str) -> Iterator[tuple[str, int]]:
    """The instructions that a compiled program runs one after the other, and how often each of them runs.

    Args:
        text: text of the program, from `Compiled.as_text`. Loops are taken to count up to the largest number in their
            condition; instructions that run on another unit of the chip are included.
    """
    bodies, entry = computations(text)

    def walk(name: str, times: int) -> Iterator[tuple[str, int]]:
        for line in bodies[name]:
            yield line, times
            if offloaded := re.search(r"call-start\(.*called_computations=\{%([^\s,}]+)", line):
                yield from walk(offloaded[1], times)
            if loop := re.search(r" while\((%\S+?)\).*condition=%(\S+?), body=%(\S+?)[,\s]", line + " "):
                yield from walk(loop[3], times * _turns("\n".join(bodies[loop[2]]), loop[1], bodies[name]))

    yield from walk(entry, 1)


def _turns(condition: str, start: str, lines: Sequence[str]) -> int:
    """How often a loop runs that counts in steps of one.

    Args:
        condition: text of its condition.
        start: name of the tuple of values that it starts from.
        lines: lines of the computation that contains the loop. They show where its counter starts: of some loops the
            compiler moves the first turn out and counts from 1.
    """
    bounds = re.findall(r"[su]32\[\]\S* constant\((\d+)\)", condition)
    counter = re.search(r"[su]32\[\]\S* get-tuple-element\(.*index=(\d+)", condition)
    if not bounds or counter is None:
        return 1
    defined = dict(re.findall(r"^ *(%\S+) = (.*)$", "\n".join(lines), re.MULTILINE))
    values = re.search(r" tuple\((.*?)\)", re.sub(r"/\*.*?\*/", "", defined.get(start, "")))
    value = defined.get(values[1].split(", ")[int(counter[1])], "") if values is not None else ""
    while copied := re.search(r" copy\((%\S+?)\)", value):
        value = defined.get(copied[1], "")
    first = re.search(r"[su]32\[\]\S* constant\((\d+)\)", value)
    return max(map(int, bounds)) - (0 if first is None else int(first[1]))


def fused_instructions(text: str) -> Iterator[tuple[str, str, int]]:
    """The instructions inside the fusions that a compiled program runs: name of the fusion, instruction, how often.

    Args:
        text: as of `compiled_instructions`.
    """
    bodies, _ = computations(text)
    for line, times in compiled_instructions(text):
        for fusion, inner in inside(line, bodies):
            yield fusion, inner, times


def inside(line: str, bodies: Mapping[str, Sequence[str]]) -> Iterator[tuple[str, str]]:
    """The instructions inside a fusion and the fusions in it, each with the name of its own; none of another one.

    Args:
        line: any instruction.
        bodies: from `computations`.
    """
    if fusion := re.search(r" fusion\(.*calls=%([^\s,}]+)", line):
        for inner in bodies[fusion[1]]:
            yield fusion[1], inner
            yield from inside(inner, bodies)


def computations(text: str) -> tuple[dict[str, list[str]], str]:
    """Lines of every computation of a compiled program, by name, and the name of the one that starts it."""
    bodies: dict[str, list[str]] = {}
    entry, name = "", ""
    for line in text.splitlines():
        if header := re.match(r"(ENTRY )?%(\S+) \(.*\{$", line):
            name = header[2]
            entry = name if header[1] else entry
            bodies[name] = []
        elif name:
            bodies[name].append(line)
    return bodies, entry


class Counts:
    """What one device does in one step.

    Attributes:
        cycles: cycles of XLA's operations, as estimated by the compiler.
        calls: number of calls by kind of collective and by name of Pallas kernel.
        arrived: bytes that arrive at the device, by kind of collective.
        collective_lines: the instructions of the collectives.
        transfers: number of transfers between slices, by kind.
        received: bytes that arrive from other slices, by kind.
        kernel_elements: number of tokens times channels that each of `KERNELS` works on.
        other_kernels: number of calls of further Pallas kernels, such as those of attention, by name.
    """

    def __init__(self) -> None:
        self.cycles = 0.0
        self.calls: collections.Counter[str] = collections.Counter()
        self.arrived: collections.Counter[str] = collections.Counter()
        self.collective_lines: list[str] = []
        self.transfers: collections.Counter[str] = collections.Counter()
        self.received: collections.Counter[str] = collections.Counter()
        self.kernel_elements: collections.Counter[str] = collections.Counter()
        self.other_kernels: collections.Counter[str] = collections.Counter()


def count_instructions(text: str, num_slices: int) -> Counts:
    """Counts what a device does in a compiled program.

    Args:
        text: from `Compiled.as_text`.
        num_slices: number of slices that the program runs on.
    """
    counts = Counts()
    _count_collectives(counts, text)
    types = result_types(text)
    for line, times in compiled_instructions(text):
        counts.cycles += times * estimated_cycles(line)
        _count_transfer(counts, line, times, num_slices)
        _count_kernel(counts, line, times, types)
    return counts


def estimated_cycles(line: str) -> int:
    """The compiler's estimate of an instruction, from `backend_config={"estimated_cycles":"100"}`; 0 without one."""
    estimate = re.search(r'"estimated_cycles":"(\d+)"', line)
    return 0 if estimate is None else int(estimate[1])


def _count_transfer(counts: Counts, line: str, times: int, num_slices: int) -> None:
    """Counts what arrives from other slices."""
    if found := transfer(line, num_slices):
        kind, arriving = found
        counts.transfers[kind] += times
        counts.received[kind] += times * arriving


def transfer(line: str, num_slices: int) -> tuple[str, int] | None:
    """Kind of a transfer between slices and the bytes that a device receives in it; None for another instruction.

    The instruction: %recv = (f32[2,128]{1,0}, u32[], token[]) recv(%after), _xla_megascale_transfer_type="ALL_REDUCE"
    """
    found = re.search(r' = \((.*?), u32\[\].*? recv\(.*_xla_megascale_transfer_type="(\w+)"', line)
    if found is None:
        return None
    kind = found[2].lower().replace("_", "-")
    # In a sum, each slice receives its own part from every other slice, and then the sums of all other parts.
    share = 2 * (num_slices - 1) / num_slices if kind == "all-reduce" else 1
    return kind, round(share * _type_bytes(found[1]))


def _count_kernel(counts: Counts, line: str, times: int, types: Mapping[str, str]) -> None:
    """Counts a call of a Pallas kernel, and the size of the sequence that it works on."""
    if found := kernel_call(line, types):
        name, elements = found
        counts.calls[name] += times
        counts.kernel_elements[name] += times * elements
    elif other := re.search(r'%([A-Za-z_-]+)\S* = .* custom-call\(.*custom_call_target="tpu_custom_call"', line):
        counts.other_kernels[other[1]] += times


def result_types(text: str) -> dict[str, str]:
    """Type of the result of every instruction of a compiled program, by name, such as "bf16[8,128]"."""
    return dict(re.findall(r"%([\w.\-]+) = (\w+\[[\d,]*\])", text))


def kernel_call(line: str, types: Mapping[str, str]) -> tuple[str, int] | None:
    """Which of `KERNELS` an instruction calls, and the number of tokens times channels that it works on; None for none.

    The instruction: %causal_conv1d_pallas_tpu_forward.3 = bf16[2,64,1024]{2,1,0} custom-call(%p), ...

    Args:
        line: any instruction.
        types: from `result_types`.
    """
    found = re.search(rf"%({'|'.join(KERNELS)})[.\w]* = \(?(.*?) custom-call\((.*?)\)", line)
    if found is None:
        return None
    name, result, operands = found.groups()
    shown = [result, *(types.get(operand, "") for operand in re.findall(r"%([\w.\-]+)", operands))]
    # What has three dimensions is a sequence: (batch, length, channels).
    sequence = next(sizes for type_ in shown for sizes in re.findall(r"\[(\d+,\d+,\d+)\]", type_))
    return name, math.prod(int(size) for size in sequence.split(","))


def _count_collectives(counts: Counts, text: str) -> None:
    """Counts the exchanges within a slice, inside of fusions and outside."""
    alone = (("", line, times) for line, times in compiled_instructions(text))
    seen = set()
    for fusion, line, times in itertools.chain(alone, fused_instructions(text)):
        found = collective(line, fusion)
        if found is None:
            continue
        if channel := channel_beside_work(line, fusion):
            if (channel, times) in seen:
                continue
            seen.add((channel, times))
        kind, arriving = found
        counts.calls[kind] += times
        counts.arrived[kind] += times * arriving
        counts.collective_lines.append(line.strip())


def channel_beside_work(line: str, fusion: str) -> str:
    """The channel of a collective that goes on beside other work, which stands in every fusion that it accompanies.

    Args:
        line: instruction of a collective.
        fusion: name of the fusion that it is in. Outside of one, and as the only work of one, a collective stands once,
            its channel may be that of another one, and the result is empty.
    """
    channel = re.search(r"channel_id=(\d+)", line)
    return channel[1] if fusion and channel and not fusion.startswith(_REDUCE_SCATTER) else ""


def collective(line: str, fusion: str = "") -> tuple[str, int] | None:
    """Kind of a collective and the bytes that arrive in it at a device; None for another instruction.

    An instruction: %all-gather.1 = bf16[8,128]{1,0} all-gather(%p), channel_id=5, replica_groups=[2,8]<=[16]

    Args:
        line: any instruction. An exchange in two halves, "-start" and "-done", counts at the second.
        fusion: name of the fusion that it is in, if it is in one.
    """
    found = re.search(rf" = (.*?) ({_COLLECTIVES})(-done)?\(", line)
    if found is None:
        return None
    result, kind, _ = found.groups()
    arriving = _arriving_bytes(kind, result, line)
    if fusion.startswith(_REDUCE_SCATTER):
        # The compiler writes it as a sum and a choice of the device's part. Only the first half of the sum, in which
        # parts are added up, then needs an exchange.
        return "reduce-scatter", round(arriving / 2)
    return kind, arriving


def _type_bytes(result: str) -> int:
    """Bytes of the arrays in a type: 4096 for "(f32[8,64]{1,0}, bf16[1024])"; a truth value takes a byte."""
    return sum(
        (8 if dtype == "pred" else int(bits)) // 8 * math.prod(int(dim) for dim in dims.split(",") if dim)
        for dtype, bits, dims in re.findall(r"([a-z]+(\d*)\w*)\[([\d,]*)\]", result)
    )


def _arriving_bytes(kind: str, result: str, line: str) -> int:
    """Bytes that a device receives in a collective, at least.

    A sum of N bytes is a reduce-scatter and an all-gather, and takes N in each.
    """
    size = _type_bytes(result)
    if kind == "reduce-scatter":
        return size * _group_size(line)
    return 2 * size if kind == "all-reduce" else size


def _group_size(line: str) -> int:
    """How many devices exchange with each other; the compiler writes the groups in one of three ways."""
    # By axes of a mesh: replica_groups=mesh['a'=2,'b'=4] {'b'} are groups of 4.
    if axes := re.search(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", line):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", axes[1]))
        return math.prod(int(sizes[name]) for name in re.findall(r"'(\w+)'", axes[2]))
    # By number and size: replica_groups=[2,8]<=[16] are 2 groups of 8.
    if shape := re.search(r"replica_groups=\[\d+,(\d+)\]", line):
        return int(shape[1])
    # One by one: replica_groups={{0,1},{2,3}} are groups of 2.
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", line)
    return 1 if listed is None else listed[1].count(",") + 1
