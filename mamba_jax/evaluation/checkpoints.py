"""The work of `eval.py`: held-out loss, tasks and text samples of any checkpoint."""

import contextlib
import dataclasses
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from typing import Annotated, Literal

import jax
import tyro
from jax.sharding import Mesh

from mamba_jax.data.batch import LMBatch
from mamba_jax.data.batches import Task
from mamba_jax.data.config import Documents, FilesSource, Source, TextFolderSource, TokenizerConfig, TokenizerKind
from mamba_jax.data.mixture import Mixture
from mamba_jax.data.pipeline import evaluation_batches, open_data
from mamba_jax.data.shards import TokenDataset
from mamba_jax.data.tokenization.config import tokenizer_kind
from mamba_jax.data.tokenizer import Tokenizer
from mamba_jax.errors import InputError
from mamba_jax.evaluation.answers import Answers, measure_answers
from mamba_jax.evaluation.perplexity import Perplexity, evaluate
from mamba_jax.evaluation.scoring import Scorer
from mamba_jax.evaluation.task_files import read_task
from mamba_jax.evaluation.tasks import TaskResult, measure_task
from mamba_jax.export.companions import open_tokenizer
from mamba_jax.export.load import LoadedCheckpoint, load_model
from mamba_jax.generation.sampling import SamplingConfig
from mamba_jax.generation.text import complete
from mamba_jax.models.config import DType
from mamba_jax.models.parameters import define
from mamba_jax.sharding import batch_shards, make_mesh, replicated
from mamba_jax.sharding.config import MeshConfig
from pallas_kernels.common.rounding import round_up

# A byte vocabulary has 257 ids and is padded to a multiple of `vocab_multiple`. With a multiple of up to 257, the
# padded vocabulary has at most 2 * 257 rows; a larger one belongs to another tokenizer.
_MOST_BYTE_ROWS = 514
# Defaults for a safetensors folder, which does not say how its training text was cut.
# The published models were trained on 2048 tokens (arXiv 2312.00752, section 4.2).
_SEQ_LEN = 2048
# A judgement: enough rows for a small accelerator, few enough for its memory.
_BATCH_SIZE = 8
# No document is predicted from another one.
_DOCUMENTS: Documents = "packed"
# Positions whose logits exist at the same time: 8 rows * 512 * 50,000 ids * 4 bytes = 0.8 GB in float32.
_LOSS_CHUNK = 512
# Texts of tasks are shorter than windows; rows of the published evaluations.
_TASK_BATCH_SIZE = 16


def _tokenizer_flags(
    kind: TokenizerKind | None = None,
    path: str | None = None,
    end_of_document: str | None = None,
    encoding: str | None = None,
) -> TokenizerConfig | None:
    """The tokenizer that flags name; None if they name none."""
    if kind is None and path is None and end_of_document is None:
        return None
    return TokenizerConfig(
        kind=kind or (tokenizer_kind(path) if path else "hf_json"),
        path=path,
        end_of_document=end_of_document or TokenizerConfig.end_of_document,
        encoding=encoding,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationRequest:
    """What to evaluate.

    Attributes:
        split: which text of the training run to read.
        text: folder of text files, or a file of text, JSON lines or parquet, to read instead; needed for a safetensors
            folder, which names no data.
        tokenizer: None takes that of the checkpoint: `tokenizer.json` in its folder, or what its training run used.
        compute_dtype: dtype of matrix products and activations; None takes that of the training run, or of the weights.
        cache_dir: folder where tokenised text is kept for the next call; None keeps nothing. The `data.cache_dir` in a
            checkpoint's config is not used, because it may come from another machine.
        seq_len: tokens of a window; None takes that of the training run, or 2,048.
        batch_size: sequences of a batch; None takes that of the training run, or 8, and 16 for tasks.
        max_batches: read at most this many batches, spread evenly over the text; None reads all.
        step: which checkpoint of a training run; None is the newest.
        weights: "weights" for those of the last update, "average" for their moving average if the run keeps one.
        tasks: tasks to measure; then a text is only read if `text` names one.
        task_data: the file of the task, or a folder with a file NAME.jsonl or NAME_test.jsonl for each.
        limit: the first questions of a task only; None takes all.
        max_length: most tokens of a question that the model sees, which is cut from the left; None cuts nothing.
        prompt: text to continue; None writes no sample.
        num_tokens: largest number of tokens in the continuation.
        sampling: how its tokens are drawn.
        seed: seed of the random draws.
    """

    split: Literal["validation", "train"] = "validation"
    text: str | None = None
    tokenizer: Annotated[TokenizerConfig | None, tyro.conf.arg(constructor=_tokenizer_flags)] = None
    compute_dtype: DType | None = None
    cache_dir: str | None = None
    seq_len: int | None = None
    batch_size: int | None = None
    max_batches: int | None = None
    step: int | None = None
    weights: Literal["weights", "average"] = "weights"
    tasks: tuple[str, ...] = ()
    task_data: str = "data"
    limit: int | None = None
    max_length: int | None = None
    prompt: str | None = None
    num_tokens: int = 256
    sampling: SamplingConfig = SamplingConfig()
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("seq_len", "batch_size", "max_batches", "limit", "max_length", "num_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"--{name.replace('_', '-')} must be positive, got {value}")
        if not 0 <= self.seed < 2**32:
            raise InputError(f"--seed must lie in 0 .. 2**32 - 1, got {self.seed}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Result of `evaluate_checkpoint`.

    Attributes:
        perplexity: loss on the text; None if no text was read.
        answers: what the model answered in a task that makes its batches itself; None for text.
        parts: of a mixture the loss on each part by its name, whose mean `perplexity` is.
        tasks: results of the tasks.
        sample: prompt and continuation; None without a prompt.
        text: name or folder of the text; None if no text was read.
        tokenizer: path of the tokenizer's JSON file, "bytes", or "ids".
        compute_dtype: dtype that matrix products and activations were computed in.
    """

    perplexity: Perplexity | None
    answers: Answers | None
    parts: Mapping[str, Perplexity]
    tasks: tuple[TaskResult, ...]
    sample: str | None
    text: str | None
    tokenizer: str
    compute_dtype: DType


def evaluate_checkpoint(checkpoint: str, request: EvaluationRequest) -> Evaluation:
    """Measures a checkpoint on a text and on tasks, and lets it continue a prompt, as `request` asks.

    Args:
        checkpoint: a run directory, or a folder with `config.json` and safetensors.
        request: which text, tasks, prompt, checkpoint step and settings.

    Raises:
        InputError: checkpoint, text, tasks or tokenizer are missing, damaged or do not fit each other; one line says
            what to do.
    """
    tasks = [read_task(name, request.task_data, limit=request.limit) for name in request.tasks]
    loaded = load_model(checkpoint, step=request.step, weights=request.weights)
    model = dataclasses.replace(loaded.config, compute_dtype=request.compute_dtype or loaded.config.compute_dtype)
    loaded = dataclasses.replace(loaded, config=model)
    tokenizer_config = request.tokenizer or loaded.tokenizer or byte_tokenizer(loaded, checkpoint)
    tokenizer = open_tokenizer(tokenizer_config)
    if tokenizer.vocab_size > model.padded_vocab_size:
        raise InputError(
            f"the tokenizer has {tokenizer.vocab_size} ids but {checkpoint} only {model.padded_vocab_size}: "
            "give the tokenizer it was trained with"
        )
    if request.prompt is not None:
        tokenizer.check_prompt(request.prompt)
    source = _source(loaded, request, checkpoint)
    measured = _Measured() if source is None else _measure(loaded, source, request, tokenizer)
    results: tuple[TaskResult, ...] = ()
    if tasks:
        batch_size = request.batch_size or _TASK_BATCH_SIZE
        scorer = Scorer(define(model), loaded.params, batch_size=batch_size, max_length=request.max_length)
        results = tuple(measure_task(task, tokenizer, scorer) for task in tasks)
    sample = None
    if request.prompt is not None:
        sample = complete(
            define(model),
            loaded.params,
            tokenizer,
            request.prompt,
            num_tokens=request.num_tokens,
            key=jax.random.key(request.seed),
            sampling=request.sampling,
        )
    return Evaluation(
        perplexity=measured.perplexity,
        answers=measured.answers,
        parts=measured.parts,
        tasks=results,
        sample=sample,
        text=None if source is None else source.place,
        tokenizer=tokenizer_config.path or {"byte": "bytes"}.get(tokenizer_config.kind, tokenizer_config.kind),
        compute_dtype=model.compute_dtype,
    )


def byte_tokenizer(loaded: LoadedCheckpoint, checkpoint: str) -> TokenizerConfig:
    """The byte tokenizer, for a checkpoint without a tokenizer file.

    Raises:
        InputError: the model has more ids than bytes need.
    """
    rows = loaded.config.padded_vocab_size
    if rows > _MOST_BYTE_ROWS:
        raise InputError(
            f"{checkpoint} holds no tokenizer.json, and with {rows} ids the model does not read bytes: give "
            "--tokenizer.path FILE, or put it there"
        )
    return TokenizerConfig()


def _source(loaded: LoadedCheckpoint, request: EvaluationRequest, checkpoint: str) -> Source | None:
    """The text to read; None if only tasks or a sample are asked for."""
    if request.text is not None:
        return (FilesSource if os.path.isfile(request.text) else TextFolderSource)(path=request.text)
    if request.tasks:
        return None
    source = getattr(loaded.experiment.data, request.split) if loaded.experiment is not None else None
    if source is None and request.prompt is None:
        raise InputError(
            f"{checkpoint} names no {request.split} text: give --text FOLDER, or --prompt for a sample only"
        )
    if source is not None:
        source.require_present()
    return source


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Measured:
    """What was measured on a source; see `Evaluation`."""

    perplexity: Perplexity | None = None
    answers: Answers | None = None
    parts: Mapping[str, Perplexity] = dataclasses.field(default_factory=dict)


def _measure(loaded: LoadedCheckpoint, source: Source, request: EvaluationRequest, tokenizer: Tokenizer) -> _Measured:
    """Measures a loaded model on text, and on each part of a mixture; what the request leaves open is as trained."""
    if tokenizer.lossy:
        print("warning:", tokenizer.lossy, file=sys.stderr)
    with _cache(request) as cache:
        data = open_data(source, cache, tokenizer)
        # All devices on the data axis: sequences are not split, so any length will do.
        mesh = make_mesh(MeshConfig())
        loaded = dataclasses.replace(loaded, params=jax.device_put(loaded.params, replicated(mesh)))
        if isinstance(data, Task):
            batches = _batches(loaded, data, request, mesh)
            answers = measure_answers(define(loaded.config), loaded.params, batches, mesh=mesh)
            return _Measured(perplexity=_loss(loaded, data, request, mesh), answers=answers)
        if not isinstance(data, Mixture):
            return _Measured(perplexity=_loss(loaded, data, request, mesh))
        parts = {part.part.name: _loss(loaded, part.dataset, request, mesh) for part in data.parts}
        return _Measured(perplexity=Perplexity.mean(list(parts.values()), data.weights), parts=parts)


def _batches(
    loaded: LoadedCheckpoint, data: TokenDataset | Task, request: EvaluationRequest, mesh: Mesh
) -> Iterator[LMBatch]:
    """The batches that a request asks for."""
    experiment = loaded.experiment
    batch_size = request.batch_size or (experiment.evaluation_batch_size if experiment else _BATCH_SIZE)
    return evaluation_batches(
        data,
        seq_len=request.seq_len or (experiment.data.seq_len if experiment else _SEQ_LEN),
        documents=experiment.data.documents if experiment else _DOCUMENTS,
        batch_size=round_up(batch_size, batch_shards(mesh)),
        max_batches=request.max_batches,
    )


def _loss(loaded: LoadedCheckpoint, data: TokenDataset | Task, request: EvaluationRequest, mesh: Mesh) -> Perplexity:
    """Measures a loaded model, whose parameters are on the devices, on one text."""
    return evaluate(
        define(loaded.config),
        loaded.params,
        _batches(loaded, data, request, mesh),
        mesh=mesh,
        tokens_per_byte=data.tokens_per_byte,
        loss_chunk=_LOSS_CHUNK,
    )


@contextlib.contextmanager
def _cache(request: EvaluationRequest) -> Iterator[str]:
    """The folder to keep tokenised text in: the requested one, or a temporary one that is removed afterwards."""
    if request.cache_dir is not None:
        yield request.cache_dir
        return
    try:
        folder = tempfile.TemporaryDirectory(prefix="mamba-jax-")
    except OSError as error:
        raise InputError(f"no room for tokenised text ({error.strerror}): give --cache-dir FOLDER") from None
    with folder as name:
        yield name
