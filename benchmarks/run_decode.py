"""Times generation: tokens a second of decoding and of reading prompts, and their share of what the device can do.

    python benchmarks/run_decode.py
    python benchmarks/run_decode.py --device gpu --models mamba_130m mamba_2_8b mamba2_2_7b --batches 1 16 128
    python benchmarks/run_decode.py --requests 200 --transformers PYTHON
    python benchmarks/run_decode.py --device gpu --models mamba2_2_7b --batches 1 16 --tile-seconds 120

A decoding program draws the likeliest token of every row and reads it, several times in a row, as the engine does.
Weights are random, in bfloat16 on accelerators.
"""

import collections
import concurrent.futures
import dataclasses
import functools
import itertools
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

import harness
from decoding import peer
from decoding.profile import time_by_kernel
from decoding.tiles import Search, Workload
from harness import MIB, Results, select_platform, setting_here, time_calls
from mamba_jax.chips import CHIPS
from mamba_jax.cli import one_line_errors, parse
from mamba_jax.config import Mamba1Config, Mamba2Config, ModelConfig
from mamba_jax.generation.decoder import Decoder, start_state
from mamba_jax.generation.engine import Engine, Request
from mamba_jax.generation.rows import Choice, Rows, draw_tokens
from mamba_jax.generation.sampling import Sampling, SamplingConfig
from mamba_jax.generation.weights import Weights, for_decoding
from mamba_jax.models import parameters
from mamba_jax.models.flops import flops_per_token
from mamba_jax.models.parameters import ModelDefinition

VOCAB = 50280
# Width and depth of published models (arXiv 2312.00752, table 12; arXiv 2405.21060), and of the quickstart.
SIZES: dict[str, tuple[int, int, Any]] = {
    "quickstart": (192, 4, Mamba1Config()),
    "mamba_130m": (768, 24, Mamba1Config()),
    "mamba_370m": (1024, 48, Mamba1Config()),
    "mamba_1_4b": (2048, 48, Mamba1Config()),
    "mamba_2_8b": (2560, 64, Mamba1Config()),
    "mamba2_130m": (768, 24, Mamba2Config()),
    "mamba2_2_7b": (2560, 64, Mamba2Config()),
}
NOTES = (
    "Decoding: the prompt is read already; each call draws and reads several tokens for every row in one program, the "
    "state donated; ms are of one token of all rows. Its bound is the time to read every weight and to read and write "
    "the state, at the memory's published speed. Reading prompts: one call of the whole batch; its bound is that of "
    "the matrix units. Times are the best of repeated runs. Engine: texts of 8 to 256 tokens continued by 16 to 128, "
    "and as many of the mean lengths. The rows of transformers: the same weights, exported, in the same run; the time "
    "between one token and the next, and the first greedy tokens are compared.",
)
Step = Literal["layers", "triton", "xla", "best"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What to measure.

    Attributes:
        device: where to run.
        models: which.
        batches: rows of the decoding programs.
        weights: how they are stored.
        state_dtypes: what recurrent states are kept in.
        steps: how a block reads a token: "layers" one layer after the other, "triton" by the kernels of
            `pallas_kernels.mamba1_step` or `mamba2_step`, "best" as the platform decides.
        rings: for steps of Mamba-2 by kernels, tokens whose inputs are kept instead of writing the state; 0 is none.
        num_tokens: tokens of a decoding program.
        prompts: batches of prompts to read; none by default.
        prompt_length: their tokens.
        requests: texts for an engine, of mixed lengths and, to compare, of equal ones; 0 leaves that out.
        rows: of the engine.
        transformers: an interpreter with torch and transformers, which then read the same weights on as many
            processors, batch for batch; None leaves that out.
        seconds: time to spend on each measurement, at least three runs.
        kernels: of how many kernels of a GPU, those that take longest, to add the time for a token.
        compile_seconds: programs that are not compiled by then are left out.
        tile_seconds: for a search of the kernels' tiles for each model and batch, instead of decoding; 0 is none.
        output: folder of the results.
    """

    device: Literal["cpu", "gpu", "tpu"] = "cpu"
    models: tuple[str, ...] = ("quickstart",)
    batches: tuple[int, ...] = (1, 16)
    weights: tuple[Weights, ...] = ("exact",)
    state_dtypes: tuple[Literal["float32", "bfloat16"], ...] = ("float32",)
    steps: tuple[Step, ...] = ("best",)
    rings: tuple[int, ...] = (0,)
    num_tokens: int = 32
    prompts: tuple[int, ...] = ()
    prompt_length: int = 2048
    requests: int = 0
    rows: int = 16
    transformers: Path | None = None
    seconds: float = 1.0
    kernels: int = 0
    compile_seconds: float = 600.0
    tile_seconds: float = 0.0
    output: Path = harness.RESULTS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A program to time."""

    model: str
    batch: int
    weights: Weights
    state_dtype: Literal["float32", "bfloat16"]
    step: Step
    prompt_length: int | None
    ring: int = 0

    @property
    def workload(self) -> str:
        """Sizes and options."""
        what = "" if self.prompt_length is None else f", prompts of {self.prompt_length}"
        return f"{self.model}, batch {self.batch}{what}"

    @property
    def implementation(self) -> str:
        """What else tells it apart."""
        parts = [self.step, *(name for name in (f"{self.weights} weights",) if self.weights != "exact")]
        parts += [f"{self.state_dtype} state"] if self.state_dtype != "float32" else []
        return ", ".join([*parts, *([f"ring of {self.ring}"] if self.ring else [])])


def cases(options: Options) -> list[Case]:
    """All programs, those of a model together."""
    found = []
    for model in options.models:
        width = functools.partial(Case, model=model)
        for step in options.steps:
            for weights in options.weights:
                for state_dtype in options.state_dtypes:
                    case = functools.partial(width, weights=weights, state_dtype=state_dtype, step=step)
                    has_ring = isinstance(SIZES[model][2], Mamba2Config) and step == "triton"
                    for ring, batch in itertools.product(options.rings if has_ring else (0,), options.batches):
                        found.append(case(batch=batch, prompt_length=None, ring=ring))
        case = functools.partial(width, weights="exact", state_dtype="float32", step="best")
        found += [case(batch=batch, prompt_length=options.prompt_length) for batch in options.prompts]
    return found


def definition_of(case: Case, options: Options) -> ModelDefinition:
    """The model of a case."""
    width, depth, mixer = SIZES[case.model]
    if case.step != "best":
        ring = {"step_ring": case.ring} if case.ring else {}
        mixer = dataclasses.replace(mixer, step_implementation=case.step, **ring)
    dtype = "float32" if options.device == "cpu" else "bfloat16"
    vocab = 264 if case.model == "quickstart" else VOCAB
    return parameters.define(
        ModelConfig(
            vocab_size=vocab, d_model=width, num_layers=depth, mixer=mixer, param_dtype=dtype, compute_dtype=dtype
        )
    )


def per_layer_params(definition: ModelDefinition, weights: Weights) -> Any:
    """Random parameters as a decoder has them."""
    _, params = for_decoding(definition, random_params(definition), weights=weights)
    return definition.unstacked(params)


def random_params(definition: ModelDefinition) -> Any:
    """Random parameters, stacked."""
    # Speed does not depend on the values, and a program that draws them as training does takes longer to compile.
    draw = jax.jit(_draw, static_argnums=(0, 1))
    return jax.tree.map(lambda leaf: draw(leaf.shape, leaf.dtype), definition.params)


def _draw(shape: tuple[int, ...], dtype: Any) -> jax.Array:
    return 0.02 * jax.random.normal(jax.random.key(0), shape, dtype)


def start(definition: ModelDefinition, case: Case) -> Rows:
    """Rows before the first token."""
    zeros = jnp.zeros(case.batch, jnp.int32)
    return Rows(
        logits=jnp.zeros((case.batch, definition.config.padded_vocab_size), jnp.float32),
        state=start_state(definition, case.batch, None, case.state_dtype),
        seeds=zeros.astype(jnp.uint32),
        position=zeros,
        left=jnp.full(case.batch, 2**30, jnp.int32),
    )


def shapes_on(device: jax.Device, definition: ModelDefinition, weights: Weights) -> Any:
    """Shapes of the parameters as a decoder has them, which say how the arrays lie on the device."""
    shapes = jax.eval_shape(lambda: per_layer_params(definition, weights))
    place = jax.sharding.SingleDeviceSharding(device)
    return definition.unstacked(
        jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), shapes)
    )


def lowered(case: Case, options: Options, device: jax.Device) -> Any:
    """The program of a case for a device, without its arguments."""
    definition = definition_of(case, options)
    params = shapes_on(device, definition, case.weights)
    if case.prompt_length is not None:
        tokens = jax.ShapeDtypeStruct((case.batch, case.prompt_length), jnp.int32)
        read = jax.jit(lambda params, tokens: definition.merge(params).hidden(tokens).hidden[:, -1])
        return read.lower(params, tokens)
    sampling = Sampling.of([SamplingConfig(temperature=0.0)] * case.batch)
    choice = Choice(sampling=sampling, allowed=np.ones(definition.config.vocab_size, bool))

    def decode(params: Any, rows: Rows) -> tuple[Rows, jax.Array]:
        rows, drawn = draw_tokens(definition.merge(params), rows, choice, num_tokens=options.num_tokens)
        return rows, drawn.tokens

    rows = jax.eval_shape(lambda: start(definition, case))
    return jax.jit(decode, donate_argnums=1).lower(params, rows)


def compiled(case: Case, options: Options) -> Any:
    """The program of a case, without its arguments."""
    return lowered(case, options, jax.devices()[0]).compile()


def call_of(case: Case, options: Options, program: Any, params: Any) -> Callable[[], Any]:
    """What to time."""
    definition = definition_of(case, options)
    if case.prompt_length is not None:
        tokens = jax.random.randint(jax.random.key(1), (case.batch, case.prompt_length), 0, 256, jnp.int32)
        return lambda: program(params, tokens)
    rows = jax.jit(lambda: start(definition, case))()

    def call() -> jax.Array:
        nonlocal rows
        rows, tokens = program(params, rows)
        return tokens

    return call


def size(tree: Any) -> int:
    """Bytes of all arrays of a tree."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def measure(results: Results, case: Case, options: Options, program: Any, params: Any) -> None:
    """Times a program and keeps the result."""
    definition = definition_of(case, options)
    call = call_of(case, options, program, params)
    timing = time_calls(call, seconds=options.seconds, in_a_row=False)
    chip = CHIPS.get(jax.devices()[0].device_kind)
    seconds, share = timing.milliseconds / 1e3, None
    tokens = case.batch * (options.num_tokens if case.prompt_length is None else case.prompt_length)
    if case.prompt_length is not None and chip is not None:
        forward = flops_per_token(definition.config, length=case.prompt_length) / 3
        share = forward * tokens / seconds / chip.peak_flops
    elif chip is not None and chip.memory_bytes_per_second is not None:
        table = size(params["embedding"]) if not definition.config.tie_embeddings else 0
        moved = size(params) - table + 2 * size(jax.eval_shape(lambda: start(definition, case)).state)
        share = moved * options.num_tokens / seconds / chip.memory_bytes_per_second
    memory = program.memory_analysis()
    results.add(
        "decoding" if case.prompt_length is None else "reading prompts",
        case.workload,
        implementation=case.implementation,
        direction="forward",
        milliseconds=timing.milliseconds / (options.num_tokens if case.prompt_length is None else 1),
        tokens_per_second=tokens / seconds,
        percent_of_bound=None if share is None else 100 * share,
        temporaries_MiB=None if memory is None else memory.temp_size_in_bytes / MIB,
    )
    steps = options.num_tokens if case.prompt_length is None else 1
    longest = list(time_by_kernel(call).items())[: options.kernels] if options.kernels else []
    for name, (launches, microseconds) in longest:
        results.add(
            "kernels",
            f"{case.workload}, {case.implementation}",
            implementation=name,
            direction="forward",
            milliseconds=microseconds / 1e3 / steps,
            launches=launches / steps,
            microseconds_each=microseconds / launches,
        )


def engine_requests(kind: str, options: Options, vocab_size: int) -> list[Request]:
    """Texts to continue: prompts of 8 to 256 tokens by 16 to 128 more, or all of the mean lengths."""
    rng = np.random.default_rng(0)
    lengths, counts = rng.integers(8, 257, options.requests), rng.integers(16, 129, options.requests)
    if kind == "equal":
        lengths[:], counts[:] = 132, 72
    return [
        Request(tokens=rng.integers(0, vocab_size, length).tolist(), num_tokens=int(count), seed=seed)
        for seed, (length, count) in enumerate(zip(lengths, counts, strict=True))
    ]


def measure_engine(results: Results, model: str, options: Options) -> None:
    """Tokens a second of an engine, on texts of mixed lengths and of equal ones, after a run that compiles.

    Then the mixed ones once more, one at a time: each has to be the same.
    """
    case = Case(
        model=model, batch=options.rows, weights="exact", state_dtype="float32", step="best", prompt_length=None
    )
    definition = definition_of(case, options)
    decoder = Decoder(definition, per_layer_params(definition, "exact"))
    for kind in ("mixed", "equal"):
        requests = engine_requests(kind, options, definition.config.vocab_size)
        engine = Engine(decoder, rows=options.rows)
        texts(engine, requests)
        start_time = time.perf_counter()
        together = texts(engine, requests)
        seconds = time.perf_counter() - start_time
        tokens = sum(map(len, together))
        alike = sum(texts(engine, [request]) == [text] for request, text in zip(requests, together, strict=True))
        results.add(
            "engine",
            f"{model}, {options.requests} texts, {options.rows} rows",
            implementation=f"{kind} lengths",
            direction="forward",
            tokens_per_second=tokens / seconds,
            tokens_read_and_drawn_per_second=(tokens + sum(len(request.tokens) for request in requests)) / seconds,
            texts_that_are_the_same_alone=alike,
        )


def texts(engine: Engine, requests: list[Request]) -> list[tuple[int, ...]]:
    """The tokens that an engine adds to each of the requests."""
    found: dict[int, tuple[int, ...]] = collections.defaultdict(tuple)
    for progress in engine.run(requests):
        found[progress.request] += progress.tokens
    return [found[number] for number in sorted(found)]


def main() -> None:
    with one_line_errors():
        options = parse(Options, prog="benchmarks/run_decode.py")
        select_platform(options.device)
        results = Results(options.output, setting_here(harness.hardware(), libraries=("flax",)))
        deadline = time.perf_counter() + options.compile_seconds
        todo = cases(options) if not options.tile_seconds else []
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            programs = {case: pool.submit(compiled, case, options) for case in todo}
            concurrent.futures.wait(programs.values(), timeout=max(0.0, deadline - time.perf_counter()))
            for future in programs.values():
                future.cancel()
            held: tuple[Any, Any] = (None, None)
            for case in todo:
                if not programs[case].done() or programs[case].cancelled():
                    print(f"left out, not compiled in time: {case.workload}, {case.implementation}", flush=True)
                    continue
                definition = definition_of(case, options)
                reads_columns = any(stack.mixer.reads_columns for stack in definition.config.stacks)
                wanted = (case.model, case.weights, reads_columns)
                if held[0] != wanted:
                    held = (None, None)
                    held = (wanted, per_layer_params(definition, case.weights))
                measure(results, case, options, programs[case].result(), held[1])
        for model, batch, dtype in itertools.product(options.models, options.batches, options.state_dtypes):
            if options.tile_seconds:
                width, _, mixer = SIZES[model]
                for ring in options.rings if isinstance(mixer, Mamba2Config) else (0,):
                    workload = Workload(width=width, mixer=mixer, rows=batch, state_dtype=dtype, ring=ring)
                    name = f"{model}, batch {batch}, {dtype} state" + (f", ring of {ring}" if ring else "")
                    Search(results, name, workload, seconds=options.tile_seconds).run()
        for model in options.models:
            if options.requests:
                measure_engine(results, model, options)
            if options.transformers is not None:
                definition = definition_of(cases(dataclasses.replace(options, models=(model,)))[0], options)
                sizes = {field.name: getattr(options, field.name) for field in dataclasses.fields(peer.Job)}
                params = random_params(definition)
                peer.measure(
                    results, model, options.transformers, peer.Job(**sizes), definition=definition, params=params
                )
        kind = "tiles" if options.tile_seconds else "decode"
        path = results.write_table(f"{kind}_{options.device}", "Generation", *NOTES)
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
