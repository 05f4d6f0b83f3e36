"""A run to read."""

from tests.evaluation.conftest import saved_run

__all__ = ["saved_run"]
