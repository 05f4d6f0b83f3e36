"""What a draft brings: tokens a second with and without it, and how many of its proposals are accepted.

    python benchmarks/run_speculation.py runs/large runs/small
    python benchmarks/run_speculation.py runs/large runs/small --num-proposals 2 4 8 --temperature 0 1

Prompts are pieces of the large model's held-out text. At temperature 0 the texts have to be the same.
"""

import dataclasses
import time
from pathlib import Path
from typing import Any, Literal

import tyro

import harness
import run_decode_quality
from harness import Results, select_platform, setting_here
from mamba_jax.cli import one_line_errors, parse
from mamba_jax.evaluation.checkpoints import byte_tokenizer
from mamba_jax.export.companions import open_tokenizer
from mamba_jax.export.load import load_model
from mamba_jax.generation.sampling import SamplingConfig
from mamba_jax.generator import Generated, Generator, GeneratorConfig

NOTES = (
    "Decoding of the continuations, prompts included in the time, programs compiled before. Acceptance is the share of "
    "the proposals that became text. Equal texts are the same as without the draft; rounding may part two where "
    "two tokens are as likely.",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What to measure.

    Attributes:
        checkpoint: the large model, a training run.
        draft: the small one.
        device: where to run.
        temperature: of the draws.
        num_proposals: tokens that the draft proposes at a time.
        prompts: pieces of held-out text to continue together.
        prompt_length: tokens of each.
        num_tokens: tokens to add to each.
        output: folder of the results.
    """

    checkpoint: tyro.conf.Positional[str]
    draft: tyro.conf.Positional[str]
    device: Literal["cpu", "gpu"] = "cpu"
    temperature: tuple[float, ...] = (0.0, 1.0)
    num_proposals: tuple[int, ...] = (4,)
    prompts: int = 4
    prompt_length: int = 64
    num_tokens: int = 128
    output: Path = harness.RESULTS


def prompts_of(options: Options) -> list[str]:
    """The first windows of the text that the large model was measured on."""
    loaded = load_model(options.checkpoint)
    windows = run_decode_quality.Options(
        checkpoint=options.checkpoint, rows=options.prompts, seq_len=options.prompt_length
    )
    tokenizer = open_tokenizer(loaded.tokenizer or byte_tokenizer(loaded, options.checkpoint))
    return [tokenizer.decode(row) for row in run_decode_quality.read_text(loaded, windows).batch.tokens]


def timed(generator: Generator, prompts: list[str], options: dict[str, Any]) -> tuple[float, list[Generated]]:
    """Tokens a second of a second run, and the texts."""
    generator.generate(prompts, **options)
    start = time.perf_counter()
    found = generator.generate(prompts, **options)
    return sum(len(text.tokens) for text in found) / (time.perf_counter() - start), found


def main() -> None:
    with one_line_errors():
        options = parse(Options, prog="benchmarks/run_speculation.py")
        select_platform(options.device)
        results = Results(options.output, setting_here(harness.hardware(), libraries=("flax",)))
        prompts = prompts_of(options)
        config = GeneratorConfig(rows=len(prompts))
        for temperature in options.temperature:
            settings: dict[str, Any] = {
                "num_tokens": options.num_tokens,
                "sampling": SamplingConfig(temperature=temperature),
            }
            workload = f"{len(prompts)} texts, {options.num_tokens} tokens, temperature {temperature:g}"
            rate, alone = timed(Generator(options.checkpoint, config), prompts, settings)
            results.add("speculation", workload, implementation="no draft", direction="forward", tokens_per_second=rate)
            for number in options.num_proposals:
                with_draft = dataclasses.replace(config, num_proposals=number)
                generator = Generator(options.checkpoint, with_draft, draft=options.draft)
                drafted, found = timed(generator, prompts, settings)
                results.add(
                    "speculation",
                    workload,
                    implementation=f"{number} proposals",
                    direction="forward",
                    tokens_per_second=drafted,
                    speed_up=drafted / rate,
                    acceptance=generator.acceptance,
                    equal_texts=sum(ours.text == theirs.text for ours, theirs in zip(found, alone, strict=True)),
                )
        print(f"wrote {results.write_table(f'speculation_{options.device}', 'Speculative decoding', *NOTES)}")


if __name__ == "__main__":
    main()
