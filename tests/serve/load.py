"""Many clients of one server, for tests; and the speed over HTTP beside that of the engine alone.

python -m tests.serve.load runs/quickstart
"""

import asyncio
import contextlib
import dataclasses
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import openai
import tyro

from mamba_jax import cli
from mamba_jax.cli import one_line_errors
from mamba_jax.generation.sampling import SamplingConfig
from mamba_jax.generation.text_engine import TextRequest
from mamba_jax.generator import Generator, GeneratorConfig

ROOT = Path(__file__).parents[2]
# A text of so many tokens is not finished before a test is.
ENDLESS = 10**6
# The end of a document, by a tokenizer of bytes.
END = 256


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asked:
    """What a client asks for.

    Attributes:
        seed: the seed.
        prompt: the prompt.
        num_tokens: most tokens.
        temperature: 0 takes the likeliest.
        stays: False if it goes away before it has got its text, which never ends.
    """

    seed: int
    prompt: str
    num_tokens: int
    temperature: float
    stays: bool = True

    @property
    def fields(self) -> dict[str, Any]:
        """The body of its request."""
        settings = {"max_tokens": self.num_tokens, "temperature": self.temperature, "seed": self.seed}
        endless = {} if self.stays else {"max_tokens": ENDLESS, "logit_bias": {str(END): -100}}
        return {"model": "tiny", "prompt": self.prompt} | settings | endless

    @property
    def text(self) -> TextRequest:
        """The same for an engine."""
        sampling = SamplingConfig(temperature=self.temperature)
        return TextRequest(prompt=self.prompt, num_tokens=self.num_tokens, sampling=sampling, seed=self.seed)


async def texts_of_all(options: dict[str, Any], asked: Sequence[Asked]) -> list[str]:
    """What the clients that stay get, when all ask at once; every other one reads a stream."""
    async with openai.AsyncOpenAI(**options) as client:
        found = await asyncio.gather(*(_text_of(client, one) for one in asked))
    return [text for text in found if text is not None]


async def _text_of(client: openai.AsyncOpenAI, asked: Asked) -> str | None:
    """What one client gets; None if it leaves, when some has come or while it waits for all."""
    if asked.seed % 2:
        chunks = await client.completions.create(**asked.fields, stream=True)
        if asked.stays:
            return "".join([chunk.choices[0].text async for chunk in chunks])
        await anext(aiter(chunks))
        await chunks.close()
    elif asked.stays:
        return (await client.completions.create(**asked.fields)).choices[0].text
    else:
        with contextlib.suppress(openai.APITimeoutError):
            await client.completions.create(**asked.fields, timeout=1.0)
            raise AssertionError("a text that never ends has ended")
    return None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Process:
    """A server in a process of its own.

    Attributes:
        process: the process.
        options: what clients of the openai package need to know.
    """

    process: subprocess.Popen[str]
    options: dict[str, Any]

    @property
    def processor_seconds(self) -> float:
        """The time of processors that it has taken."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    @property
    def resident_bytes(self) -> int:
        """The memory that it takes."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")


@contextlib.contextmanager
def served(checkpoint: str | Path, *flags: str) -> Iterator[Process]:
    """A server of a checkpoint, which is ready; it is killed at the end unless it has ended before."""
    command = [sys.executable, "-m", "mamba_jax.serve", str(checkpoint), "--name", "tiny", "--port", "0", *flags]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, bufsize=1)
    try:
        assert process.stdout is not None
        ready = re.fullmatch(r"serving tiny at 127\.0\.0\.1 port (\d+), \d+ rows\n", process.stdout.readline())
        assert ready is not None
        url = f"http://127.0.0.1:{ready[1]}/v1"
        yield Process(process=process, options={"base_url": url, "api_key": "key", "max_retries": 0, "timeout": 600})
    finally:
        process.kill()
        process.communicate()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """Continues 200 texts of mixed lengths by an engine and over HTTP, and prints the tokens a second of both.

    Attributes:
        checkpoint: a model with a tokenizer of bytes.
    """

    checkpoint: tyro.conf.Positional[str]


def main() -> None:
    """Measures what the command line names."""
    with one_line_errors():
        measure(cli.parse(Arguments, prog="python -m tests.serve.load").checkpoint)


def measure(checkpoint: str) -> None:
    """Prints the best of five rounds, in each of which every kind has its turn."""
    draw = random.Random(0)
    asked = [
        Asked(
            seed=number,
            prompt="".join(draw.choices("abcdefgh ", k=draw.randint(8, 256))),
            num_tokens=draw.randint(16, 128),
            temperature=1.0,
        )
        for number in range(200)
    ]
    engine = Generator(checkpoint, GeneratorConfig(rows=16, max_length=4096)).engine

    def alone(asked: Sequence[Asked]) -> int:
        pieces = engine.follow([engine.prepare(one.text) for one in asked])
        return sum(len(piece.tokens) for piece in pieces)

    with served(checkpoint, "--warm-up", "256") as process:
        kinds: dict[str, tuple[list[Asked], Callable[[list[Asked]], object]]] = {"engine": (asked, alone)}
        # Odd seeds read streams.
        for name, factor, offset in (("whole answers", 2, 0), ("streams", 2, 1), ("half of each", 1, 0)):
            ours = [dataclasses.replace(one, seed=factor * one.seed + offset) for one in asked]
            kinds[name] = ours, lambda ours: asyncio.run(texts_of_all(process.options, ours))
        tokens = {name: alone(ours) for name, (ours, _) in kinds.items()}
        # Of each round: seconds, and those of processors here and in the server.
        rounds: dict[str, list[tuple[float, ...]]] = {name: [] for name in kinds}
        for name in [*kinds] * 5:
            ours, run = kinds[name]
            clocks = (time.perf_counter, time.process_time, lambda: process.processor_seconds)
            start = [clock() for clock in clocks]
            run(ours)
            rounds[name].append(tuple(clock() - began for clock, began in zip(clocks, start, strict=True)))
    for name, found in rounds.items():
        seconds, here, server = min(found)
        print(
            f"{name}: {tokens[name]:,} tokens in {seconds:.2f} s, {tokens[name] / seconds:,.0f} a second; processors: "
            f"{here:.2f} s here, {server:.2f} s in the server"
        )


if __name__ == "__main__":
    main()
