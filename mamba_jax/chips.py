"""Figures of accelerators: what vendors publish of a device, and how long our kernels take on its cores."""

import dataclasses
from collections.abc import Mapping

GIB = 2**30


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """Figures of one device of a kind; None stands for what is not published, or not needed here.

    Attributes:
        peak_flops: dense bfloat16 operations a second.
        memory: size of the device's memory, in bytes.
        memory_bytes_per_second: speed of that memory.
        link_bytes_per_second: speed of the links to all neighbours together, in one direction.
        network_bytes_per_second: speed of the network to other slices, in one direction.
        cores: for the time of kernels; the clocks of newer kinds are not published.
    """

    peak_flops: float
    memory: int | None = None
    memory_bytes_per_second: float | None = None
    link_bytes_per_second: float | None = None
    network_bytes_per_second: float | None = None
    cores: Cores | None = None


# By the device kind that JAX reports. From NVIDIA's data sheets, and from the pages of v4, v5e, v5p, v6e and TPU7x of
# Google's Cloud TPU documentation. These give links both ways, the network of v5e for 256 chips (6.4 Tb/s), and peak,
# links, network and memory of TPU7x for a chip, which is two devices. Cycles of kernels are those of
# benchmarks/results/tpu_static_2026-11-24.md, and for the state at an edge the mean of both directions in
# tpu_static_edge_states_2026-11-24.md; of state-space duality, tpu_static_ssd_2026-11-26.md and, for v4,
# tpu_static_ssd_v4_2026-11-26.md, whose heads have 64 channels and 128 states.
CHIPS = {
    "NVIDIA A100-SXM4-40GB": Chip(peak_flops=312e12, memory_bytes_per_second=1555e9),
    "NVIDIA A100-SXM4-80GB": Chip(peak_flops=312e12, memory_bytes_per_second=2039e9),
    "NVIDIA A100 80GB PCIe": Chip(peak_flops=312e12),
    "NVIDIA H100 80GB HBM3": Chip(peak_flops=989e12, memory_bytes_per_second=3352e9),
    "NVIDIA H100 PCIe": Chip(peak_flops=756e12),
    "NVIDIA H200": Chip(peak_flops=989e12, memory_bytes_per_second=4800e9),
    "TPU v4": Chip(
        peak_flops=275e12,
        memory=32 * GIB,
        memory_bytes_per_second=1228e9,
        link_bytes_per_second=300e9,
        cores=Cores(
            clock_hz=1.05e9,
            number=2,
            kernel_cycles={
                "selective_scan_pallas_tpu_forward": 152.9,
                "selective_scan_pallas_tpu_backward": 456.6,
                "selective_scan_pallas_tpu_edge": 80.5,
                "causal_conv1d_pallas_tpu_forward": 13.5,
                "causal_conv1d_pallas_tpu_backward": 30.1,
                "ssd_pallas_tpu_forward": 29.2,
                "ssd_pallas_tpu_backward": 60.8,
            },
        ),
    ),
    "TPU v5 lite": Chip(
        peak_flops=197e12,
        memory=16 * GIB,
        memory_bytes_per_second=819e9,
        link_bytes_per_second=200e9,
        network_bytes_per_second=25e9 / 8,
        cores=Cores(
            clock_hz=1.5e9,
            number=1,
            kernel_cycles={
                "selective_scan_pallas_tpu_forward": 47.5,
                "selective_scan_pallas_tpu_backward": 140.8,
                "selective_scan_pallas_tpu_edge": 33.2,
                "causal_conv1d_pallas_tpu_forward": 8.1,
                "causal_conv1d_pallas_tpu_backward": 17.3,
                "ssd_pallas_tpu_forward": 14.3,
                "ssd_pallas_tpu_backward": 34.1,
            },
        ),
    ),
    "TPU v5": Chip(
        peak_flops=459e12,
        memory=95 * GIB,
        memory_bytes_per_second=2765e9,
        link_bytes_per_second=600e9,
        network_bytes_per_second=50e9 / 8,
        cores=Cores(
            clock_hz=1.75e9,
            number=2,
            kernel_cycles={
                "selective_scan_pallas_tpu_forward": 48.0,
                "selective_scan_pallas_tpu_backward": 143.0,
                "selective_scan_pallas_tpu_edge": 34.7,
                "causal_conv1d_pallas_tpu_forward": 8.2,
                "causal_conv1d_pallas_tpu_backward": 17.8,
                "ssd_pallas_tpu_forward": 15.0,
                "ssd_pallas_tpu_backward": 35.4,
            },
        ),
    ),
    "TPU v6 lite": Chip(
        peak_flops=918e12,
        memory=32 * GIB,
        link_bytes_per_second=400e9,
        network_bytes_per_second=100e9 / 8,
    ),
    "TPU7x": Chip(
        peak_flops=1153.5e12,
        memory=96 * GIB,
        link_bytes_per_second=300e9,
        network_bytes_per_second=50e9 / 8,
    ),
}
