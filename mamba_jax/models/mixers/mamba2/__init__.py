"""Mamba-2: the state-space duality layer (arXiv 2405.21060)."""
