"""The core of state-space duality as Pallas kernels for TPUs: the arguments brought into the kernels' shape.

The kernels keep the states of all heads of a strip on the chip while they walk through the sequence. The forward kernel
writes the state before every chunk when a gradient will be needed, and the backward kernel starts from there.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.common.array_types import Arrays
from pallas_kernels.common.checks import decline_off_tpu, decline_symbolic_sizes
from pallas_kernels.common.derivatives import differentiable_op, no_forward_mode
from pallas_kernels.common.devices import target_device_kind, target_platform
from pallas_kernels.common.partitioning import result_type
from pallas_kernels.common.segments import segment_starts
from pallas_kernels.ssd.arguments import DecayingAttentionArguments, SSDOutput
from pallas_kernels.ssd.pallas_tpu import backward, forward
from pallas_kernels.ssd.pallas_tpu.decays import chunk_vectors, decay_gradient, documents
from pallas_kernels.ssd.pallas_tpu.geometry import Generation, Geometry, choose_geometry, generation
from pallas_kernels.ssd.pallas_tpu.layout import (
    channels,
    keys,
    packed_state,
    packed_vectors,
    padded,
    public_channels,
    public_keys,
    public_state,
    public_values,
    public_vectors,
    unchunked,
    values,
)

INTERPRETER = pltpu.InterpretParams()
_MOST_STATES = 256
_KINDS = {
    "v": "values",
    "y": "values",
    "dy": "values",
    "dv": "values",
    "k": "keys",
    "q": "keys",
    "dk": "dkeys",
    "dq": "dkeys",
    "vectors": "vectors",
    "dvectors": "dvectors",
    "documents": "documents",
    "D": "channels",
    "dD": "rows",
    "initial_state": "state",
    "final_state": "state",
    "dfinal_state": "state",
    "dinitial_state": "state",
    "checkpoints": "checkpoints",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Options:
    """How a call runs."""

    geometry: Geometry
    vmem_bytes: int
    interpreted: bool


# Kernels by name in profiles.
_KERNELS = {"forward": forward, "backward": backward}


def decaying_attention(arguments: DecayingAttentionArguments, *, chip: Generation | None = None) -> SSDOutput:
    """See `pallas_kernels.ssd.core`; on a CPU the kernels are interpreted, which is slow.

    Operands of products are rounded to bfloat16 if v, k and q are all of that dtype.

    Args:
        arguments: of the core.
        chip: replaces what the table says of the device.

    Raises:
        NotImplementedError: the target is not a TPU or several without `jax.shard_map`, a size is a symbol, N is over
            256, or v, k or q is neither float32 nor bfloat16.
    """
    op, name = arguments.op, "pallas_tpu"
    decline_off_tpu(op)
    decline_symbolic_sizes(op, name, arguments.v, arguments.k)
    given = {"x": arguments.v, "B": arguments.k, "C": arguments.q}
    for argument, array in given.items():
        if array.dtype not in (jnp.float32, jnp.bfloat16):
            raise NotImplementedError(f"{op}: {name!r} takes float32 and bfloat16, {argument} has {array.dtype}")
    if (states := arguments.k.shape[3]) > _MOST_STATES:
        raise NotImplementedError(f"{op}: {name!r} takes at most {_MOST_STATES} states, got {states}")
    chip = chip or generation(target_device_kind())
    batch, length, heads, width = arguments.v.shape
    geometry = choose_geometry(
        chip,
        batch=batch,
        length=length,
        heads=heads,
        groups=arguments.k.shape[2],
        width=width,
        states=states,
        packed=arguments.segment_ids is not None,
        exact=any(array.dtype == jnp.float32 for array in given.values()),
    )
    options = _Options(geometry=geometry, vmem_bytes=chip.vmem_bytes, interpreted=target_platform() == "cpu")
    return _attend(options, arguments)


def _outputs(options: _Options, arguments: DecayingAttentionArguments) -> SSDOutput:
    """The result without the states that only a backward pass would read."""
    return _run_forward(options, arguments, checkpoints=False)[0]


def _forward(options: _Options, arguments: DecayingAttentionArguments) -> tuple[SSDOutput, jax.Array | None]:
    """The result, and the state before every chunk for the backward kernel, in the dtype of operands of products.

    Its shape is (B, chunks, strips, blocks, N, lanes of a block).
    """
    return _run_forward(options, arguments, checkpoints=True)


def _run_forward(
    options: _Options, arguments: DecayingAttentionArguments, *, checkpoints: bool
) -> tuple[SSDOutput, jax.Array | None]:
    """The result, and the states of the kernel's shape."""
    geometry = options.geometry
    inputs = _prepare(geometry, arguments)
    if arguments.initial_state is not None:
        inputs["initial_state"] = packed_state(geometry, arguments.initial_state)
    dtypes = {"y": arguments.v.dtype, "final_state": jnp.dtype(jnp.float32)}
    if checkpoints:
        dtypes["checkpoints"] = geometry.dtype
    results = _call(options, "forward", inputs, dtypes)
    y = public_values(geometry, results["y"], arguments.v)
    final_state = public_state(geometry, results["final_state"], _state_shape(arguments))
    return SSDOutput(y=y, final_state=final_state), results.get("checkpoints")


def _backward(
    options: _Options, arguments: DecayingAttentionArguments, checkpoints: jax.Array, cotangents: SSDOutput
) -> Arrays:
    """Gradients of the arguments by name: one kernel goes through the chunks from the last to the first."""
    geometry = options.geometry
    inputs = _prepare(geometry, arguments) | {
        "dy": values(geometry, cotangents.y),
        "checkpoints": checkpoints,
        "dfinal_state": packed_state(geometry, cotangents.final_state),
    }
    length, heads, width = arguments.v.shape[1:]
    shared = geometry.strips_per_group == 1
    dtypes = {"dv": arguments.v.dtype}
    dtypes |= {f"d{name}": getattr(arguments, name).dtype if shared else jnp.dtype(jnp.float32) for name in ("k", "q")}
    dtypes |= dict.fromkeys(("dvectors", "dinitial_state"), jnp.dtype(jnp.float32))
    if arguments.D is not None:
        dtypes["dD"] = jnp.dtype(jnp.float32)
    results = _call(options, "backward", inputs, dtypes)
    dvectors = public_vectors(geometry, results["dvectors"], heads=heads)
    gradients = {
        "v": public_values(geometry, results["dv"], arguments.v),
        "log_decay": unchunked(decay_gradient(dvectors), length),
        "scale": unchunked(dvectors["scale"], length),
        "initial_state": public_state(geometry, results["dinitial_state"], _state_shape(arguments)),
    }
    gradients |= {name: public_keys(geometry, results[f"d{name}"], getattr(arguments, name)) for name in ("k", "q")}
    if arguments.D is not None:
        dD = public_channels(geometry, results["dD"].sum(axis=(0, 3)).reshape(-1), heads=heads, width=width)
        gradients["D"] = dD if arguments.D.ndim == 2 else dD.sum(axis=1)
    return gradients


def _state_shape(arguments: DecayingAttentionArguments) -> tuple[int, ...]:
    """(B, H, P, N)."""
    batch, _, heads, width = arguments.v.shape
    return batch, heads, width, arguments.k.shape[3]


_attend = differentiable_op(
    _outputs, forward=_forward, backward=_backward, tangent=no_forward_mode("ssd", "pallas_tpu")
)


def _call(options: _Options, name: str, inputs: Arrays, dtypes: Mapping[str, jnp.dtype]) -> Arrays:
    """Runs a kernel; `dtypes` names the outputs."""
    geometry, kernel = options.geometry, _KERNELS[name]
    scratch = kernel.scratch_shapes(geometry)
    names = [*inputs, *dtypes, *scratch]

    def body(*refs):
        kernel.kernel(geometry, dict(zip(names, refs, strict=True)))

    def specs(names):
        return [geometry.spec(_KINDS[name], is_reversed=kernel.IS_REVERSED) for name in names]

    results = pl.pallas_call(
        body,
        grid=geometry.grid,
        in_specs=specs(inputs),
        out_specs=specs(dtypes),
        out_shape=[result_type(inputs["v"], geometry.shape(_KINDS[name]), dtype) for name, dtype in dtypes.items()],
        scratch_shapes=[pltpu.VMEM(shape, dtype) for shape, dtype in scratch.values()],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=options.vmem_bytes,
        ),
        interpret=INTERPRETER if options.interpreted else False,
        name=f"ssd_pallas_tpu_{name}",
    )(*inputs.values())
    return dict(zip(dtypes, results, strict=True))


def _starts(geometry: Geometry, arguments: DecayingAttentionArguments) -> jax.Array | None:
    """Whether a document starts at a token, padded; None unless documents are packed."""
    return None if arguments.segment_ids is None else padded(segment_starts(arguments.segment_ids))


def _prepare(geometry: Geometry, arguments: DecayingAttentionArguments) -> Arrays:
    """The inputs of both kernels; tokens that do not exist leave the state as it is: no decay and no share."""
    inputs = {"v": values(geometry, arguments.v)}
    inputs |= {name: keys(geometry, getattr(arguments, name)) for name in ("k", "q")}
    starts = _starts(geometry, arguments)
    log_decay, scale = (padded(getattr(arguments, name).astype(jnp.float32)) for name in ("log_decay", "scale"))
    inputs["vectors"] = packed_vectors(geometry, chunk_vectors(geometry, log_decay, scale, starts))
    if starts is not None:
        number = documents(geometry, starts).astype(jnp.float32)
        inputs["documents"] = number.reshape(geometry.shape("documents"))
    if arguments.D is not None:
        heads, width = arguments.v.shape[2:]
        D = jnp.broadcast_to(arguments.D.astype(jnp.float32).reshape(heads, -1), (heads, width))
        inputs["D"] = channels(geometry, D).reshape(geometry.shape("channels"))
    return inputs
