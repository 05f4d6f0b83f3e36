"""A training run as one HTML page that needs no network: `python -m mamba_jax.report RUN_DIR`."""
