"""Causal attention: rotary positions, grouped queries, a sliding window, and a cache of keys and values."""
