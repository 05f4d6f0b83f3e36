"""Implementations of the attention itself, all of the same arguments; see `attend`."""
