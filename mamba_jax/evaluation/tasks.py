"""Accuracy and perplexity of a model on tasks."""

import dataclasses
import math
import sys
import time
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Int

from mamba_jax.data.tokenizer import Tokenizer
from mamba_jax.errors import InputError, short
from mamba_jax.evaluation.perplexity import exp_of
from mamba_jax.evaluation.scoring import Score, Scorer
from mamba_jax.evaluation.task_files import Question, TaskFile

_SECONDS_BETWEEN_REPORTS = 10.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskResult:
    """How a model does on a task.

    Attributes:
        task: its name.
        examples: number of questions.
        accuracy: share of the questions whose right continuation has the highest log-probability of the choices, or,
            for tasks without choices, whose every token is the likeliest at its place.
        accuracy_error: its standard error, sqrt(p (1 - p) / (n - 1)); None for a single question.
        normalised_accuracy: of log-probabilities divided by the characters of the choice; None without choices.
        normalised_accuracy_error: its standard error.
        perplexity: exp(-mean over questions of log p of the continuation); None with choices.
        tokens: number of tokens that were scored.
    """

    task: str
    examples: int
    accuracy: float
    accuracy_error: float | None
    normalised_accuracy: float | None
    normalised_accuracy_error: float | None
    perplexity: float | None
    tokens: int


def measure_task(task: TaskFile, tokenizer: Tokenizer, scorer: Scorer) -> TaskResult:
    """Measures a model on a task, and says on standard error how far it is and how fast it was.

    Raises:
        InputError: the tokenizer has no ids for a continuation, or see `Scorer.score`.
    """
    pairs = encode_pairs(tokenizer, [(q.context, text) for q in task.questions for text in q.continuations])
    owners = [question for question in task.questions for _ in question.continuations]
    for question, (_, ids) in zip(owners, pairs, strict=True):
        if not len(ids):
            texts = short(question.continuations)
            raise InputError(f"{task.path}, line {question.line}: the tokenizer has no ids for one of {texts}")
    start = time.perf_counter()
    scores = scorer.score(pairs, progress=_reports(task.name, len(pairs)))
    seconds = time.perf_counter() - start
    tokens = sum(len(context) + len(ids) - 1 for context, ids in pairs)
    print(
        f"{task.name}: {tokens:,} tokens in {seconds:.1f} s with compiling, {tokens / seconds:,.0f} tokens/s",
        file=sys.stderr,
    )
    return _result(task, scores)


def encode_pairs(
    tokenizer: Tokenizer, pairs: Sequence[tuple[str, str]]
) -> list[tuple[Int[np.ndarray, " _"], Int[np.ndarray, " _"]]]:
    """Token ids of contexts and continuations, with the cut where `lm_eval` has it.

    White space at the end of a context goes to the continuation, as a tokenizer would join it to the next word. Both
    are encoded together, and what is behind as many ids as the context has alone is the continuation. A context without
    ids becomes the end-of-document id, behind which a document starts.

    Args:
        tokenizer: that of the model.
        pairs: context and continuation.
    """
    starts = [context.rstrip() for context, _ in pairs]
    wholes = [context + continuation for context, continuation in pairs]
    distinct = list(dict.fromkeys(starts + wholes))
    ids = dict(zip(distinct, tokenizer.encode_batch(distinct), strict=True))
    nothing = np.array([tokenizer.end_of_document], np.int32)
    return [
        (ids[start] if len(ids[start]) else nothing, ids[whole][len(ids[start]) :])
        for start, whole in zip(starts, wholes, strict=True)
    ]


def _reports(name: str, total: int) -> Callable[[int], None]:
    """Says how many texts are done, now and then."""
    last = time.perf_counter()

    def report(done: int) -> None:
        nonlocal last
        if (now := time.perf_counter()) - last > _SECONDS_BETWEEN_REPORTS:
            last = now
            print(f"{name}: {done:,} of {total:,} texts", file=sys.stderr)

    return report


def _result(task: TaskFile, scores: Sequence[Score]) -> TaskResult:
    """What follows from the scores of all continuations, in the order of the questions."""
    rest = iter(scores)
    of_questions = [(question, [next(rest) for _ in question.continuations]) for question in task.questions]
    log_p = [score.log_probability for score in scores]
    perplexity = normalised = None
    if task.is_choice:
        right = [_chosen(own, question, (1,) * len(own)) for question, own in of_questions]
        normalised = [_chosen(own, question, question.sizes) for question, own in of_questions]
    else:
        right = [score.is_greedy for score in scores]
        perplexity = exp_of(-math.fsum(log_p) / len(log_p))
    return TaskResult(
        task=task.name,
        examples=len(task.questions),
        accuracy=sum(right) / len(right),
        accuracy_error=_standard_error(right),
        normalised_accuracy=None if normalised is None else sum(normalised) / len(normalised),
        normalised_accuracy_error=None if normalised is None else _standard_error(normalised),
        perplexity=perplexity,
        tokens=sum(len(score.log_probabilities) for score in scores),
    )


def _chosen(scores: Sequence[Score], question: Question, sizes: Sequence[int]) -> bool:
    """Whether the right choice has the highest log-probability for its size; the first of equal ones counts."""
    values = [score.log_probability / size for score, size in zip(scores, sizes, strict=True)]
    return int(np.argmax(values)) == question.answer


def _standard_error(right: Sequence[bool]) -> float | None:
    mean = sum(right) / len(right)
    return math.sqrt(mean * (1 - mean) / (len(right) - 1)) if len(right) > 1 else None
