"""Figures of TPUs: published ones of each device, and the cycles that our kernels take on its cores."""

import dataclasses
from collections.abc import Mapping

GIB = 2**30

KERNELS = (
    "selective_scan_pallas_tpu_forward",
    "selective_scan_pallas_tpu_backward",
    "causal_conv1d_pallas_tpu_forward",
    "causal_conv1d_pallas_tpu_backward",
    "selective_scan_pallas_tpu_edge",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """Published figures of one device of a kind.

    Attributes:
        memory: size of the device's memory, in bytes.
        link_bytes_per_second: speed of the links to all neighbours together, in one direction.
        network_bytes_per_second: speed of the network to other slices, in one direction; None if not published.
    """

    memory: int
    link_bytes_per_second: float
    network_bytes_per_second: float | None


# Google's Cloud TPU documentation, pages of v4, v5e, v6e and TPU7x. It gives links both ways, the network of v5e for
# 256 chips (6.4 Tb/s), and links, network and memory of TPU7x for a chip, which is two devices.
CHIPS = {
    "TPU v4": Chip(memory=32 * GIB, link_bytes_per_second=300e9, network_bytes_per_second=None),
    "TPU v5 lite": Chip(memory=16 * GIB, link_bytes_per_second=200e9, network_bytes_per_second=25e9 / 8),
    "TPU v5": Chip(memory=95 * GIB, link_bytes_per_second=600e9, network_bytes_per_second=50e9 / 8),
    "TPU v6 lite": Chip(memory=32 * GIB, link_bytes_per_second=400e9, network_bytes_per_second=100e9 / 8),
    "TPU7x": Chip(memory=96 * GIB, link_bytes_per_second=300e9, network_bytes_per_second=50e9 / 8),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cores:
    """Figures of a device's cores, from which the time of its work is estimated.

    Attributes:
        clock_hz: clock of a core.
        number: number of cores that share the device's work.
        kernel_cycles: by kernel, the cycles that a core takes for one token of 1024 channels, from the committed static
            schedules.
    """

    clock_hz: float
    number: int
    kernel_cycles: dict[str, float]

    def kernel_seconds(self, elements: Mapping[str, int]) -> float:
        """Time of kernels in seconds; `elements` is the number of tokens times channels that each works on, by name."""
        cycles = sum(self.kernel_cycles[name] * count / 1024 for name, count in elements.items())
        return cycles / self.number / self.clock_hz


# Cycles: benchmarks/results/tpu_static_2026-11-24.md, and for the state at an edge the mean of both directions in
# tpu_static_edge_states_2026-11-24.md. The clocks of newer kinds are not published.
CORES = {
    "TPU v4": Cores(
        clock_hz=1.05e9,
        number=2,
        kernel_cycles={
            "selective_scan_pallas_tpu_forward": 152.9,
            "selective_scan_pallas_tpu_backward": 456.6,
            "selective_scan_pallas_tpu_edge": 80.5,
            "causal_conv1d_pallas_tpu_forward": 13.5,
            "causal_conv1d_pallas_tpu_backward": 30.1,
        },
    ),
    "TPU v5 lite": Cores(
        clock_hz=1.5e9,
        number=1,
        kernel_cycles={
            "selective_scan_pallas_tpu_forward": 47.5,
            "selective_scan_pallas_tpu_backward": 140.8,
            "selective_scan_pallas_tpu_edge": 33.2,
            "causal_conv1d_pallas_tpu_forward": 8.1,
            "causal_conv1d_pallas_tpu_backward": 17.3,
        },
    ),
    "TPU v5": Cores(
        clock_hz=1.75e9,
        number=2,
        kernel_cycles={
            "selective_scan_pallas_tpu_forward": 48.0,
            "selective_scan_pallas_tpu_backward": 143.0,
            "selective_scan_pallas_tpu_edge": 34.7,
            "causal_conv1d_pallas_tpu_forward": 8.2,
            "causal_conv1d_pallas_tpu_backward": 17.8,
        },
    ),
}
