"""How held-out loss is measured."""

import dataclasses

from mamba_jax.config_base import Config, require


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationConfig(Config):
    """Perplexity on the validation source.

    Attributes:
        every: steps between evaluations during training; 0 evaluates only after the last step.
        max_batches: batches of an evaluation during training; None reads the whole split.
        batch_size: sequences of an evaluation batch; None takes `data.global_batch`.
    """

    every: int = 0
    max_batches: int | None = None
    batch_size: int | None = None

    def _check(self) -> None:
        require(self.every >= 0, f"EvaluationConfig.every must not be negative, got {self.every}")
        self._require_positive("max_batches", "batch_size")
