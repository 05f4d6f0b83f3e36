"""The program that continues prompts; `python -m mamba_jax.generate` runs it."""

import dataclasses
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

import tyro

from mamba_jax import cli
from mamba_jax.cli import one_line_errors, print_result
from mamba_jax.errors import InputError
from mamba_jax.generation.context import Context
from mamba_jax.generation.sampling import SamplingConfig
from mamba_jax.generator import Generated, Generator, GeneratorConfig, Piece
from mamba_jax.loaded import load
from mamba_jax.models.mixers.declaration import DType


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """Continues prompts with a checkpoint, and shows the text as it comes; without prompts it asks for them.

    Attributes:
        checkpoint: a training run's directory, or a folder with config.json and safetensors.
        prompt: texts to continue.
        prompts: a file with one prompt a line; - is standard input.
        num_tokens: most tokens to add to each prompt; 0 only reads them, for --save-state.
        sampling: how tokens are drawn.
        seed: of the first prompt; the next has the next.
        stop: strings that end a text.
        output: "text", or "json" for a line with prompt, text, tokens, log_probabilities and finished for each prompt.
        load_state: a file of --save-state, which stands in front of every prompt.
        save_state: a file to write, with what the model knows after prompt and continuation.
        step: which checkpoint of a training run; None is the newest.
        average: the moving average of a training run's weights.
        compute_dtype: dtype of matrix products and activations; None takes that of the checkpoint.
        draft: a smaller checkpoint with the same tokenizer, which proposes tokens; the text has the same distribution.
        num_beams: searches for the likeliest continuation among so many at once, instead of drawing one.
        length_penalty: of that search: log-probabilities are compared divided by the length to this power.
        generator: how the model runs.
    """

    checkpoint: tyro.conf.Positional[str]
    prompt: tuple[str, ...] = ()
    prompts: str | None = None
    num_tokens: int = 128
    sampling: SamplingConfig = SamplingConfig()
    seed: int = 0
    stop: tuple[str, ...] = ()
    output: Literal["text", "json"] = "text"
    load_state: str | None = None
    save_state: str | None = None
    step: int | None = None
    average: bool = False
    compute_dtype: DType | None = None
    draft: str | None = None
    num_beams: int | None = None
    length_penalty: float = 1.0
    generator: Annotated[GeneratorConfig, tyro.conf.arg(name="")] = dataclasses.field(default_factory=GeneratorConfig)


def main(prog: str = "python -m mamba_jax.generate") -> None:
    """Reads the command line and continues what it names.

    Args:
        prog: what it is called by.
    """
    with one_line_errors():
        arguments = cli.parse(Arguments, prog=prog)
        prompts = _prompts(arguments)
        if arguments.save_state is not None and len(prompts) != 1:
            raise InputError(f"--save-state keeps what follows one prompt, but there are {len(prompts)}: give one")
        if arguments.num_tokens == 0 and arguments.save_state is None:
            raise InputError("--num-tokens 0 only reads prompts, for --save-state: give that too, or more tokens")
        if arguments.num_beams is not None:
            for name in ("draft", "save_state", "stop"):
                if getattr(arguments, name):
                    raise InputError(f"--num-beams searches without --{name.replace('_', '-')}: leave one out")
        generator = _generator(arguments)
        context = None if arguments.load_state is None else generator.load(arguments.load_state)
        if prompts:
            _continue(arguments, generator, prompts, context)
        else:
            _ask(arguments, generator, context)
        if arguments.draft is not None:
            print(f"{generator.acceptance:.0%} of the draft's proposals were accepted", file=sys.stderr)


def _prompts(arguments: Arguments) -> list[str]:
    """The prompts that the command line names; none if it shall ask."""
    if arguments.prompts is None:
        return list(arguments.prompt)
    if arguments.prompt:
        raise InputError("--prompt and --prompts both say what to continue: leave one out")
    try:
        text = sys.stdin.read() if arguments.prompts == "-" else Path(arguments.prompts).read_text("utf-8")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise InputError(f"cannot read the prompts in {arguments.prompts} ({reason})") from None
    lines = [line for line in text.splitlines() if line]
    if not lines:
        raise InputError(f"{arguments.prompts} has no prompts: write one a line")
    return lines


def _generator(arguments: Arguments) -> Generator:
    """The checkpoint, ready to write."""
    weights = "average" if arguments.average else "weights"
    model = load(arguments.checkpoint, step=arguments.step, weights=weights, compute_dtype=arguments.compute_dtype)
    return Generator(model, arguments.generator, draft=arguments.draft)


def _stream(arguments: Arguments, generator: Generator, prompts: list[str], context: Context | None) -> Iterator[Piece]:
    """The continuations as the command line asks for them."""
    return generator.stream(
        prompts,
        num_tokens=arguments.num_tokens,
        sampling=arguments.sampling,
        seeds=arguments.seed,
        stop=arguments.stop,
        context=context,
    )


def _continue(arguments: Arguments, generator: Generator, prompts: list[str], context: Context | None) -> None:
    """Continues the prompts, shows them, and keeps the state if asked to."""
    if arguments.num_beams is not None:
        _search(arguments, generator, prompts, context)
        return
    added: tuple[int, ...] = ()
    if arguments.num_tokens:
        added = _show(arguments, prompts, _timed(_stream(arguments, generator, prompts, context)))
    if arguments.save_state is not None:
        after = generator.read(prompts[0], context=context)
        generator.save(generator.extended(after, added) if added else after, arguments.save_state)
        print(f"wrote {arguments.save_state} ({len(after.tokens) + len(added):,} tokens)", file=sys.stderr)


def _ask(arguments: Arguments, generator: Generator, context: Context | None) -> None:
    """Continues what is typed, line by line, until the input ends."""
    print("a line is a prompt; the end of input (Ctrl-D) ends", file=sys.stderr)
    while True:
        print("> ", end="", file=sys.stderr, flush=True)
        if not (line := sys.stdin.readline()):
            return
        if prompt := line.rstrip("\n"):
            _continue(arguments, generator, [prompt], context)


def _search(arguments: Arguments, generator: Generator, prompts: list[str], context: Context | None) -> None:
    """Shows the best continuation of each prompt, or as JSON all that were found."""
    assert arguments.num_beams is not None
    for prompt in prompts:
        found = generator.search(
            prompt,
            num_beams=arguments.num_beams,
            num_tokens=arguments.num_tokens,
            length_penalty=arguments.length_penalty,
            context=context,
        )
        if arguments.output == "json":
            whole = [dataclasses.asdict(continuation) for continuation in found]
            print_result(json.dumps({"prompt": prompt, "found": whole}, ensure_ascii=False))
        else:
            print_result(f"{prompt}{found[0].text}" + ("" if len(prompts) == 1 else "\n"))


def _show(arguments: Arguments, prompts: list[str], pieces: Iterator[Piece]) -> tuple[int, ...]:
    """Prints continuations as the command line asks for them; the tokens of the last one."""
    if arguments.output == "json" or len(prompts) > 1:
        return _show_in_order(arguments, prompts, pieces)
    print(prompts[0], end="", flush=True)
    tokens: tuple[int, ...] = ()
    for piece in pieces:
        print(piece.text, end="", flush=True)
        tokens = () if piece.generated is None else piece.generated.tokens
    print_result("")
    return tokens


def _show_in_order(arguments: Arguments, prompts: list[str], pieces: Iterator[Piece]) -> tuple[int, ...]:
    """Prints each continuation when it and those of the prompts before are whole; the tokens of the last one."""
    whole: dict[int, Generated] = {}
    shown = 0
    for piece in pieces:
        if piece.generated is not None:
            whole[piece.prompt] = piece.generated
        while shown in whole:
            prompt, generated = prompts[shown], whole[shown]
            if arguments.output == "json":
                print_result(json.dumps({"prompt": prompt} | dataclasses.asdict(generated), ensure_ascii=False))
            else:
                print_result(f"{prompt}{generated.text}\n")
            shown += 1
    return whole[shown - 1].tokens


def _timed(pieces: Iterator[Piece]) -> Iterator[Piece]:
    """Passes pieces on, and says at the end how many tokens a second came after the first; that waits for compiling."""
    start = time.perf_counter()
    first, early, tokens = None, 0, 0
    open_prompts: dict[int, int] = {}
    for piece in pieces:
        now = time.perf_counter()
        open_prompts[piece.prompt] = piece.num_tokens
        tokens = sum(open_prompts.values())
        if first is None:
            first, early = now, tokens
        yield piece
    if first is not None:
        seconds = time.perf_counter() - first
        rate = f"{(tokens - early) / seconds:,.0f} tokens/s after" if tokens > early and seconds else "all after"
        print(f"\n{tokens:,} tokens, {rate} the first {first - start:.1f} s", file=sys.stderr)
