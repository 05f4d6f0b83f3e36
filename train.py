"""Trains a model: python train.py configs/mamba_130m.py --train.num-steps 100.

With --compile-only --topology v5p:8x8x8 it compiles the training step for TPUs that need not be there, and reports.
"""

import sys

from mamba_jax.cli import load_config, one_line_errors, print_result
from mamba_jax.errors import InputError

USAGE = "usage: python train.py CONFIG [--compile-only --topology v5e:4x4 [--num-slices 2]] [--field value ...]"


def main() -> None:
    with one_line_errors():
        if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
            raise InputError(USAGE)
        path, overrides = sys.argv[1], sys.argv[2:]
        if "--compile-only" in overrides:
            return compile_only(path, overrides)
        is_distributed = "--distributed" in overrides
        config = load_config(path, [flag for flag in overrides if flag != "--distributed"])
        from mamba_jax.distributed import initialize
        from mamba_jax.training.loop import train

        initialize(detect=is_distributed)
        result = train(config)
    if result.stop_signal is not None:
        raise SystemExit(128 + result.stop_signal)


def compile_only(path: str, overrides: list[str]) -> None:
    """Prints what the compiler says about the training step on the pod of --topology and --num-slices."""
    overrides.remove("--compile-only")
    topology, num_slices = take(overrides, "--topology"), take(overrides, "--num-slices") or "1"
    if topology is None:
        raise InputError(f"--compile-only needs --topology, such as --topology v5e:4x4; {USAGE}")
    if not num_slices.isdecimal():
        raise InputError(f"--num-slices {num_slices} is not a whole number from 1 on")
    config = load_config(path, overrides)
    import jax

    jax.config.update("jax_platforms", "cpu")
    from mamba_jax.training.pod_compile import compile_step

    print_result("\n".join(compile_step(config, topology, num_slices=int(num_slices)).lines()))


def take(overrides: list[str], flag: str) -> str | None:
    """Removes a flag and its value from the overrides and returns the value; None if either is missing."""
    if flag not in overrides[:-1]:
        return None
    place = overrides.index(flag)
    return [overrides.pop(place) for _ in range(2)][1]


if __name__ == "__main__":
    main()
