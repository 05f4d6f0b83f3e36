"""Flash attention of cuDNN, through JAX: rows of one document each."""

from typing import TYPE_CHECKING

import jax

from pallas_kernels.common.devices import target_platform

if TYPE_CHECKING:
    from mamba_jax.models.mixers.attention.attend import Attended

# In half the precision, with these most channels of a head and a multiple of eight of them.
_DTYPES = ("bfloat16", "float16")
_MOST_CHANNELS = 128


def attend(arguments: "Attended") -> jax.Array:
    """See `attend`.

    Raises:
        NotImplementedError: no GPU, packed documents or a part of a sequence, another dtype than bfloat16 and float16,
            more than 128 channels a head or no multiple of 8, or no cuDNN.
    """
    q, window = arguments.q, arguments.window
    if (platform := target_platform()) != "gpu":
        raise NotImplementedError(f"attention: 'cudnn' runs on GPUs only, not on {platform}; use 'xla'")
    if arguments.positions is not None or arguments.first is not None:
        raise NotImplementedError(
            "attention: 'cudnn' takes one document a row from its first token on; use 'tokamax' or 'xla' for packed "
            "documents, states and sequences that are split over devices"
        )
    if q.dtype.name not in _DTYPES:
        raise NotImplementedError(f"attention: 'cudnn' takes {' and '.join(_DTYPES)}, got {q.dtype}; use 'xla'")
    if q.shape[-1] > _MOST_CHANNELS or q.shape[-1] % 8:
        raise NotImplementedError(
            f"attention: 'cudnn' takes heads of 8, 16, ... {_MOST_CHANNELS} channels, got {q.shape[-1]}; use 'xla'"
        )
    try:
        return jax.nn.dot_product_attention(
            q,
            arguments.k,
            arguments.v,
            scale=arguments.scale,
            is_causal=True,
            local_window_size=None if window is None else (window - 1, 0),
            implementation="cudnn",
        )
    except RuntimeError as error:
        raise NotImplementedError(f"attention: 'cudnn' cannot run here: {error}; use 'xla'") from error
