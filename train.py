"""Trains a model: python train.py configs/mamba_130m.py --train.num-steps 100; --help explains the rest."""

from mamba_jax.commands.train import main

if __name__ == "__main__":
    main()
