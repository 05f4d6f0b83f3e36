"""Evaluates a checkpoint: python eval.py runs/quickstart --prompt "The President"."""

import dataclasses
import sys
from typing import Annotated

import tyro

from mamba_jax.cli import one_line_errors, parse, print_result
from mamba_jax.evaluation.checkpoints import EvaluationRequest, evaluate_checkpoint


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """Held-out loss, perplexity and bits per byte of a checkpoint, and text that it writes.

    Attributes:
        checkpoint: a training run's directory, or a folder with config.json and safetensors.
        request: what to do with it.
    """

    checkpoint: tyro.conf.Positional[str]
    request: Annotated[EvaluationRequest, tyro.conf.arg(name="")] = EvaluationRequest()


def main() -> None:
    with one_line_errors():
        arguments = parse(Arguments, prog="eval.py")
        report = evaluate_checkpoint(arguments.checkpoint, arguments.request)
        text = "" if report.text is None else f", text {report.text}"
        print(f"tokenizer {report.tokenizer}, computed in {report.compute_dtype}{text}", file=sys.stderr)
        if report.perplexity is not None:
            result = report.perplexity
            print_result(
                f"tokens         {result.num_tokens:,}\n"
                f"loss           {result.loss:.4f} nats/token\n"
                f"perplexity     {result.perplexity:.3f}\n"
                f"bits per byte  {result.bits_per_byte:.4f}"
            )
        if report.sample is not None:
            print_result(report.sample)


if __name__ == "__main__":
    main()
