"""A batch is a pytree that JAX may rebuild around anything."""

import jax
import numpy as np
import pytest

from mamba_jax.data.batch import LMBatch


@pytest.mark.parametrize("segmented", [True, False])
def test_batch_is_a_pytree(segmented: bool) -> None:
    tokens = np.arange(8, dtype=np.int32).reshape(2, 4)
    batch = LMBatch(
        tokens=tokens, targets=tokens + 1, loss_mask=tokens > 2, segment_ids=tokens // 4 if segmented else None
    )
    shapes = jax.tree.map(np.shape, batch)
    assert shapes.tokens == shapes.loss_mask == (2, 4)
    assert shapes.segment_ids == ((2, 4) if segmented else None)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    doubled = jax.jit(lambda b: jax.tree.map(lambda x: x * 2, b), in_shardings=device)(batch)
    np.testing.assert_array_equal(doubled.targets, 2 * (tokens + 1))
    micro = jax.tree.map(lambda x: x.reshape(2, 1, 4), batch)
    assert micro.tokens.shape == (2, 1, 4)
