"""Mamba-1: the selective state space layer (arXiv 2312.00752)."""
