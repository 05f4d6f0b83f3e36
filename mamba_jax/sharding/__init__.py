"""Logical axes, the rules that map them to mesh axes, and the only sharding constraints of the library.

Every parameter carries the logical axes of its dimensions (`nnx.Param(value, axes=(Axis.EMBED, Axis.INNER))`), and
its optimizer moments inherit them. Activations are constrained with `constrain`. Nothing outside this package names a
mesh axis.
"""

from mamba_jax.sharding.axes import (
    RULES,
    Axis,
    Logical,
    ShardingRules,
)
from mamba_jax.sharding.mesh import (
    batch_sharding,
    batch_shards,
    compiler_options,
    make_mesh,
    parameter_sharding,
    process_rows,
    put_batch,
    replicated,
)
from mamba_jax.sharding.placement import (
    constrain,
    from_last,
    from_shard,
    gathered,
    in_context,
    in_groups,
    is_split,
    on_own_tokens,
    parts,
    per_shard,
    placed_like,
    product,
    product_of_groups,
    scattered_sum,
    shard_count,
    shard_number,
    sharding_of_rows,
    summed,
    whole,
)

__all__ = [
    "RULES",
    "Axis",
    "Logical",
    "ShardingRules",
    "batch_sharding",
    "batch_shards",
    "compiler_options",
    "constrain",
    "from_last",
    "from_shard",
    "gathered",
    "in_context",
    "in_groups",
    "is_split",
    "make_mesh",
    "on_own_tokens",
    "parameter_sharding",
    "parts",
    "per_shard",
    "placed_like",
    "process_rows",
    "product",
    "product_of_groups",
    "put_batch",
    "replicated",
    "scattered_sum",
    "shard_count",
    "shard_number",
    "sharding_of_rows",
    "summed",
    "whole",
]
