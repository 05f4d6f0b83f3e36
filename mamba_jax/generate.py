"""Continues prompts: python -m mamba_jax.generate runs/quickstart --prompt "The President"; without one it asks.

To be run and not to be imported: `mamba_jax.generate` is a function.
"""

from mamba_jax.commands.generate import main

if __name__ == "__main__":
    main()
