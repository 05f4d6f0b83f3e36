"""Runs small enough to train in a test."""

from tests.runs import corpus, make_config, shared_step

__all__ = ["corpus", "make_config", "shared_step"]
