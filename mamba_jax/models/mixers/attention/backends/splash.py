"""Flash attention of JAX for TPUs: whole sequences, packed documents too."""

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention

from pallas_kernels.common.devices import target_platform

if TYPE_CHECKING:
    from mamba_jax.models.mixers.attention.attend import Attended

# Sides of the blocks of scores, the largest that divides a sequence.
_SIDES = (512, 256, 128)


def attend(arguments: "Attended") -> jax.Array:
    """See `attend`; on a CPU the kernel is interpreted, which is slow.

    Raises:
        NotImplementedError: a GPU, a part of a sequence, or a length that is not a multiple of 128.
    """
    q, length = arguments.q, arguments.q.shape[1]
    if (platform := target_platform()) not in ("tpu", "cpu"):
        raise NotImplementedError(f"attention: 'splash' runs on TPUs only, not on {platform}; use 'xla'")
    if arguments.first is not None:
        raise NotImplementedError(
            "attention: 'splash' takes whole sequences; use 'xla' for states and sequences that are split over devices"
        )
    side = next((side for side in _SIDES if length % side == 0), None)
    if side is None:
        raise NotImplementedError(
            f"attention: 'splash' takes multiples of {_SIDES[-1]} tokens, got {length}; use 'xla'"
        )
    kernel = _kernel(q.shape[2], length, arguments.window, side, interpret=platform == "cpu")
    # The kernel has no factor on its products.
    scaled = (q.astype(jnp.float32) * arguments.scale).astype(q.dtype)
    heads_first = [jnp.swapaxes(x, 1, 2) for x in (scaled, arguments.k, arguments.v)]
    if arguments.positions is None:
        return jnp.swapaxes(jax.vmap(kernel)(*heads_first), 1, 2)
    # The index of its first token names a document.
    ids_BL = jnp.arange(length, dtype=jnp.int32)[None] - arguments.positions
    segments = splash_attention.SegmentIds(q=ids_BL, kv=ids_BL)
    return jnp.swapaxes(jax.vmap(kernel)(*heads_first, segments), 1, 2)


def _kernel(heads: int, length: int, window: int | None, side: int, *, interpret: bool) -> Any:
    """Attention of one row, heads before tokens; head h of the queries reads the one of the keys that `attend` says."""
    shape = (length, length)
    if window is None:
        mask = splash_attention.CausalMask(shape)
    else:
        mask = splash_attention.LocalMask(shape, window_size=(window - 1, 0), offset=0)
    sizes = splash_attention.BlockSizes(
        block_q=side, block_kv=side, block_q_dkv=side, block_kv_dkv=side, block_q_dq=side, block_kv_dq=side
    )
    return splash_attention.make_splash_mha_single_device(
        splash_attention.MultiHeadMask([mask] * heads), block_sizes=sizes, interpret=interpret
    )
