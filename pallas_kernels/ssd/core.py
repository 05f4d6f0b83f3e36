r"""The core of state-space duality: linear attention in which the state of a head decays by one factor a token.

    S_t = exp(log_decay_t) S_{t-1} + scale_t v_t k_t^T,    y_t = S_t q_t + D v_t

Backends implement this and its derivatives. What makes Mamba-2 of it, the discretization of A by dt, is pointwise and
differentiated by JAX. Other layers have the same recurrence: RetNet (a constant decay for each head), simple gated
linear attention (a decay from the token, scale 1), the matrix memory of xLSTM (decay and scale from its gates).
"""

import jax.numpy as jnp

from pallas_kernels.common.discretization import step_size
from pallas_kernels.common.dispatch import Backend, Dispatcher
from pallas_kernels.ssd.arguments import DecayingAttentionArguments, SSDArguments, SSDOutput

_HERE, _FUNCTION = "pallas_kernels.ssd", "decaying_attention"
_dispatch = Dispatcher[SSDOutput](
    op="ssd",
    implementations={
        "reference": Backend(f"{_HERE}.reference", _FUNCTION),
        "xla": Backend(f"{_HERE}.xla.op", _FUNCTION),
        "pallas_gpu": Backend(f"{_HERE}.pallas_gpu.op", _FUNCTION),
        "pallas_tpu": Backend(f"{_HERE}.pallas_tpu.op", _FUNCTION),
    },
    platform_order={"gpu": ("pallas_gpu", "xla"), "tpu": ("pallas_tpu", "xla")},
)
IMPLEMENTATIONS = tuple(_dispatch.implementations)


def decaying_attention(arguments: DecayingAttentionArguments, *, implementation: str | None = None) -> SSDOutput:
    """Runs the core.

    Args:
        arguments: see `DecayingAttentionArguments`.
        implementation: a name runs or raises; None takes the platform's best that accepts the arguments.

    Raises:
        ValueError: an unknown name.
        NotImplementedError: the named implementation does not take the arguments.
        ExceptionGroup: no implementation for the platform takes them.
    """
    return _dispatch(arguments, implementation=implementation)


def as_decaying_attention(arguments: SSDArguments) -> DecayingAttentionArguments:
    """The core's arguments: with dt_t the step size, log_decay_t = dt_t A, scale_t = dt_t, v = x, k = B and q = C."""
    dtype = jnp.promote_types(arguments.A.dtype, jnp.float32)
    bias = arguments.dt_bias
    dt_BLH = step_size(
        arguments.dt, None if bias is None else bias.astype(dtype)[None, None], dt_softplus=arguments.dt_softplus
    )
    low, high = arguments.dt_limit
    # Unlike those of `jnp.clip`, these derivatives are 1 on the limits themselves, as in the authors' kernels.
    dt_BLH = jnp.where(dt_BLH < low, low, jnp.where(dt_BLH > high, high, dt_BLH))
    return DecayingAttentionArguments(
        v=arguments.x,
        log_decay=dt_BLH * arguments.A.astype(dtype)[None, None],
        scale=dt_BLH,
        k=arguments.B,
        q=arguments.C,
        D=arguments.D,
        initial_state=arguments.initial_state,
        segment_ids=arguments.segment_ids,
    )
