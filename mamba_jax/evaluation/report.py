"""What `eval.py` does: held-out loss and text samples of any checkpoint."""

import dataclasses
import sys
from typing import Literal

import jax

from mamba_jax.config import DataConfig, MeshConfig, TextFolderSource, TokenizerConfig
from mamba_jax.data.pipeline import evaluation_batches, open_source
from mamba_jax.data.tokenizer import Tokenizer, make_tokenizer
from mamba_jax.errors import InputError
from mamba_jax.evaluation.perplexity import Perplexity, evaluate
from mamba_jax.export.load import LoadedCheckpoint, load_model
from mamba_jax.generation.sampling import SamplingConfig
from mamba_jax.generation.text import complete
from mamba_jax.models.parameters import define
from mamba_jax.sharding import batch_shards, make_mesh, replicated


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationRequest:
    """What to evaluate.

    Attributes:
        split: which text of the training run to read.
        text: folder of text files to read instead; needed for a safetensors folder, which names no data.
        tokenizer: of a safetensors folder; a training run brings its own.
        seq_len: tokens of a window; None takes that of the training run, or 2048.
        batch_size: sequences of a batch; None takes that of the training run, or 8.
        max_batches: read only so many batches, spread over the text; None reads all.
        step: which checkpoint of a training run; None is the newest.
        weights: those of the last update, or their average if the run keeps one.
        prompt: text to continue; None writes no sample.
        num_tokens: most tokens of the continuation.
        sampling: how they are drawn.
        seed: of the sample.
    """

    split: Literal["validation", "train"] = "validation"
    text: str | None = None
    tokenizer: TokenizerConfig = TokenizerConfig()
    seq_len: int | None = None
    batch_size: int | None = None
    max_batches: int | None = None
    step: int | None = None
    weights: Literal["weights", "average"] = "weights"
    prompt: str | None = None
    num_tokens: int = 256
    sampling: SamplingConfig = SamplingConfig()
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("seq_len", "batch_size", "max_batches", "num_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"--{name.replace('_', '-')} must be positive, got {value}")
        if not 0 <= self.seed < 2**32:
            raise InputError(f"--seed must lie in 0 .. 2**32 - 1, got {self.seed}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationReport:
    """What came out.

    Attributes:
        perplexity: of the text; None if there was none to read.
        sample: prompt and continuation; None without a prompt.
    """

    perplexity: Perplexity | None
    sample: str | None


def evaluate_checkpoint(checkpoint: str, request: EvaluationRequest) -> EvaluationReport:
    """Loads a training run or a safetensors folder, reads the text and continues the prompt.

    Raises:
        InputError: one line about what is wrong.
    """
    loaded = load_model(checkpoint, step=request.step, weights=request.weights)
    data = _data_config(loaded, request, checkpoint)
    tokenizer = make_tokenizer(data.tokenizer if data is not None else request.tokenizer)
    if tokenizer.vocab_size > loaded.config.padded_vocab_size:
        raise InputError(
            f"the tokenizer has {tokenizer.vocab_size} ids but {checkpoint} only {loaded.config.padded_vocab_size}: "
            "give the tokenizer it was trained with"
        )
    if request.prompt is not None:
        tokenizer.check_prompt(request.prompt)
    perplexity = _perplexity(loaded, data, request, tokenizer) if data is not None else None
    sample = None
    if request.prompt is not None:
        sample = complete(
            define(loaded.config),
            loaded.params,
            tokenizer,
            request.prompt,
            num_tokens=request.num_tokens,
            key=jax.random.key(request.seed),
            sampling=request.sampling,
        )
    return EvaluationReport(perplexity=perplexity, sample=sample)


def _data_config(loaded: LoadedCheckpoint, request: EvaluationRequest, checkpoint: str) -> DataConfig | None:
    """The text to read as the training source of a data config; None if only a sample is asked for."""
    experiment = loaded.experiment
    tokenizer = request.tokenizer if experiment is None else experiment.data.tokenizer
    if request.text is not None:
        source = TextFolderSource(path=request.text)
    elif experiment is not None:
        source = getattr(experiment.data, request.split)
    else:
        source = None
    if source is None:
        if request.prompt is not None:
            return None
        raise InputError(
            f"{checkpoint} names no {request.split} text: give --text FOLDER, or --prompt for a sample only"
        )
    return DataConfig(
        train=source,
        tokenizer=tokenizer,
        seq_len=request.seq_len or (experiment.data.seq_len if experiment else 2048),
        global_batch=request.batch_size or (experiment.evaluation_batch_size if experiment else 8),
        documents=experiment.data.documents if experiment else "packed",
        cache_dir=experiment.data.cache_dir if experiment else DataConfig.cache_dir,
    )


def _perplexity(
    loaded: LoadedCheckpoint, data: DataConfig, request: EvaluationRequest, tokenizer: Tokenizer
) -> Perplexity:
    if tokenizer.lossy:
        print("warning:", tokenizer.lossy, file=sys.stderr)
    dataset = open_source(data.train, data, tokenizer)
    # Sequences stay whole, so any length will do, whatever the mesh of the training run was.
    mesh = make_mesh(MeshConfig())
    batch_size = -(-data.global_batch // batch_shards(mesh)) * batch_shards(mesh)
    return evaluate(
        define(loaded.config),
        jax.device_put(loaded.params, replicated(mesh)),
        evaluation_batches(dataset, data, batch_size=batch_size, max_batches=request.max_batches),
        mesh=mesh,
        tokens_per_byte=dataset.num_tokens / dataset.num_bytes,
        loss_chunk=512,
    )
