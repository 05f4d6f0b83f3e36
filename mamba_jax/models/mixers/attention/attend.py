"""The attention itself, by whichever implementation suits the platform."""

import dataclasses
import typing

import jax
from jaxtyping import Float, Int

from pallas_kernels.common.dispatch import Backend, Dispatcher

_BACKENDS = "mamba_jax.models.mixers.attention.backends"


# Not checked at construction, as backends are also called with shapes alone.
@typing.no_type_check
@dataclasses.dataclass(frozen=True, kw_only=True)
class Attended:
    """What an implementation is given.

    Attributes:
        q: queries, (B, L, H, P).
        k: keys, (B, S, K, P); head h of the queries reads head h // (H / K).
        v: values, (B, S, K, P).
        positions: tokens before each query in its document, (B, L); None is a document a row, from the first key on.
        first: index among the keys of the first query's own token; None is 0, with as many keys as queries.
        window: tokens that a query attends to, its own included; None is no limit.
        scale: factor on q . k.
    """

    q: Float[jax.Array, "B L H P"]
    k: Float[jax.Array, "B S K P"]
    v: Float[jax.Array, "B S K P"]
    positions: Int[jax.Array, "B L"] | None
    first: Int[jax.Array, ""] | int | None
    window: int | None
    scale: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttendOptions:
    """How a mixer attends, whatever the tokens.

    Attributes:
        scale: factor on q . k.
        window: tokens that a query attends to, its own included; None is no limit.
        implementation: "cudnn", "tokamax", "splash" or "xla", which runs or raises; None takes the first of the
            platform's order that can take the arguments.
    """

    scale: float
    window: int | None = None
    implementation: str | None = None


_dispatch: Dispatcher[jax.Array] = Dispatcher(
    op="attention",
    implementations={name: Backend(f"{_BACKENDS}.{name}", "attend") for name in ("cudnn", "tokamax", "splash", "xla")},
    platform_order={"gpu": ("cudnn", "tokamax", "xla"), "tpu": ("splash", "xla")},
)


def attend(
    q: Float[jax.Array, "B L H P"],
    k: Float[jax.Array, "B S K P"],
    v: Float[jax.Array, "B S K P"],
    positions: Int[jax.Array, "B L"] | None = None,
    *,
    first: Int[jax.Array, ""] | int | None = None,
    options: AttendOptions,
) -> Float[jax.Array, "B L H P"]:
    r"""Causal attention of queries to the keys of their own document.

        y_i = sum_j softmax_j(scale q_i . k_j) v_j,  over j with 0 <= first + i - j <= min(position_i, window - 1)

    Args:
        q: queries of consecutive tokens.
        k: keys of consecutive tokens, those of the queries among them.
        v: values of the same tokens.
        positions: tokens before each query in its document; None is a document a row, from the first key on.
        first: index among the keys of the first query's own token; None is 0, with as many keys as queries.
        options: scale, window and backend.

    Returns:
        y, in the dtype of q; the softmax is computed in float32.

    Raises:
        ValueError: there is no implementation of that name.
        NotImplementedError: the named implementation cannot take the arguments.
        ExceptionGroup: no implementation of the platform can.

    Source: arXiv 1706.03762, equation 1.
    """
    arguments = Attended(q=q, k=k, v=v, positions=positions, first=first, window=options.window, scale=options.scale)
    return _dispatch(arguments, implementation=options.implementation)
