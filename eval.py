"""Evaluates a checkpoint: python eval.py runs/quickstart --prompt "The President"."""

from mamba_jax.commands.evaluate import main

if __name__ == "__main__":
    main()
