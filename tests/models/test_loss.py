"""The chunked loss against the textbook formula in float64."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mamba_jax.config import MeshConfig
from mamba_jax.models.head import Head
from mamba_jax.models.loss import LossOutput, next_token_loss
from mamba_jax.sharding import make_mesh
from tests.programs import temporary_bytes

EPSILON = 2.0**-24


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """Inputs, and in float64 the loss, its gradients and a bound on the float32 rounding error of each."""

    hidden: np.ndarray
    unembedding: np.ndarray
    targets: np.ndarray
    mask: np.ndarray
    logit_cap: float | None
    loss: float
    loss_error: float
    gradients: tuple[np.ndarray, np.ndarray]
    gradient_errors: tuple[np.ndarray, np.ndarray]


def make_problem(
    vocab: int,
    *,
    z_loss: float = 0.0,
    logit_cap: float | None = None,
    batch: int = 2,
    length: int = 13,
    counted: float = 0.7,
) -> Problem:
    dim = 8
    rng = np.random.default_rng(vocab)
    # Representable in bfloat16, so that the same problem serves both dtypes.
    hidden = np.asarray(jnp.asarray(rng.normal(size=(batch, length, dim)), jnp.bfloat16), np.float32)
    unembedding = np.asarray(jnp.asarray(rng.normal(size=(vocab, dim)), jnp.bfloat16), np.float32)
    targets = rng.integers(0, vocab, (batch, length)).astype(np.int32)
    mask = rng.random((batch, length)) < counted
    tokens = max(mask.sum(), 1)

    h, w = hidden.astype(np.float64), unembedding.astype(np.float64)
    logits = h @ w.T if logit_cap is None else logit_cap * np.tanh(h @ w.T / logit_cap)
    slope = 1.0 if logit_cap is None else 1 - (logits / logit_cap) ** 2
    partition = np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)) + logits.max(-1)
    is_target = np.arange(vocab) == targets[..., None]
    target_logit = np.where(is_target, logits, 0).sum(-1)
    loss = np.where(mask, partition - target_logit + z_loss * partition**2, 0).sum() / tokens
    probability = np.exp(logits - partition[..., None])
    factor = (1 + 2 * z_loss * partition)[..., None]
    weight = (mask / tokens)[..., None]
    dlogits = (probability * factor - is_target) * weight * slope

    # A dot product of n terms errs by at most n epsilon times the sum of the terms' magnitudes; a logit has `dim`, the
    # partition's sum at most `vocab` terms in a tree, whose depth counts, and every logarithm, exponential, difference
    # and product adds a few epsilon of its own.
    logit_error = EPSILON * (dim * (np.abs(h) @ np.abs(w).T).max() + np.log2(vocab) + 8 * (1 + np.abs(partition).max()))
    # The slope of a cap is at most 1, and changes by at most twice the relative error of its logit.
    relative = 2 * logit_error / logit_cap + 4 * EPSILON if logit_cap is not None else 0.0
    dlogits_error = (probability * factor * 3 * (logit_error + 4 * EPSILON) + is_target * 4 * EPSILON) * weight
    dlogits_error += np.abs(probability * factor - is_target) * weight * relative
    sums = batch * length
    return Problem(
        hidden=hidden,
        unembedding=unembedding,
        targets=targets,
        mask=mask,
        logit_cap=logit_cap,
        loss=loss,
        loss_error=(2 * logit_error + sums * EPSILON * loss) * (1 + 2 * z_loss * np.abs(partition).max()),
        gradients=(dlogits @ w, np.einsum("btv,btd->vd", dlogits, h)),
        gradient_errors=(
            dlogits_error @ np.abs(w) + vocab * EPSILON * (np.abs(dlogits) @ np.abs(w)),
            np.einsum("btv,btd->vd", dlogits_error + sums * EPSILON * np.abs(dlogits), np.abs(h)),
        ),
    )


def run(problem: Problem, *, z_loss: float = 0.0, chunk: int, dtype: str = "float32"):
    """Loss output and gradients of hidden and unembedding; the head stays in float32 as parameters do."""

    def loss(hidden: jax.Array, unembedding: jax.Array) -> tuple[jax.Array, LossOutput]:
        normalizer = jnp.sum(problem.mask, dtype=jnp.float32)
        output = next_token_loss(
            hidden,
            Head(matrix=unembedding, logit_cap=problem.logit_cap),
            problem.targets,
            problem.mask,
            normalizer=normalizer,
            z_loss=z_loss,
            chunk=chunk,
        )
        return output.loss, output

    arguments = (jnp.asarray(problem.hidden, dtype), jnp.asarray(problem.unembedding))
    (_, output), gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(*arguments)
    value_only = jax.jit(loss)(*arguments)[0]
    np.testing.assert_array_equal(value_only, output.loss)
    return output, gradients


@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
@pytest.mark.parametrize(("vocab", "chunk"), [(7, 5), (1000, 13), (1000, 1), (50280, 4), (50280, 100)])
def test_equals_plain_log_softmax(vocab: int, chunk: int, z_loss: float) -> None:
    check_problem(make_problem(vocab, z_loss=z_loss), z_loss=z_loss, chunk=chunk)


def test_capped_logits() -> None:
    # Half of the logits are beyond the cap.
    check_problem(make_problem(100, z_loss=1e-2, logit_cap=2.0), z_loss=1e-2, chunk=5)


def check_problem(problem: Problem, *, z_loss: float, chunk: int) -> None:
    output, gradients = run(problem, z_loss=z_loss, chunk=chunk)
    assert abs(float(output.loss) - problem.loss) <= problem.loss_error
    assert problem.loss_error < 1e-4 * problem.loss
    np.testing.assert_allclose(output.cross_entropy + output.z_loss, output.loss, rtol=1e-7)
    for gradient, expected, error in zip(gradients, problem.gradients, problem.gradient_errors, strict=True):
        assert np.all(np.abs(np.asarray(gradient, np.float64) - expected) <= error)
        # The bound would be no test if it let the gradient itself vanish.
        assert np.linalg.norm(error) < 1e-2 * np.linalg.norm(expected)


@pytest.mark.parametrize(
    ("mesh", "batch", "length"),
    [
        pytest.param(MeshConfig(data=2, sequence=4), 4, 24, id="batch and length"),
        pytest.param(MeshConfig(data=1, fsdp=2, sequence=2, tensor=2), 2, 26, id="every axis, uneven chunks"),
        pytest.param(MeshConfig(data=2, sequence=4), 1, 24, id="one row"),
        pytest.param(MeshConfig(data=2, sequence=4), 2, 13, id="length that does not divide"),
    ],
)
def test_split_over_devices(mesh: MeshConfig, batch: int, length: int) -> None:
    problem = make_problem(100, z_loss=1e-2, batch=batch, length=length)
    with jax.set_mesh(make_mesh(mesh)):
        output, gradients = run(problem, z_loss=1e-2, chunk=5)
    assert abs(float(output.loss) - problem.loss) <= problem.loss_error
    for gradient, expected, error in zip(gradients, problem.gradients, problem.gradient_errors, strict=True):
        assert np.all(np.abs(np.asarray(gradient, np.float64) - expected) <= error)


def test_z_loss_is_the_squared_partition() -> None:
    problem = make_problem(50)
    plain, _ = run(problem, chunk=5)
    with_penalty, _ = run(problem, z_loss=0.5, chunk=5)
    logits = problem.hidden.astype(np.float64) @ problem.unembedding.T.astype(np.float64)
    partition = np.log(np.exp(logits).sum(-1))[problem.mask]
    np.testing.assert_array_equal(plain.cross_entropy, with_penalty.cross_entropy)
    assert float(plain.z_loss) == 0.0
    # Both steps of the square, and the mean over 26 positions, round: below 40 epsilon = 2.4e-6.
    np.testing.assert_allclose(with_penalty.z_loss, 0.5 * np.mean(partition**2), rtol=2.4e-6)


def test_chunks_without_counted_positions() -> None:
    problem = make_problem(11)
    mask = problem.mask.copy()
    mask[:, 5:10] = False
    mask[1] = False
    problem = dataclasses.replace(problem, mask=mask)
    output, (dhidden, _) = run(problem, chunk=5)
    whole, (dhidden_whole, _) = run(problem, chunk=13)
    # The same terms in another order: 26 additions of values below the sum.
    np.testing.assert_allclose(output.loss, whole.loss, rtol=26 * EPSILON)
    np.testing.assert_allclose(dhidden, dhidden_whole, rtol=1e-5, atol=1e-7)
    assert not np.any(np.asarray(dhidden)[~mask])


def test_nothing_counted_is_zero() -> None:
    output, gradients = run(make_problem(11, counted=-1.0), z_loss=0.1, chunk=4)
    assert float(output.loss) == float(output.cross_entropy) == float(output.z_loss) == 0.0
    assert all(not np.any(gradient) for gradient in gradients)


def test_parts_add_up_to_the_whole() -> None:
    """Parts of a batch with unequal masks, all divided by the same normaliser, sum to the loss of the batch."""
    problem = make_problem(31, batch=4)
    assert len(set(problem.mask.sum(1))) > 1
    normalizer = jnp.sum(problem.mask, dtype=jnp.float32)

    def part(rows: slice) -> float:
        head = Head(matrix=jnp.asarray(problem.unembedding))
        arrays = (jnp.asarray(problem.hidden[rows]), head, problem.targets[rows], problem.mask[rows])
        output = next_token_loss(*arrays, normalizer=normalizer, z_loss=0.0, chunk=5)
        return float(output.loss)

    whole = part(slice(None))
    # 52 additions in another order.
    np.testing.assert_allclose(sum(part(slice(row, row + 1)) for row in range(4)), whole, rtol=52 * EPSILON)


def test_bfloat16_products_accumulate_in_float32() -> None:
    problem = make_problem(1000)
    output, (dhidden, dunembedding) = run(problem, chunk=5, dtype="bfloat16")
    # Products of bfloat16 numbers are exact in float32, so the loss is as accurate as in float32.
    assert abs(float(output.loss) - problem.loss) <= problem.loss_error
    assert dhidden.dtype == jnp.bfloat16
    assert dunembedding.dtype == jnp.float32
    # The gradient of a logit is rounded to bfloat16 once, the result of `hidden` once more, 2^-9 relative each.
    for gradient, expected, roundings in ((dhidden, problem.gradients[0], 2), (dunembedding, problem.gradients[1], 1)):
        error = np.linalg.norm(np.asarray(gradient, np.float64) - expected)
        assert error <= roundings * 2**-9 * np.linalg.norm(expected)


def test_bfloat16_products_of_a_size_that_libraries_multiply() -> None:
    """Small products are loops that take any dtype; XLA for CPUs has none of this size that widens bfloat16."""
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(2, 256, 192)), jnp.bfloat16)
    matrix = jnp.asarray(rng.normal(size=(264, 192)) / 14, jnp.bfloat16).astype(jnp.float32)
    targets = jnp.asarray(rng.integers(0, 264, (2, 256)))

    def loss(hidden: jax.Array, matrix: jax.Array) -> jax.Array:
        mask, counted = jnp.ones(targets.shape, bool), jnp.asarray(targets.size, jnp.float32)
        head = Head(matrix=matrix)
        return next_token_loss(hidden, head, targets, mask, normalizer=counted, z_loss=0.0, chunk=256).loss

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1)))
    found, expected = gradient(hidden, matrix), gradient(hidden.astype(jnp.float32), matrix)
    # The gradient of a logit is rounded to bfloat16 once, the result of `hidden` once more, 2^-9 relative each.
    for narrow, right, roundings in zip(found, expected, (2, 1), strict=True):
        error = jnp.linalg.norm(narrow.astype(jnp.float32) - right)
        assert error <= roundings * 2**-9 * jnp.linalg.norm(right)


def test_logits_of_the_batch_never_exist() -> None:
    batch, length, dim, vocab, chunk = 4, 256, 8, 2048, 32

    def loss(hidden: jax.Array, unembedding: jax.Array) -> jax.Array:
        targets = jnp.zeros((batch, length), jnp.int32)
        mask = jnp.ones((batch, length), bool)
        one = jnp.ones((), jnp.float32)
        head = Head(matrix=unembedding)
        return next_token_loss(hidden, head, targets, mask, normalizer=one, z_loss=0.0, chunk=chunk).loss

    program = jax.jit(jax.grad(loss, argnums=(0, 1)))
    arguments = (jnp.zeros((batch, length, dim)), jnp.zeros((vocab, dim)))
    # One product each for the logits and the two gradients: the logits are not computed again.
    assert len(re.findall(r"= dot_general\[", str(program.trace(*arguments).jaxpr))) == 3
    temporaries = temporary_bytes(program.lower(*arguments).compile())
    # The logits of a chunk and their gradient may exist at once, besides what has the size of the arguments.
    assert temporaries < 3 * batch * chunk * vocab * 4 + 4 * vocab * dim * 4
    assert temporaries < batch * length * vocab * 4 / 2
