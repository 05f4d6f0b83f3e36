"""Where the time of a compiled step goes: each instruction's part of the estimate, and what kind of work it is.

An instruction of XLA takes the compiler's cycles, a Pallas kernel those of its static schedule, and the wait for an
exchange is what its bytes need at the speed of the links beyond the work that is done meanwhile.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence

from mamba_jax.chips import Chip
from mamba_jax.pods import hlo

KERNELS, EXCHANGES = "kernels", "exchanges not hidden"

# Of a fusion's operations the first in this list names the work. A product with an activation is a product; a fusion
# that only moves and casts is a copy.
_OPERATIONS = {
    "products": r"convolution|dot",
    "reductions": r"reduce|reduce-window|scatter|select-and-scatter",
    "elementwise": (
        r"abs|add|and|atan2|cbrt|ceil|clamp|compare|cosine|count-leading-zeros|divide|erf|exponential|"
        r"exponential-minus-one|floor|is-finite|log|log-plus-one|logistic|map|maximum|minimum|multiply|negate|not|or|"
        r"popcnt|power|reduce-precision|remainder|rng-bit-generator|round-nearest-(?:afz|even)|rsqrt|select|"
        r"shift-left|shift-right-(?:arithmetic|logical)|sign|sine|sqrt|subtract|tan|tanh|xor"
    ),
    "copies and transposes": (
        r"bitcast|bitcast-convert|broadcast|concatenate|convert|copy|dynamic-slice|dynamic-update-slice|gather|iota|"
        r"pad|reshape|reverse|slice|transpose"
    ),
}
# Scopes of the training step whose work counts by what it is for.
_SCOPES = ("loss", "optimizer")

KINDS = (*_OPERATIONS, *_SCOPES, "other", KERNELS, EXCHANGES)


@dataclasses.dataclass(frozen=True, kw_only=True)
class InstructionTime:
    """What an instruction of a compiled step takes.

    Attributes:
        name: its name in the program.
        kind: kind of work, one of `KINDS`.
        times: how often it runs in a step.
        seconds: its time in a step, all runs together.
        op_name: the operation of JAX that it comes from, with its scopes; empty if the compiler does not say.
    """

    name: str
    kind: str
    times: int
    seconds: float
    op_name: str


def instruction_times(text: str, chip: Chip, num_slices: int) -> list[InstructionTime]:
    """Times of the instructions that take any, in the order in which a device runs them.

    Args:
        text: the compiled program, from `Compiled.as_text`.
        chip: figures of the device, with those of its cores.
        num_slices: number of slices that the program runs on.
    """
    assert chip.cores is not None, "times need the clock of the cores"
    bodies, _ = hlo.computations(text)
    types = hlo.result_types(text)
    waits = _Waits(bodies, chip, num_slices)
    found = []
    for line, times in hlo.compiled_instructions(text):
        parts = {}
        if cycles := hlo.estimated_cycles(line):
            parts[_kind(line, bodies)] = times * cycles / chip.cores.clock_hz
        if call := hlo.kernel_call(line, types):
            name, elements = call
            parts[KERNELS] = times * chip.cores.kernel_seconds({name: elements})
        waits.now += sum(parts.values())
        if wait := waits.at(line, times):
            parts[EXCHANGES] = wait
            waits.now += wait
        for kind, seconds in parts.items():
            op_name = _op_name(line, bodies)
            found.append(InstructionTime(name=_name(line), kind=kind, times=times, seconds=seconds, op_name=op_name))
    return found


def _name(line: str) -> str:
    """Name of an instruction."""
    found = re.search(r"%([\w.\-]+) = ", line)
    assert found is not None, f"an instruction has a name: {line}"
    return found[1]


def _kind(line: str, bodies: Mapping[str, Sequence[str]]) -> str:
    """The kind of work of an instruction of XLA."""
    for scope in _SCOPES:
        if re.search(rf"[/(]{scope}[/)]", _op_name(line, bodies)):
            return scope
    operations = [_operation(line)[0]]
    for name, is_scalar in (_operation(inner) for _, inner in hlo.inside(line, bodies)):
        # A fusion finds its places in memory by scalars, which is no work of its own.
        if not (is_scalar and re.fullmatch(_OPERATIONS["elementwise"], name)):
            operations.append(name)
    named = (kind for kind, names in _OPERATIONS.items() if any(re.fullmatch(names, name) for name in operations))
    return next(named, "other")


def _operation(line: str) -> tuple[str, bool]:
    """Name of an instruction's operation, and whether its result is a scalar."""
    found = re.search(r" = (.*?) ?([a-z][a-z0-9-]*)\(", line)
    return ("", False) if found is None else (found[2], "[]" in found[1])


def _op_name(line: str, bodies: Mapping[str, Sequence[str]]) -> str:
    """The operation of JAX that an instruction comes from; of a fusion without a name that of an instruction in it."""
    lines = (line, *(inner for _, inner in hlo.inside(line, bodies)))
    return next((found[1] for each in lines if (found := re.search(r'op_name="([^"]*)"', each))), "")


class _Waits:
    """How long a device waits for exchanges that go on beside its work, one at a time on each of its two ways out.

    Attributes:
        now: seconds of work and of waiting so far. The turns of a loop count together, in its work and its exchanges.
    """

    def __init__(self, bodies: Mapping[str, Sequence[str]], chip: Chip, num_slices: int) -> None:
        """Before the first instruction; `instruction_times` has the arguments."""
        self.now = 0.0
        self._bodies, self._num_slices = bodies, num_slices
        self._links, self._network = _Way(chip.link_bytes_per_second), _Way(chip.network_bytes_per_second)
        self._begun: dict[str, float] = {}
        self._received: dict[str, int] = {}

    def at(self, line: str, times: int) -> float:
        """Seconds that all runs of an instruction wait for an exchange to end.

        The end of an exchange says of which beginning it is: %all-gather-done = ... all-gather-done(%all-gather-start).
        One whose beginning was not met, as one that another unit of the chip runs, is not hidden.
        """
        if found := hlo.transfer(line, self._num_slices):
            self._begun[_name(line)], self._received[_name(line)] = self.now, found[1]
        elif "-start(" in line:
            self._begun[_name(line)] = self.now
        elif ended := re.search(r" recv-done\(%([\w.\-]+)\)", line):
            return self._end(self._network, ended[1], times * self._received.pop(ended[1], 0))
        elif found := hlo.collective(line):
            ended = re.search(r"-done\(%([\w.\-]+)", line)
            return self._end(self._links, "" if ended is None else ended[1], times * found[1])
        else:
            return self._in_fusion(line, times)
        return 0.0

    def _in_fusion(self, line: str, times: int) -> float:
        """Like `at`, for exchanges in fusions: the only work of one, or beside the work of several up to the last."""
        fused = list(hlo.inside(line, self._bodies))
        is_last = any("AsyncCollectiveDone" in inner for _, inner in fused)
        waited = 0.0
        for fusion, inner in fused:
            if found := hlo.collective(inner, fusion):
                channel = hlo.channel_beside_work(inner, fusion)
                if channel and not is_last:
                    self._begun.setdefault(channel, self.now)
                else:
                    waited = max(waited, self._end(self._links, channel, times * found[1]))
        return waited

    def _end(self, way: "_Way", exchange: str, size: int) -> float:
        """Seconds from now until the bytes of an exchange have arrived that was begun, or begins now."""
        end = way.carry(size, self._begun.pop(exchange, self.now))
        return max(0.0, end - self.now)


class _Way:
    """The links or the network, which carry one exchange after the other."""

    def __init__(self, bytes_per_second: float | None) -> None:
        self._bytes_per_second = bytes_per_second
        self._free = 0.0

    def carry(self, size: int, begin: float) -> float:
        """When an exchange ends that may begin at a time, in seconds."""
        if size:
            assert self._bytes_per_second is not None, "an exchange needs the speed of its way"
            self._free = max(begin, self._free) + size / self._bytes_per_second
        return self._free
