"""What a state in bfloat16 and weights in int8 cost in held-out loss.

    python benchmarks/run_decode_quality.py runs/quickstart
    python benchmarks/run_decode_quality.py FOLDER --text TEXTS --device gpu

All rows are of the same tokens. Those "at once" are of the full forward pass; those "one by one" are of a model that
reads a token at a time and carries its state, as in generation, where a state is to be rounded after every token.
"""

import dataclasses
import functools
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import tyro

import harness
from harness import Results, setting_here
from mamba_jax.cli import one_line_errors, parse
from mamba_jax.data.batch import LMBatch
from mamba_jax.data.config import TextFolderSource
from mamba_jax.data.pipeline import evaluation_batches, open_source
from mamba_jax.errors import InputError
from mamba_jax.evaluation.checkpoints import byte_tokenizer
from mamba_jax.evaluation.perplexity import Perplexity, evaluate
from mamba_jax.export.companions import open_tokenizer
from mamba_jax.export.load import LoadedCheckpoint, load_model
from mamba_jax.models.parameters import ModelDefinition, Params, define
from mamba_jax.models.state import LMState, init_state, reset_rows
from mamba_jax.models.storage.int8 import quantize
from mamba_jax.sharding import make_mesh, replicated
from mamba_jax.sharding.config import MeshConfig

# As in evaluation: bounds the memory of logits.
_LOSS_CHUNK = 256


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What to measure.

    Attributes:
        checkpoint: a run directory, or a folder with `config.json` and safetensors.
        device: what to run on.
        text: folder of text files to read; None takes the validation text of the training run.
        rows: windows of text.
        seq_len: tokens of a window.
        output: folder of the results.
    """

    checkpoint: tyro.conf.Positional[str]
    device: Literal["cpu", "gpu"] = "cpu"
    text: str | None = None
    rows: int = 16
    seq_len: int = 1024
    output: Path = harness.RESULTS

    def __post_init__(self) -> None:
        for name in ("rows", "seq_len"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name.replace('_', '-')} must be positive, got {getattr(self, name)}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeldOut:
    """The text that is read: one batch, and tokens for each byte of its source."""

    batch: LMBatch
    tokens_per_byte: float


def read_text(loaded: LoadedCheckpoint, options: Options) -> HeldOut:
    """The first windows of the held-out text."""
    tokenizer = open_tokenizer(loaded.tokenizer or byte_tokenizer(loaded, options.checkpoint))
    source = loaded.experiment.data.validation if loaded.experiment else None
    if options.text is not None:
        source = TextFolderSource(path=options.text)
    if source is None:
        raise InputError(f"{options.checkpoint} names no validation text: give --text FOLDER")
    source.require_present()
    with tempfile.TemporaryDirectory() as cache:
        dataset = open_source(source, cache, tokenizer)
        sizes = {"seq_len": options.seq_len, "batch_size": options.rows, "max_batches": 1}
        batch = next(evaluation_batches(dataset, documents="packed", **sizes))
        return HeldOut(batch=batch, tokens_per_byte=dataset.tokens_per_byte)


def unrounded(state: LMState) -> LMState:
    """The state as it is."""
    return state


def in_bfloat16(state: LMState) -> LMState:
    """The state with its float32 arrays rounded to the 8 bits of bfloat16."""

    # A conversion there and back is what a compiler may leave out.
    def rounded(array: jax.Array) -> jax.Array:
        return jax.lax.reduce_precision(array, 8, 7) if array.dtype == jnp.float32 else array

    return jax.tree.map(rounded, state)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _losses(
    definition: ModelDefinition, keep: Callable[[LMState], LMState], params: Params, batch: LMBatch
) -> jax.Array:
    """-log p of the counted tokens, summed over the rows, for every position (L,); `keep` is applied to each state."""
    model, config = definition.merge(params), definition.config

    def step(state: Any, position: Any) -> tuple[Any, jax.Array]:
        token_B, target_B, counts_B, starts_B = position
        output = model(token_B[:, None], reset_rows(config, state, starts_B))
        log_p_BV = jax.nn.log_softmax(output.logits[:, 0])
        loss_B = -jnp.take_along_axis(log_p_BV, target_B[:, None], axis=1)[:, 0]
        return keep(output.state), jnp.sum(jnp.where(counts_B, loss_B, 0))

    starts_BL = jnp.zeros(batch.tokens.shape, bool)
    if batch.segment_ids is not None:
        starts_BL = starts_BL.at[:, 1:].set(batch.segment_ids[:, 1:] != batch.segment_ids[:, :-1])
    positions = (batch.tokens, batch.targets, batch.loss_mask, starts_BL)
    rows, length = batch.tokens.shape
    start = init_state(config, rows, max_length=length)
    return jax.lax.scan(step, start, jax.tree.map(lambda array: jnp.swapaxes(array, 0, 1), positions))[1]


def one_by_one(
    definition: ModelDefinition, params: Params, text: HeldOut, *, keep: Callable[[LMState], LMState]
) -> Perplexity:
    """Held-out loss of a model that reads a token at a time.

    Args:
        definition: the model.
        params: its parameters.
        text: what it reads.
        keep: from the state after a token to what is carried to the next.
    """
    losses = jax.device_get(_losses(definition, keep, params, jax.device_put(text.batch)))
    sums = {"loss": math.fsum(losses.tolist()), "tokens": int(text.batch.loss_mask.sum())}
    return Perplexity.of(sums, tokens_per_byte=text.tokens_per_byte)


def at_once(definition: ModelDefinition, params: Params, text: HeldOut) -> Perplexity:
    """Held-out loss of the full forward pass."""
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    params = jax.device_put(params, replicated(mesh))
    how = {"mesh": mesh, "tokens_per_byte": text.tokens_per_byte, "loss_chunk": _LOSS_CHUNK}
    return evaluate(definition, params, [text.batch], **how)


def measure(loaded: LoadedCheckpoint, text: HeldOut, results: Results, workload: str) -> None:
    """Adds a result for every way to compute the loss, and how much more it is than with float32 everywhere."""
    exact, halved = (
        define(dataclasses.replace(loaded.config, compute_dtype=dtype)) for dtype in ("float32", "bfloat16")
    )
    params = jax.device_put(loaded.params, jax.devices()[0])
    in_int8 = quantize(exact, params)
    ways: list[tuple[str, str, Callable[[], Perplexity]]] = [
        ("float32", "at once", lambda: at_once(exact, params, text)),
        ("float32", "one by one", lambda: one_by_one(exact, params, text, keep=unrounded)),
        ("bfloat16 state", "one by one", lambda: one_by_one(exact, params, text, keep=in_bfloat16)),
        ("int8 weights", "at once", lambda: at_once(exact, in_int8, text)),
        ("bfloat16 products", "at once", lambda: at_once(halved, params, text)),
        ("bfloat16 products, int8 weights", "at once", lambda: at_once(halved, in_int8, text)),
        (
            "bfloat16 products, int8 weights, bfloat16 state",
            "one by one",
            lambda: one_by_one(halved, in_int8, text, keep=in_bfloat16),
        ),
    ]
    base = None
    for name, direction, way in ways:
        found = way()
        base = base or found
        results.add(
            "held-out loss",
            workload,
            implementation=name,
            direction=direction,
            bits_per_byte=f"{found.bits_per_byte:.5f}",
            perplexity=f"{found.perplexity:.4f}",
            more_perplexity=f"{100 * (math.exp(found.loss - base.loss) - 1):+.3f} %",
        )


def main() -> None:
    """Command-line entry."""
    with one_line_errors():
        options = parse(Options, prog="benchmarks/run_decode_quality.py")
        harness.select_platform(options.device)
        loaded = load_model(options.checkpoint)
        text = read_text(loaded, options)
        results = Results(options.output, setting_here(harness.hardware(), libraries=("flax", "qwix")))
        name = loaded.experiment.name if loaded.experiment else Path(options.checkpoint).name
        steps = "" if loaded.step is None else f", {loaded.step:,} updates"
        workload = f"{name}{steps}, {options.rows} x {options.seq_len:,} tokens"
        measure(loaded, text, results, workload)
        note = (
            "Bits per byte and perplexity of the same held-out tokens; the last column is the increase of perplexity "
            "over the first row. Rows that name no products have float32 ones. A state is rounded after every token. "
            "Scales of int8 weights are one for each output channel, or token of the embedding."
        )
        print(f"wrote {results.write_table(f'decode_quality_{options.device}', 'Loss of cheaper decoding', note)}")


if __name__ == "__main__":
    main()
