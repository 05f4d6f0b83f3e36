"""Time by kernel of what a program runs on a GPU, from a trace of JAX's profiler."""

import collections
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax


def time_by_kernel(call: Callable[[], Any]) -> dict[str, tuple[int, float]]:
    """Launches, and microseconds of all of them together, of one call; by the kernel's name, the longest first."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(call())
        path = next(Path(folder).glob("**/*.xplane.pb"))
        profile = jax.profiler.ProfileData.from_file(str(path))
        found: dict[str, list[float]] = collections.defaultdict(list)
        for plane in profile.planes:
            for line in plane.lines if plane.name.startswith("/device:GPU") else ():
                for event in line.events if line.name.startswith("Stream") else ():
                    found[event.name].append(event.duration_ns / 1e3)
    times = {name: (len(durations), sum(durations)) for name, durations in found.items()}
    return dict(sorted(times.items(), key=lambda entry: -entry[1][1]))
