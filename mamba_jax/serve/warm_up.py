"""Compiles what a server needs for its first requests."""

from mamba_jax.generation.sampling import SamplingConfig
from mamba_jax.generation.text_engine import TextRequest
from mamba_jax.generator import Generator


def warm_up(generator: Generator, longest: int) -> None:
    """Continues and gives up a few prompts, so that no client waits for the programs that nearly all requests need.

    Penalties, biases and min-p compile a program of their own when they first come, and so do longer prompts.

    Args:
        generator: the model; nothing else may be under way.
        longest: tokens of the longest prompts; those of every shorter length come with them.
    """
    engine, max_length, num_tokens = generator.engine, generator.decoder.max_length, 2
    for length in engine.padded_lengths(max(longest, 1)):
        prompt = [0] * (length if max_length is None else max(min(length, max_length - num_tokens), 1))
        asked = TextRequest(prompt=prompt, num_tokens=num_tokens, sampling=SamplingConfig(temperature=0.0))
        numbers = [engine.submit(engine.prepare(asked)) for _ in range(2)]
        engine.step()
        engine.cancel(numbers[0])
        while not engine.is_idle:
            engine.step()
