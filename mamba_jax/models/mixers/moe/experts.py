"""The experts of a layer: their weights, and what they make of the tokens that are sent to them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float, Int

from mamba_jax.models import initializers, layers
from mamba_jax.models.mixers.declaration import Setting
from mamba_jax.models.mixers.moe.config import MoeConfig
from mamba_jax.models.mixers.moe.grouped_product import grouped_product
from mamba_jax.models.mixers.moe.routing import Routing
from mamba_jax.sharding import Axis, gathered, on_own_tokens, parts, per_shard, scattered_sum, shard_number, summed
from pallas_kernels.common.partitioning import alike_over_devices

_TOKENS = (Axis.BATCH, Axis.LENGTH, None)
_AXES = {
    "u": _TOKENS,
    "experts": _TOKENS,
    "weights": _TOKENS,
    "up": (Axis.EXPERT, None, None, Axis.INNER),
    "down": (Axis.EXPERT, Axis.INNER, None),
}


class Experts(nnx.Module):
    """Experts of one shape: `up_proj` (X, D, P, E), the P of which are gate and up, and `down_proj` (X, E, D)."""

    def __init__(self, config: MoeConfig, setting: Setting, *, rngs: nnx.Rngs) -> None:
        self.config, self.compute_dtype = config, setting.compute_dtype
        count, width, inner = config.num_experts, setting.d_model, config.channels(setting.d_model)
        parameter = functools.partial(layers.parameter, rngs, dtype=setting.param_dtype, decay=True)
        self.up_proj = parameter(
            initializers.fan_in(width),
            (count, width, config.halves, inner),
            (Axis.EXPERT, Axis.EMBED, None, Axis.INNER),
        )
        self.down_proj = parameter(
            initializers.fan_in(inner, scale=setting.output_scale),
            (count, inner, width),
            (Axis.EXPERT, Axis.INNER, Axis.EMBED),
        )

    def __call__(self, u_BLD: Float[jax.Array, "B L D"], routing: Routing) -> Float[jax.Array, "B L D"]:
        """The weighted sum of each token's experts, in the compute dtype.

        Devices along the mesh axis of experts share out the batch as well as the experts. They exchange all of their
        tokens, each computes what its own experts add to any of them, and the sums go back to where the tokens came
        from. So no token is dropped, and no array's shape depends on what the router chooses.
        """
        tokens = {"u": u_BLD.astype(self.compute_dtype), "experts": routing.experts, "weights": routing.weights}
        weights = {"up": layers.read(self.up_proj), "down": layers.read(self.down_proj)}
        weights = {name: array.astype(self.compute_dtype) for name, array in weights.items()}
        return on_own_tokens(self._over_devices, tokens, weights)

    def _over_devices(self, **arrays: jax.Array) -> jax.Array:
        """`mixture` on arrays that automatic mesh axes split as the rules say."""
        has_own_rows = parts(Axis.BATCH, arrays["u"].shape[0]) > 1
        count, inner, _ = arrays["down"].shape
        has_own_experts, has_own_width = parts(Axis.EXPERT, count) > 1, parts(Axis.INNER, inner) > 1

        def run(**own: jax.Array) -> tuple[jax.Array]:
            own = alike_over_devices(own)
            if has_own_experts:
                tokens = {name: own[name] for name, axes in _AXES.items() if axes == _TOKENS}
                own |= gathered(tokens, Axis.EXPERT) if has_own_rows else {}
                own["experts"] -= shard_number(Axis.EXPERT) * own["up"].shape[0]
            y_BLD = mixture(self.config, **own).astype(self.compute_dtype)
            if has_own_width:
                y_BLD = summed(y_BLD, Axis.INNER)
            if has_own_experts:
                y_BLD = (scattered_sum if has_own_rows else summed)(y_BLD, Axis.EXPERT)
            return (y_BLD,)

        (y_BLD,) = per_shard(run, arrays, _AXES, [_TOKENS])
        return y_BLD


def mixture(
    config: MoeConfig,
    *,
    u: Float[jax.Array, "B L D"],
    experts: Int[jax.Array, "B L K"],
    weights: Float[jax.Array, "B L K"],
    up: Float[jax.Array, "X D P E"],
    down: Float[jax.Array, "X E D"],
) -> Float[jax.Array, "B L D"]:
    """What the given experts add to tokens: sum_k weights_k expert_k(u) over those k that are among them.

    Args:
        config: activation and gate.
        u: tokens, (B, L, D).
        experts: number of each token's experts among the given, (B, L, K); others are not in [0, X).
        weights: factors of the experts' outputs, (B, L, K).
        up: weights of the first product, (X, D, P, E).
        down: weights of the second, (X, E, D).

    Returns:
        (B, L, D) in float32.
    """
    (batch, length, width), choices, count = u.shape, experts.shape[-1], up.shape[0]
    expert_S = experts.reshape(-1)
    # Sorted, the choices of an expert lie together; those of experts that are elsewhere come last.
    expert_S = jnp.where((expert_S >= 0) & (expert_S < count), expert_S, count)
    order_S = jnp.argsort(expert_S, stable=True)
    place_S = jnp.argsort(order_S)
    sizes_X = jnp.sum(expert_S[:, None] == jnp.arange(count)[None], axis=0, dtype=jnp.int32)
    is_here_S1 = (jnp.arange(expert_S.size) < jnp.sum(sizes_X))[:, None]
    rows_SD = taken(u.reshape(-1, width), order_S // choices, place_S.reshape(-1, choices))
    # What a product makes of rows of no group is not said; neither it nor its gradient may reach anything.
    rows_SD = jnp.where(is_here_S1, rows_SD, 0)
    projected_SF = grouped_product(rows_SD, up.reshape(count, width, -1), sizes_X)
    inner_SE = config.activated(projected_SF.reshape(-1, *up.shape[2:]))
    y_SD = jnp.where(is_here_S1, grouped_product(inner_SE, down, sizes_X), 0)
    y_TKD = taken(y_SD, place_S, order_S[:, None]).reshape(-1, choices, width).astype(jnp.float32)
    return jnp.sum(y_TKD * weights.reshape(-1, choices)[..., None], axis=1).reshape(batch, length, width)


@jax.custom_vjp
def taken(
    rows: Float[jax.Array, "T D"], places: Int[jax.Array, " S"], uses: Int[jax.Array, "T K"]
) -> Float[jax.Array, "S D"]:
    """`rows[places]`, where each row is taken equally often, and its gradient without a scatter.

    Args:
        rows: (T, D).
        places: number of the row that each of the results is, (S,).
        uses: for each row the results that it is, (T, K), all S of them once.
    """
    del uses
    return rows[places]


def _taken_forward(rows, places, uses):
    return rows[places], (places, uses)


def _taken_backward(residuals, dtaken):
    places, uses = residuals
    drows = jnp.sum(dtaken[uses].astype(jnp.float32), axis=1).astype(dtaken.dtype)
    return drows, np.zeros(places.shape, jax.dtypes.float0), np.zeros(uses.shape, jax.dtypes.float0)


taken.defvjp(_taken_forward, _taken_backward)
