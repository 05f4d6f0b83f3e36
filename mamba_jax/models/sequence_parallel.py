r"""Convolution and scan of sequences whose length is split over devices; called inside `per_shard`.

A shard of the length is a run of tokens, in order. The convolution needs the K - 1 inputs before its first one, which
the shard before sends. The recurrence is linear and diagonal, so a shard turns the state that enters it into

    h_out = S + keep exp(A s) h_in,    s = sum_t dt_t

S is what its own tokens leave behind, and keep is 0 if a document starts inside it, else 1. S is a sum over tokens, not
a recurrence. A prefix of the triples (keep, s, S) over the shards, in log2(P) exchanges between P of them, gives each
the state that enters it, and one scan from there gives the output. Only s is sent, never the decays exp(A s), which are
N times as many. The backward pass is the same in the other direction: what a shard's outputs make the cotangent of the
state that enters is a sum too, a prefix from the last shard gives each the cotangent of the state that leaves it, and
one backward scan from there gives every gradient.

State-space duality is the same with log_decay in place of A dt: one decay for each head of a matrix of states.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from mamba_jax.sharding import Axis, from_last, from_shard, parts, shard_count, shard_number
from pallas_kernels import (
    ConvOutput,
    DecayingAttentionArguments,
    ScanArguments,
    ScanOutput,
    SSDArguments,
    SSDOutput,
    as_decaying_attention,
    causal_conv1d,
    decaying_attention,
    selective_scan,
    selective_scan_final_state,
    selective_scan_initial_cotangent,
    ssd_final_state,
    ssd_initial_cotangent,
)
from pallas_kernels.common.array_types import Size
from pallas_kernels.common.derivatives import differentiable_op
from pallas_kernels.common.discretization import step_size

Decay = Callable[[jax.Array], jax.Array]


def is_split(length: Size, *, past: int) -> bool:
    """Whether sequences are split over the devices of the current mesh; if not, each device computes them whole.

    Args:
        length: L, number of tokens in the sequence.
        past: K - 1, number of inputs before a token that the convolution reads. A part must hold at least that many,
            because they are all sent by the shard before.
    """
    count = parts(Axis.LENGTH, length)
    return count > 1 and length // count >= past


def convolve(
    *,
    x: Float[jax.Array, "B L E"],
    weight: Float[jax.Array, "K E"],
    bias: Float[jax.Array, " E"] | None,
    initial_window: Float[jax.Array, "B W E"] | None,
    segment_ids: Int[jax.Array, "B L"] | None,
    **options: Any,
) -> ConvOutput:
    """`causal_conv1d` of this shard's tokens, with the inputs before them from the shard before.

    Args:
        x: this shard's inputs, (B, L, E).
        weight: (K, E) taps.
        bias: (E,), or None.
        initial_window: the last K - 1 inputs before the whole sequence, (B, K - 1, E); None is zero.
        segment_ids: document of each token of the shard, (B, L), or None.
        **options: further arguments of `causal_conv1d`.

    Returns:
        Output of the shard, and the window after the last shard, on every device.
    """
    window = halo(x, initial_window, segment_ids, past=weight.shape[0] - 1)
    output = causal_conv1d(x, weight, bias, initial_window=window, segment_ids=segment_ids, **options)
    return ConvOutput(y=output.y, final_window=from_last(output.final_window, Axis.LENGTH))


def scan(*, implementation: str | None = None, **given: Any) -> ScanOutput:
    """`selective_scan` of this shard's tokens, from the state that the shards before leave.

    Args:
        implementation: see `selective_scan`.
        **given: arguments of `selective_scan`: those with a length hold this shard's tokens, `initial_state` is that
            before the whole sequence.

    Returns:
        Output of the shard, and the state after the last shard, on every device.
    """
    output = _scan(implementation, ScanArguments.of(**given))
    return ScanOutput(y=output.y, final_state=from_last(output.final_state, Axis.LENGTH))


def _scan_outputs(implementation: str | None, arguments: ScanArguments) -> ScanOutput:
    """Output of the shard and the state after it."""
    return _scan_forward(implementation, arguments)[0]


def _scan_forward(implementation: str | None, arguments: ScanArguments) -> tuple[ScanOutput, Any]:
    """The output of the shard and the state after it, and what the backward pass needs: the scan's vjp and s."""
    options = {
        "discretization": arguments.discretization,
        "dt_softplus": arguments.dt_softplus,
        "implementation": implementation,
    }
    operands, integers = arguments.operands()
    arrays = operands.arrays()
    left_behind = selective_scan_final_state(
        **{name: arrays[name] for name in ("x", "dt", "A", "B", "dt_bias") if name in arrays}, **integers, **options
    )
    s_BE = elapsed(arrays["dt"], arrays.get("dt_bias"), dt_softplus=arguments.dt_softplus)
    decay = _decay(arguments.A)
    entering = entering_state(left_behind, s_BE, arguments.segment_ids, arguments.initial_state, decay=decay)

    def scan_shard(arrays: dict[str, jax.Array]) -> ScanOutput:
        return selective_scan(**arrays, **integers, **options)

    output, scan_vjp = jax.vjp(scan_shard, arrays | {"initial_state": entering})
    return output, (scan_vjp, s_BE)


def _scan_backward(
    implementation: str | None, arguments: ScanArguments, kept: Any, cotangents: ScanOutput
) -> dict[str, jax.Array]:
    """Gradients of the arguments from this shard; the initial state gets its gradient from the first shard only."""
    scan_vjp, s_BE = kept
    operands, integers = arguments.operands()
    arrays = operands.arrays()
    from_outputs = selective_scan_initial_cotangent(
        cotangents.y,
        **{name: arrays[name] for name in ("dt", "A", "C", "z", "dt_bias") if name in arrays},
        **integers,
        dt_softplus=arguments.dt_softplus,
        implementation=implementation,
    )
    decay = _decay(arguments.A)
    dleaving = leaving_cotangent(from_outputs, s_BE, arguments.segment_ids, cotangents.final_state, decay=decay)
    (gradients,) = scan_vjp(ScanOutput(y=cotangents.y, final_state=dleaving))
    gradients["initial_state"] = jnp.where(shard_number(Axis.LENGTH) == 0, gradients["initial_state"], 0)
    return gradients


_scan = differentiable_op(_scan_outputs, forward=_scan_forward, backward=_scan_backward)


def attend(*, implementation: str | None = None, **given: Any) -> SSDOutput:
    """`ssd` of this shard's tokens, from the state that the shards before leave.

    Args:
        implementation: of `ssd`.
        **given: arguments of `ssd`: those with a length hold this shard's tokens, `initial_state` is that before the
            whole sequence.

    Returns:
        Output of the shard, and the state after the last shard, on every device.
    """
    output = _attend(implementation, as_decaying_attention(SSDArguments.of(**given)))
    return SSDOutput(y=output.y, final_state=from_last(output.final_state, Axis.LENGTH))


def _attend_outputs(implementation: str | None, arguments: DecayingAttentionArguments) -> SSDOutput:
    """Output of the shard and the state after it."""
    return _attend_forward(implementation, arguments)[0]


def _attend_forward(implementation: str | None, arguments: DecayingAttentionArguments) -> tuple[SSDOutput, Any]:
    """The output of the shard and the state after it, and the function that the backward pass calls."""
    operands, integers = arguments.operands()
    entering = entering_state(
        ssd_final_state(arguments),
        jnp.sum(arguments.log_decay, axis=1),
        arguments.segment_ids,
        arguments.initial_state,
        decay=_decay_of_heads,
    )

    def attend_shard(operands: DecayingAttentionArguments) -> SSDOutput:
        return decaying_attention(dataclasses.replace(operands, **integers), implementation=implementation)

    return jax.vjp(attend_shard, dataclasses.replace(operands, initial_state=entering))


def _attend_backward(
    implementation: str | None, arguments: DecayingAttentionArguments, attend_vjp: Any, cotangents: SSDOutput
) -> dict[str, jax.Array]:
    """Gradients of the arguments from this shard; the initial state gets its gradient from the first shard only."""
    dleaving = leaving_cotangent(
        ssd_initial_cotangent(cotangents.y, arguments),
        jnp.sum(arguments.log_decay, axis=1),
        arguments.segment_ids,
        cotangents.final_state,
        decay=_decay_of_heads,
    )
    gradients = attend_vjp(SSDOutput(y=cotangents.y, final_state=dleaving))[0].arrays()
    gradients["initial_state"] = jnp.where(shard_number(Axis.LENGTH) == 0, gradients["initial_state"], 0)
    return gradients


_attend = differentiable_op(_attend_outputs, forward=_attend_forward, backward=_attend_backward)


def _decay_of_heads(s_BH: jax.Array) -> jax.Array:
    return jnp.exp(s_BH)[:, :, None, None]


def _decay(A_EN: jax.Array) -> Decay:
    return lambda s_BE: jnp.exp(s_BE[:, :, None] * A_EN[None])


def elapsed(
    dt: Float[jax.Array, "B L C"], dt_bias: Float[jax.Array, " C"] | None, *, dt_softplus: bool
) -> Float[jax.Array, "B C"]:
    """Sum of the shard's step sizes, s = sum_t step_t, (B, C), in float32 or more; see the module.

    Args:
        dt: (B, L, C) step size before bias and softplus, of C channels or heads.
        dt_bias: (C,) bias; None is none.
        dt_softplus: the step is softplus(dt + dt_bias), not dt + dt_bias.
    """
    bias = None if dt_bias is None else dt_bias[None, None]
    return jnp.sum(step_size(dt, bias, dt_softplus=dt_softplus), axis=1)


def halo(
    x: Float[jax.Array, "B L E"],
    window: Float[jax.Array, "B W E"] | None,
    segment_ids: Int[jax.Array, "B L"] | None,
    *,
    past: int,
) -> Float[jax.Array, "B W E"]:
    """The inputs before this shard's first token that belong to its document, and zeros in place of others.

    Args:
        x: this shard's inputs, (B, L, E), with L >= past.
        window: those before the whole sequence, (B, past, E); None is zero.
        segment_ids: document of each token of the shard, (B, L), or None.
        past: K - 1, how many.
    """
    batch, length, channels = x.shape
    if window is None:
        window = jnp.zeros((batch, past, channels), x.dtype)
    if past == 0:
        return window
    last = x[:, length - past :]
    if segment_ids is not None:
        # A document is a run of equal ids: if an id appears again after another one, that is a new document.
        is_end_BW = segment_ids[:, length - past : -1] != segment_ids[:, length - past + 1 :]
        ends_BW = jnp.cumsum(is_end_BW[:, ::-1], axis=1)[:, ::-1]
        last = jnp.where(jnp.pad(ends_BW, ((0, 0), (0, 1)))[:, :, None] == 0, last, 0)
    received = from_shard(last, Axis.LENGTH, before=1)
    if segment_ids is not None:
        received = jnp.where(starts_document(segment_ids)[:, None, None], 0, received)
    return jnp.where(shard_number(Axis.LENGTH) == 0, window.astype(x.dtype), received)


def starts_document(segment_ids: Int[jax.Array, "B L"]) -> Bool[jax.Array, " B"]:
    """Rows whose first token in this shard is of another document than the last token of the shard before.

    Args:
        segment_ids: document of each token of the shard, (B, L).
    """
    before_B = from_shard(segment_ids[:, -1], Axis.LENGTH, before=1)
    return (shard_number(Axis.LENGTH) > 0) & (before_B != segment_ids[:, 0])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class _Span:
    """What a run of shards does to the state that enters it (S, s and the resets of the module's equation).

    All zeros leave a state unchanged: that is what `from_shard` gives where there is no shard to receive from.
    """

    left_behind: jax.Array
    elapsed: jax.Array
    resets: jax.Array | None


def entering_state(
    left_behind: Float[jax.Array, "B C *state"],
    elapsed: Float[jax.Array, "B C"],
    segment_ids: Int[jax.Array, "B L"] | None,
    initial_state: Float[jax.Array, "B C *state"] | None,
    *,
    decay: Decay,
) -> Float[jax.Array, "B C *state"]:
    """The state before this shard's first token.

    Args:
        left_behind: S, the state after this shard's tokens from zero before them, float32: (B, E, N) of a selective
            scan (C is E channels), (B, H, P, N) of state-space duality (C is H heads).
        elapsed: s, (B, C), float32, the sum over the shard's tokens of the step sizes, or of log_decay for state-space
            duality.
        segment_ids: document of each token of the shard, (B, L), or None.
        initial_state: the state before the whole sequence; None is zero.
        decay: from s to the factor by which a state is multiplied, exp(A s), or exp(s) for state-space duality, shaped
            to multiply a state.

    Returns:
        The state, zero in rows where a document starts at the shard's first token.
    """
    starts_B, resets_B = _resets(segment_ids)
    own = _Span(left_behind=left_behind, elapsed=elapsed, resets=_either(starts_B, resets_B))
    before = _all_beyond(own, decay, direction=1)
    state = before.left_behind
    if initial_state is not None:
        state += _kept(decay(before.elapsed) * initial_state.astype(state.dtype), before.resets)
    return _kept(state, starts_B)


def leaving_cotangent(
    from_outputs: Float[jax.Array, "B C *state"],
    elapsed: Float[jax.Array, "B C"],
    segment_ids: Int[jax.Array, "B L"] | None,
    dfinal_state: Float[jax.Array, "B C *state"],
    *,
    decay: Decay,
) -> Float[jax.Array, "B C *state"]:
    """The cotangent of the state after this shard's last token.

    Args:
        from_outputs: what the cotangents of the shard's outputs make that of the state before its first token, float32,
            shaped like a state: (B, E, N) of a selective scan (C is E channels), (B, H, P, N) of state-space duality (C
            is H heads).
        elapsed: s, (B, C), float32, the sum over the shard's tokens of the step sizes, or of log_decay for state-space
            duality.
        segment_ids: document of each token of the shard, (B, L), or None.
        dfinal_state: cotangent of the state after this shard, but for what later shards make of it.
        decay: from s to the factor by which a state is multiplied, exp(A s), or exp(s) for state-space duality, shaped
            to multiply a state.

    Returns:
        The cotangent, shaped like a state.
    """
    starts_B, resets_B = _resets(segment_ids)
    passed = from_outputs + _kept(decay(elapsed) * dfinal_state.astype(from_outputs.dtype), resets_B)
    own = _Span(left_behind=_kept(passed, starts_B), elapsed=elapsed, resets=_either(starts_B, resets_B))
    return dfinal_state + _all_beyond(own, decay, direction=-1).left_behind.astype(dfinal_state.dtype)


def _all_beyond(own: _Span, decay: Decay, *, direction: int) -> _Span:
    r"""What all shards before this one (direction 1), or all after it (-1), do together.

        (S, s, keep) of two runs, the one that a state goes through first and the second:
        S = S_2 + keep_2 exp(A s_2) S_1,    s = s_1 + s_2,    keep = keep_1 keep_2

    Each round doubles the number of shards that are accounted for: after k, they are the 2^k - 1 next to this one.

    Source: the exclusive form of the prefix of Hillis and Steele, doi:10.1145/7902.7903.
    """

    def after(first: _Span, second: _Span) -> _Span:
        return _Span(
            left_behind=second.left_behind + _kept(decay(second.elapsed) * first.left_behind, second.resets),
            elapsed=first.elapsed + second.elapsed,
            resets=_either(first.resets, second.resets),
        )

    beyond = jax.tree.map(jnp.zeros_like, own)
    distance = 1
    while distance < shard_count(Axis.LENGTH):
        run = own if distance == 1 else after(beyond, own)
        beyond = after(from_shard(run, Axis.LENGTH, before=direction * distance), beyond)
        distance *= 2
    return beyond


def _resets(segment_ids: jax.Array | None) -> tuple[jax.Array | None, jax.Array | None]:
    """Rows where a document starts at this shard's first token, and where one starts after it."""
    if segment_ids is None:
        return None, None
    return starts_document(segment_ids), jnp.any(segment_ids[:, 1:] != segment_ids[:, :-1], axis=1)


def _either(first_B: jax.Array | None, second_B: jax.Array | None) -> jax.Array | None:
    return None if first_B is None or second_B is None else first_B | second_B


def _kept(state: jax.Array, resets_B: jax.Array | None) -> jax.Array:
    """Zeros in the rows that are reset."""
    if resets_B is None:
        return state
    return jnp.where(resets_B.reshape(-1, *(1,) * (state.ndim - 1)), 0, state)
