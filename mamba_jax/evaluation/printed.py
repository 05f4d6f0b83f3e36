"""Results of an evaluation as they are printed."""

import dataclasses
import json

from mamba_jax.evaluation.answers import Answers
from mamba_jax.evaluation.checkpoints import Evaluation
from mamba_jax.evaluation.perplexity import Perplexity
from mamba_jax.evaluation.tasks import TaskResult


def as_text(evaluation: Evaluation) -> list[str]:
    """Paragraphs for people: one for each part of a mixture, the text's, answers, one for each task, the sample."""
    found = [f"part           {name}\n{_of_text(result)}" for name, result in evaluation.parts.items()]
    found += [] if evaluation.perplexity is None else [_of_text(evaluation.perplexity)]
    found += [] if evaluation.answers is None else [_of_answers(evaluation.answers)]
    found += [_of_task(result) for result in evaluation.tasks]
    return found if evaluation.sample is None else [*found, evaluation.sample]


def as_json(evaluation: Evaluation) -> list[str]:
    """The same as JSON objects, a line each, with the fields of `Perplexity`, `Answers`, `TaskResult`, and `sample`."""
    records = [{"part": name, **dataclasses.asdict(result)} for name, result in evaluation.parts.items()]
    records += [] if evaluation.perplexity is None else [dataclasses.asdict(evaluation.perplexity)]
    records += [] if evaluation.answers is None else [dataclasses.asdict(evaluation.answers)]
    records += [dataclasses.asdict(result) for result in evaluation.tasks]
    if evaluation.sample is not None:
        records.append({"sample": evaluation.sample})
    return [json.dumps(record, ensure_ascii=False) for record in records]


def _of_text(result: Perplexity) -> str:
    return (
        f"tokens         {result.num_tokens:,}\n"
        f"loss           {result.loss:.4f} nats/token\n"
        f"perplexity     {result.perplexity:.3f}\n"
        f"bits per byte  {result.bits_per_byte:.4f}"
    )


def _of_answers(result: Answers) -> str:
    return (
        f"answers        {result.num_answers:,} in {result.num_rows:,} rows\n"
        f"accuracy       {result.accuracy:.4f}\n"
        f"exact match    {result.exact_match:.4f} of the rows"
    )


def _of_task(result: TaskResult) -> str:
    """A task's name and figures, of which those with choices and those without have different ones."""
    lines = [
        f"task           {result.task}",
        f"examples       {result.examples:,}",
        f"accuracy       {_share(result.accuracy, result.accuracy_error)}",
    ]
    if result.normalised_accuracy is not None:
        lines.append(f"normalised     {_share(result.normalised_accuracy, result.normalised_accuracy_error)}")
    if result.perplexity is not None:
        # Models without training reach numbers of a hundred digits.
        digits = ".3f" if result.perplexity < 1e6 else ".4g"
        lines.append(f"perplexity     {result.perplexity:{digits}}")
    return "\n".join(lines)


def _share(value: float, error: float | None) -> str:
    return f"{value:.4f}" if error is None else f"{value:.4f} +- {error:.4f}"
