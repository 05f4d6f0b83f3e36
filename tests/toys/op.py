"""An op that the library does not know: an exponential moving average of every channel, in two implementations."""

import jax
import jax.numpy as jnp

import pallas_kernels
from pallas_kernels.common.arguments import Arguments, OpTable, arguments, array, result
from pallas_kernels.common.array_types import Leaf
from pallas_kernels.common.dispatch import Dispatcher
from pallas_kernels.common.partitioning import on_own_part
from pallas_kernels.common.segments import segment_starts


@arguments("moving_average")
class AverageArguments(Arguments):
    x: Leaf = array("BLE")
    rate: Leaf = array("E")
    initial_state: Leaf | None = array("BE", optional=True)
    segment_ids: Leaf | None = array("BL", optional=True, dtype="integer")


@result
class AverageOutput:
    y: Leaf = array("BLE")
    final_state: Leaf = array("BE")


def _with(scan, given: AverageArguments) -> AverageOutput:
    dtype = jnp.promote_types(given.x.dtype, jnp.float32)
    a = jnp.broadcast_to(jax.nn.sigmoid(given.rate.astype(dtype))[None, None], given.x.shape)
    u = (1 - a) * given.x.astype(dtype)
    if given.segment_ids is not None:
        a = jnp.where(segment_starts(given.segment_ids)[:, :, None], 0, a)
    if given.initial_state is not None:
        u = u.at[:, 0].add(a[:, 0] * given.initial_state.astype(dtype))
    return AverageOutput(y=(h := scan(a, u)).astype(given.x.dtype), final_state=h[:, -1])


def _reference(a, u):
    h = [jnp.zeros_like(u[:, 0])]
    for t in range(u.shape[1]):
        h.append(a[:, t] * h[-1] + u[:, t])
    return jnp.stack(h[1:], axis=1)


def _xla(a, u):
    return jax.lax.associative_scan(lambda p, q: (p[0] * q[0], q[0] * p[1] + q[1]), (a, u), axis=1)[1]


_dispatch = Dispatcher[AverageOutput](
    op="moving_average", implementations={"reference": lambda g: _with(_reference, g), "xla": lambda g: _with(_xla, g)}
)
pallas_kernels.TABLES["moving_average"] = OpTable(AverageArguments, AverageOutput)


def moving_average(x, rate, *, initial_state=None, segment_ids=None, implementation=None) -> AverageOutput:
    """h_t = a h_{t-1} + (1 - a) x_t with a = sigmoid(rate), anew at the start of a document."""
    given = AverageArguments.of(x=x, rate=rate, initial_state=initial_state, segment_ids=segment_ids)
    return on_own_part(_dispatch.using(implementation), given, AverageOutput)
