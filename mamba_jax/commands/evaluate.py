"""The program that evaluates a checkpoint."""

import dataclasses
import sys
from typing import Annotated, Literal

import tyro

from mamba_jax import cli
from mamba_jax.evaluation.checkpoints import EvaluationRequest, evaluate_checkpoint
from mamba_jax.evaluation.printed import as_json, as_text


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """Held-out loss, perplexity and bits per byte of a checkpoint, its results on tasks, and text that it writes.

    Attributes:
        checkpoint: a training run's directory, or a folder with config.json and safetensors.
        output: "text", or "json" for a line of JSON for each result.
        request: what to do with it.
    """

    checkpoint: tyro.conf.Positional[str]
    output: Literal["text", "json"] = "text"
    request: Annotated[EvaluationRequest, tyro.conf.arg(name="")] = EvaluationRequest()


def main(prog: str = "python eval.py") -> None:
    """Reads the command line and prints what comes of it.

    Args:
        prog: what it is called by.
    """
    with cli.one_line_errors():
        arguments = cli.parse(Arguments, prog=prog)
        report = evaluate_checkpoint(arguments.checkpoint, arguments.request)
        text = "" if report.text is None else f", text {report.text}"
        print(f"tokenizer {report.tokenizer}, computed in {report.compute_dtype}{text}", file=sys.stderr)
        for result in (as_json if arguments.output == "json" else as_text)(report):
            cli.print_result(result)
