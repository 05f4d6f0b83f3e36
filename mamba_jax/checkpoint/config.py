"""When training state is saved."""

import dataclasses

from mamba_jax.config_base import Config


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig(Config):
    """When training state is saved.

    Attributes:
        every: steps between checkpoints; the last step is always saved.
        keep: newest checkpoints that are kept.
    """

    every: int = 1000
    keep: int = 3

    def _check(self) -> None:
        self._require_positive("every", "keep")
