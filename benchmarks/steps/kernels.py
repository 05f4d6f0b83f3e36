"""What the kernels of a training step on a GPU do, by their names in a trace."""

import re
from collections.abc import Iterator, Mapping

# The first class whose pattern a name contains. Kernels of ours have the names of their modules, XLA's fusions those of
# the operations that they end with, and what is left are the kernels of cuBLAS.
_CLASSES = {
    "recurrence, backward": r"pallas_gpu_backward|ssd_walk_back|ssd_gradients|selective_scan.*backward",
    "recurrence, forward": r"pallas_gpu_|ssd_walk|selective_scan",
    "convolution": r"causal_conv1d",
    "optimizer": r"loop_select_fusion|select_concatenate|loop_.*select_.*fusion",
    "copies": r"[Mm]emcpy|[Mm]emset|copy|slice|concatenate|transpose|broadcast|pad|scatter|gather",
    "reductions": r"reduce",
    "elementwise": r"fusion|wrapped_|convert",
}


def class_of(kernel: str) -> str:
    """The class of a kernel by its name."""
    return next((name for name, pattern in _CLASSES.items() if re.search(pattern, kernel)), "matrix products")


def by_class(kernels: Mapping[str, tuple[int, float]]) -> dict[str, tuple[int, float]]:
    """Launches and microseconds of each class, the longest first, from those of each kernel."""
    found: dict[str, tuple[int, float]] = {}
    for kernel, (launches, time) in kernels.items():
        before = found.get(class_of(kernel), (0, 0.0))
        found[class_of(kernel)] = before[0] + launches, before[1] + time
    return dict(sorted(found.items(), key=lambda entry: -entry[1][1]))


def rows(kernels: Mapping[str, tuple[int, float]], *, longest: int = 12) -> Iterator[tuple[str, str, dict[str, float]]]:
    """Of all classes, and then of the longest kernels: what they are, the name, and its figures."""
    busy = sum(time for _, time in kernels.values())
    single = dict(list(kernels.items())[:longest])
    for heading, times in (("classes of kernels", by_class(kernels)), ("longest kernels", single)):
        for name, (launches, time) in times.items():
            yield heading, name, {"milliseconds": time / 1e3, "share_%": 100 * time / busy, "launches": launches}
