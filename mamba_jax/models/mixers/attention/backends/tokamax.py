"""Flash attention of tokamax for Hopper and Blackwell GPUs: packed documents, and parts of sequences."""

import importlib
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from pallas_kernels.common.devices import target_platform

if TYPE_CHECKING:
    from mamba_jax.models.mixers.attention.attend import Attended

_DTYPES = ("bfloat16", "float16")


def attend(arguments: "Attended") -> jax.Array:
    """See `attend`: every query sees a range of keys, and blocks outside of all ranges are left out.

    Raises:
        NotImplementedError: no GPU, another dtype than bfloat16 and float16, tokamax is not installed, or it cannot run
            on this GPU.
    """
    if (platform := target_platform()) != "gpu":
        raise NotImplementedError(f"attention: 'tokamax' runs on GPUs only, not on {platform}; use 'xla'")
    if arguments.q.dtype.name not in _DTYPES:
        raise NotImplementedError(
            f"attention: 'tokamax' takes {' and '.join(_DTYPES)}, got {arguments.q.dtype}; use 'xla'"
        )
    # Its public function has no way to say ranges of keys.
    try:
        base = importlib.import_module("tokamax._src.ops.attention.base")
        kernels = importlib.import_module("tokamax._src.ops.attention.pallas_mosaic_gpu")
    except ImportError as error:
        raise NotImplementedError(
            f"attention: tokamax cannot be imported ({error}): install mamba-jax[tokamax], or use 'xla'"
        ) from error
    mask = base.Mask(**{name: bound[:, None] for name, bound in key_range(arguments).items()})
    run = kernels.PallasMosaicGpuFlashAttention()
    return run(arguments.q, arguments.k, arguments.v, logits_scale=arguments.scale, mask=mask)


def key_range(arguments: "Attended") -> dict[str, jax.Array]:
    """The first key that each query sees, `k_start`, and the one after the last, `k_end`; each (B, L) or (1, L)."""
    first = 0 if arguments.first is None else arguments.first
    own = first + jnp.arange(arguments.q.shape[1], dtype=jnp.int32)[None]
    reach = own if arguments.positions is None else arguments.positions
    if arguments.window is not None:
        reach = jnp.minimum(reach, arguments.window - 1)
    return {"k_start": own - reach, "k_end": own + 1}
