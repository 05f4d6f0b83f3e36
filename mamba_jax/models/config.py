"""What a language model is made of."""

import dataclasses
from typing import Literal

from mamba_jax.config_base import Config, require
from mamba_jax.models.mixers.mamba1.config import Mamba1Config

DType = Literal["float32", "bfloat16", "float16"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig(Config):
    """A language model: embedding, `num_layers` pre-norm residual blocks, final RMSNorm, head.

    Attributes:
        vocab_size: V, token ids are 0 .. V - 1.
        d_model: D, width of the residual stream.
        num_layers: number of blocks.
        mixer: the sequence mixer of every block.
        vocab_multiple: embedding rows are padded up to a multiple of this; padded ids are never sampled.
        tie_embeddings: the head shares the embedding's weights.
        norm_eps: epsilon of every RMSNorm.
        embedding_std: standard deviation of the embedding's normal initialiser.
        rescale_residual: divide the output projections' initial weights by sqrt(num_layers).
        param_dtype: dtype parameters are stored and updated in.
        compute_dtype: dtype of matrix products and activations; the residual stream, the recurrent state, A, dt, norm
            statistics and the loss stay float32 whatever this says.
        remat: what the backward pass recomputes: "none" keeps all activations, "block" keeps only the residual stream
            between blocks, "dots" also keeps the results of matrix products.
    """

    vocab_size: int
    d_model: int
    num_layers: int
    mixer: Mamba1Config = Mamba1Config()
    vocab_multiple: int = 8
    tie_embeddings: bool = True
    norm_eps: float = 1e-5
    embedding_std: float = 0.02
    rescale_residual: bool = True
    param_dtype: DType = "float32"
    compute_dtype: DType = "bfloat16"
    remat: Literal["none", "block", "dots"] = "block"

    def _check(self) -> None:
        self._require_positive("vocab_size", "d_model", "num_layers", "vocab_multiple", "norm_eps", "embedding_std")
        require(
            self.padded_vocab_size < 2**31, f"ModelConfig.vocab_size must stay below 2**31 ids, got {self.vocab_size}"
        )

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding: `vocab_size` rounded up to a multiple of `vocab_multiple`."""
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

    @property
    def d_inner(self) -> int:
        """E, channels inside the mixer."""
        return self.mixer.expand * self.d_model

    @property
    def dt_rank(self) -> int:
        """R, rank of the dt projection."""
        return self.mixer.dt_rank if self.mixer.dt_rank is not None else -(-self.d_model // 16)
