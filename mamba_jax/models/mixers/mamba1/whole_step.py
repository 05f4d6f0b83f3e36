"""One token of a whole residual block, norm and residual sum included, by one operation."""

from typing import Any

import pallas_kernels
from mamba_jax.models.layers import RMSNorm, read
from mamba_jax.models.mixers.mamba1.state import Mamba1State
from mamba_jax.models.mixers.mixer import BlockInput, BlockOutput
from mamba_jax.models.mixers.one_token import is_one_operation, matrices_of


def step_whole(mixer: Any, given: BlockInput, norm: RMSNorm, state: Mamba1State | None) -> BlockOutput | None:
    """The block's output for one token; None if its layers have to do it one by one.

    The operation serves generation on one GPU, and mixers without the options of ablations.

    Args:
        mixer: a `Mamba1`.
        given: what the block has.
        norm: the block's norm.
        state: from the call on the tokens before.
    """
    if state is None or not is_one_operation(mixer.config, given):
        return None
    output = pallas_kernels.mamba1_step(
        given.residual[:, 0],
        state.conv_window,
        state.ssm,
        _weights(mixer, norm),
        eps=norm.eps,
        implementation=mixer.config.step_implementation,
    )
    after = Mamba1State(conv_window=output.window, ssm=output.state)
    return BlockOutput(residual=output.residual[:, None], state=after)


def _weights(mixer: Any, norm: RMSNorm) -> pallas_kernels.Mamba1Weights:
    """The parameters of mixer and norm as the operation takes them."""
    names = ("in_proj", "x_proj", "dt_proj", "out_proj")
    return pallas_kernels.Mamba1Weights(
        norm_scale=read(norm.scale) + norm.offset,
        **matrices_of(mixer, *names, dtype=mixer.setting.compute_dtype),
        conv_weight=read(mixer.conv1d.weight),
        conv_bias=read(mixer.conv1d.bias),
        dt_bias=read(mixer.dt_proj.bias),
        A_log=read(mixer.A_log),
        D=read(mixer.D),
    )
