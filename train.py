"""Trains a model: python train.py configs/mamba_130m.py --train.num-steps 100."""

import sys

from mamba_jax.cli import load_config, one_line_errors
from mamba_jax.errors import InputError


def main() -> None:
    with one_line_errors():
        if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
            raise InputError("usage: python train.py CONFIG [--field value ...]")
        config = load_config(sys.argv[1], sys.argv[2:])
        from mamba_jax.training.loop import train

        result = train(config)
    if result.validation is not None and result.is_complete:
        print(f"{result.validation.bits_per_byte:.4f} bits per byte on held-out text; see {config.train.run_dir}")


if __name__ == "__main__":
    main()
