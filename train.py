"""Trains a model: python train.py configs/mamba_130m.py --train.num-steps 100.

With --compile-only --topology v5p:8x8x8 it compiles the training step for TPUs that need not be there, and reports.
"""

import sys

from mamba_jax.cli import load_config, one_line_errors
from mamba_jax.errors import InputError

USAGE = "usage: python train.py CONFIG [--compile-only --topology v5e:4x4] [--field value ...]"


def main() -> None:
    with one_line_errors():
        if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
            raise InputError(USAGE)
        path, overrides = sys.argv[1], sys.argv[2:]
        if "--compile-only" in overrides:
            compile_only(path, overrides)
            return
        config = load_config(path, overrides)
        from mamba_jax.training.loop import train

        result = train(config)
    if result.validation is not None and result.is_complete:
        print(f"{result.validation.bits_per_byte:.4f} bits per byte on held-out text; see {config.train.run_dir}")


def compile_only(path: str, overrides: list[str]) -> None:
    """Prints what the compiler says about the training step on the pod of --topology."""
    overrides.remove("--compile-only")
    if "--topology" not in overrides or overrides[-1] == "--topology":
        raise InputError(f"--compile-only needs --topology, such as --topology v5e:4x4; {USAGE}")
    place = overrides.index("--topology")
    topology = overrides[place + 1]
    config = load_config(path, overrides[:place] + overrides[place + 2 :])
    import jax

    jax.config.update("jax_platforms", "cpu")
    from mamba_jax.training.pod_compile import compile_step

    print("\n".join(compile_step(config, topology).lines()))


if __name__ == "__main__":
    main()
