"""One token of a whole residual block, norm and residual sum included, by one operation."""

import functools
from typing import Any

import pallas_kernels
from mamba_jax.models.layers import RMSNorm, read
from mamba_jax.models.mixers.mamba1.state import Mamba1State
from mamba_jax.models.mixers.mixer import BlockInput, BlockOutput
from mamba_jax.models.mixers.one_token import matrix_of, reads_one_token
from pallas_kernels.common.devices import target_platform


def step_whole(mixer: Any, given: BlockInput, norm: RMSNorm, state: Mamba1State | None) -> BlockOutput | None:
    """The block's output for one token; None if its layers have to do it one by one.

    The operation serves generation on one GPU, and mixers without the options of ablations.

    Args:
        mixer: a `Mamba1`.
        given: what the block has.
        norm: the block's norm.
        state: from the call on the tokens before.
    """
    if state is None or not _applies(mixer, given):
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


def _applies(mixer: Any, given: BlockInput) -> bool:
    """Whether the operation computes what the mixer does, and is asked for or faster."""
    config = mixer.config
    is_plain = (
        config.use_conv
        and config.use_conv_bias
        and config.use_gate
        and not config.use_bias
        and len(config.selective) == 3
        and config.selection_norm_eps is None
        and config.discretization == "euler"
    )
    rows, _, width = given.residual.shape
    pays = target_platform() == "gpu" and pallas_kernels.mamba1_step_pays(rows, width)
    is_wanted = pays if config.step_implementation is None else config.step_implementation != "layers"
    return is_plain and is_wanted and reads_one_token(given, mixer.in_proj)


def _weights(mixer: Any, norm: RMSNorm) -> pallas_kernels.Mamba1Weights:
    """The parameters of mixer and norm as the operation takes them."""
    matrix = functools.partial(matrix_of, dtype=mixer.setting.compute_dtype)
    return pallas_kernels.Mamba1Weights(
        norm_scale=read(norm.scale) + norm.offset,
        in_proj=matrix(mixer.in_proj),
        conv_weight=read(mixer.conv1d.weight),
        conv_bias=read(mixer.conv1d.bias),
        x_proj=matrix(mixer.x_proj),
        dt_proj=matrix(mixer.dt_proj),
        dt_bias=read(mixer.dt_proj.bias),
        A_log=read(mixer.A_log),
        D=read(mixer.D),
        out_proj=matrix(mixer.out_proj),
    )
