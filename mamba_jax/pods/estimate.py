"""Estimate of a training step from its compiled program: memory, exchanges, and a roofline of its time.

    busy    = XLA's operations by the compiler's cycles + kernels by their static schedules
    links   = bytes that arrive over the links within a slice / their speed
    network = bytes that arrive from other slices / a device's share of the network
    max(busy, links, network) <= step <= busy + links + network

The lower end hides every exchange behind the work, the upper end none. Model FLOPs utilisation is at most
model operations / (peak * lower end).
"""

import dataclasses

from mamba_jax.chips import CHIPS, GIB
from mamba_jax.pods.breakdown import KINDS, InstructionTime

MIB = 2**20

Exchanges = dict[str, tuple[int, int]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepEstimate:
    """What the compiler says about a training step; bytes, operations and seconds are those of one device.

    Attributes:
        devices: number of devices.
        num_slices: number of slices that they form.
        device_kind: JAX's name of the kind of device.
        memory: bytes by kind of use; "temporaries" are what the step needs besides its arguments and results.
        reused: bytes of results that take the memory of arguments.
        collectives: within a slice by kind, how often in a step, and the bytes that arrive at a device.
        collective_lines: the instructions, for a closer look.
        between_slices: like `collectives`, for exchanges over the data-centre network.
        kernels: how often a step calls each Pallas kernel.
        flops: floating-point operations of the model, see `flops_per_token`.
        operation_seconds: time of XLA's operations, by the compiler's estimate of cycles; None if the clock is unknown.
        kernel_seconds: time of the Pallas kernels, by their static schedules; None if one of them has none for this
            device, as those of attention.
        times: where this time goes, by instruction, with the waits for exchanges; None where a part of it is unknown.
    """

    devices: int
    num_slices: int
    device_kind: str
    memory: dict[str, int]
    reused: int
    collectives: Exchanges
    collective_lines: tuple[str, ...]
    between_slices: Exchanges
    kernels: dict[str, int]
    flops: float
    operation_seconds: float | None
    kernel_seconds: float | None
    times: tuple[InstructionTime, ...] | None = None

    @property
    def total_memory(self) -> int:
        return sum(self.memory.values())

    @property
    def capacity(self) -> int | None:
        """Bytes of a device; None if the kind is not known."""
        chip = CHIPS.get(self.device_kind)
        return None if chip is None else chip.memory

    @property
    def matmul_seconds(self) -> float:
        """Model operations at the device's peak; 0 if that is not known."""
        chip = CHIPS.get(self.device_kind)
        return 0.0 if chip is None else self.flops / chip.peak_flops

    @property
    def link_seconds(self) -> float | None:
        """The bytes of `collectives` at the speed of the links."""
        chip = CHIPS.get(self.device_kind)
        return None if chip is None else _seconds(self.collectives, chip.link_bytes_per_second)

    @property
    def network_seconds(self) -> float | None:
        """The bytes of `between_slices` at a device's share of its host's network."""
        chip = CHIPS.get(self.device_kind)
        return None if chip is None else _seconds(self.between_slices, chip.network_bytes_per_second)

    @property
    def expected_seconds(self) -> tuple[float, float] | None:
        """Least and most time of a step by the roofline of this module; None where a figure of it is missing."""
        parts = self.operation_seconds, self.kernel_seconds, self.link_seconds, self.network_seconds
        if any(part is None for part in parts):
            return None
        operations, kernels, links, network = (part or 0.0 for part in parts)
        busy = operations + kernels
        return max(busy, links, network), busy + links + network

    @property
    def seconds_by_kind(self) -> dict[str, float] | None:
        """Time of a step by kind of work, in the order of `KINDS`: XLA's operations, kernels and waits for exchanges.

        Its sum is the time of operations and kernels and, as far as the program does not hide it, that of exchanges.
        """
        if self.times is None:
            return None
        seconds = dict.fromkeys(KINDS, 0.0)
        for part in self.times:
            seconds[part.kind] += part.seconds
        return seconds

    def lines(self, *, largest: int = 0) -> list[str]:
        """The estimate, for a terminal.

        Args:
            largest: how many of the instructions that take most time to list.
        """
        slices = f" in {self.num_slices} slices" if self.num_slices > 1 else ""
        lines = [f"{self.devices} devices of kind {self.device_kind}{slices}", "memory of a device:"]
        lines += [f"  {kind:<16}{size / GIB:9.3f} GiB" for kind, size in self.memory.items()]
        capacity = "" if self.capacity is None else f" of {self.capacity / GIB:.0f} GiB"
        lines += [f"  {'total':<16}{self.total_memory / GIB:9.3f} GiB{capacity}", "exchanged in a step, by a device:"]
        lines += _exchange_lines(self.collectives)
        if self.num_slices > 1:
            lines += ["between slices:", *_exchange_lines(self.between_slices)]
        lines += ["kernels in a step:", *(f"  {name:<36}{count:6d} calls" for name, count in self.kernels.items())]
        return lines + self._time_lines() + self._breakdown_lines(largest)

    def _time_lines(self) -> list[str]:
        """Report lines on the time of a step: of each kind of work alone, and the expected total if it is known."""
        lines = [
            f"model operations of a step: {self.flops * self.devices:.3e}, of a device {self.flops:.3e}, "
            f"at the peak {_milliseconds(self.matmul_seconds)}",
            f"time of a step: XLA's operations by the compiler's estimate {_milliseconds(self.operation_seconds)}, "
            f"kernels by their schedules {_milliseconds(self.kernel_seconds)},",
            f"  exchange at the speed of the links {_milliseconds(self.link_seconds)}"
            + (f", between slices {_milliseconds(self.network_seconds)}" if self.num_slices > 1 else ""),
        ]
        if self.expected_seconds is not None:
            least, most = self.expected_seconds
            lines += [
                f"  expected between {1e3 * least:.1f} and {1e3 * most:.1f} ms,",
                f"  model FLOPs utilisation at most {self.matmul_seconds / least:.1%}",
            ]
        return lines

    def _breakdown_lines(self, largest: int) -> list[str]:
        """Report lines on where the time goes, by kind of work and by instruction; none where it is unknown."""
        seconds, parts = self.seconds_by_kind, self.times
        if seconds is None or parts is None:
            return []
        total = sum(seconds.values())
        rows = [*seconds.items(), ("total", total)]
        lines = ["where the time goes:"]
        lines += [f"  {kind:<24}{1e3 * part:9.2f} ms {part / total:6.1%}" for kind, part in rows]
        if largest:
            lines.append("instructions that take most of it:")
            for part in sorted(parts, key=lambda part: -part.seconds)[:largest]:
                lines.append(f"  {1e3 * part.seconds:9.2f} ms {part.kind:<22} {part.times:4d} times {part.name}")
                lines += [f"{'':15}{part.op_name}"] * bool(part.op_name)
        return lines


def _milliseconds(seconds: float | None) -> str:
    return "unknown" if seconds is None else f"{1e3 * seconds:.1f} ms"


def _seconds(exchanges: Exchanges, bytes_per_second: float | None) -> float | None:
    arrived = sum(size for _, size in exchanges.values())
    if not arrived:
        return 0.0
    return None if bytes_per_second is None else arrived / bytes_per_second


def _exchange_lines(exchanges: Exchanges) -> list[str]:
    lines = [f"  {kind:<20}{count:6d} times {size / MIB:10.1f} MiB" for kind, (count, size) in exchanges.items()]
    return lines or ["  nothing"]
