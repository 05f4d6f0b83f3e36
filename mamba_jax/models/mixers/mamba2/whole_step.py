"""One token of a whole residual block, norm and residual sum included, by one operation."""

from typing import Any

import pallas_kernels
from mamba_jax.models.layers import RMSNorm, read
from mamba_jax.models.mixers.mamba2.state import Mamba2Ring, Mamba2State
from mamba_jax.models.mixers.mixer import BlockInput, BlockOutput
from mamba_jax.models.mixers.one_token import is_one_operation, matrices_of


def step_whole(mixer: Any, given: BlockInput, norm: RMSNorm, state: Mamba2State | None) -> BlockOutput | None:
    """The block's output for one token; None if its layers have to do it one by one.

    The operation serves generation on one device, and mixers without the options that few models have.

    Args:
        mixer: a `Mamba2`.
        given: what the block has.
        norm: of the block.
        state: from the call on the tokens before.
    """
    config = mixer.config
    if state is None or config.gated_channels(mixer.setting.d_model) or not is_one_operation(config, given):
        return None
    before = pallas_kernels.Mamba2Carry(
        residual=given.residual[:, 0],
        window=state.conv_window,
        BC_window=state.BC_window,
        state=state.ssm,
        **({} if state.ring is None else state.ring.named()),
    )
    output = pallas_kernels.mamba2_step(
        before,
        _weights(mixer, norm),
        eps=norm.eps,
        gated_norm_eps=config.norm_eps,
        group_size=config.group_size(mixer.setting.d_model),
        dt_limit=config.dt_limit,
        implementation=config.step_implementation,
    )
    after = Mamba2State(conv_window=output.window, BC_window=output.BC_window, ssm=output.state, ring=_ring(output))
    return BlockOutput(residual=output.residual[:, None], state=after)


def _ring(output: pallas_kernels.Mamba2Carry) -> Mamba2Ring | None:
    """The ring that the operation leaves, if there is one."""
    if output.ring_x is None:
        return None
    arrays: Any = {name: getattr(output, f"ring_{name}") for name in ("x", "B", "dt", "length")}
    return Mamba2Ring(**arrays)


def _weights(mixer: Any, norm: RMSNorm) -> pallas_kernels.Mamba2Weights:
    """The parameters of mixer and norm as the operation takes them."""
    names = ("in_proj", "BC_proj", "dt_proj", "out_proj")
    return pallas_kernels.Mamba2Weights(
        norm_scale=read(norm.scale) + norm.offset,
        **matrices_of(mixer, *names, dtype=mixer.setting.compute_dtype),
        conv_weight=read(mixer.conv1d.weight),
        conv_bias=read(mixer.conv1d.bias),
        BC_conv_weight=read(mixer.BC_conv1d.weight),
        BC_conv_bias=read(mixer.BC_conv1d.bias),
        dt_bias=read(mixer.dt_bias),
        A_log=read(mixer.A_log),
        D=read(mixer.D),
        gated_norm_scale=read(mixer.norm.scale),
    )
