"""Two hundred clients at once, some of whom leave: nobody else loses anything, and nothing is left behind."""

import asyncio
import random
import signal

import openai
import pytest

from mamba_jax.generation.sampling import SamplingConfig
from mamba_jax.generator import Generated, Generator
from tests.evaluation.conftest import SavedRun
from tests.serve.conftest import Running
from tests.serve.load import END, ENDLESS, Asked, served, texts_of_all

CLIENTS, LEAVING = 200, 20


def all_asked() -> list[Asked]:
    draw = random.Random(0)
    leaving = set(draw.sample(range(CLIENTS), LEAVING))
    return [
        Asked(
            seed=number,
            prompt="".join(draw.choices("aé \n", k=draw.randint(1, 30))),
            num_tokens=draw.randint(1, 40),
            temperature=draw.choice([0.0, 0.7, 1.0]),
            stays=number not in leaving,
        )
        for number in range(CLIENTS)
    ]


ASKED = all_asked()


@pytest.fixture(scope="module")
def expected(alone: Generator) -> list[Generated]:
    """What each client that stays must get: what its text is alone."""
    found = []
    for asked in ASKED:
        if asked.stays:
            sampling = SamplingConfig(temperature=asked.temperature)
            found += alone.generate([asked.prompt], num_tokens=asked.num_tokens, sampling=sampling, seeds=asked.seed)
    return found


def test_two_hundred_clients_lose_nothing(server: Running, expected: list[Generated]) -> None:
    found = asyncio.run(texts_of_all(server.options, ASKED))
    assert found == [text.text for text in expected]
    server.wait_for(0)
    assert server.service.generator.engine.is_idle
    assert server.service.generator.engine.num_open == 0
    assert not server.service._jobs
    assert server.service._worker is not None
    assert not server.service._worker._places


@pytest.mark.slow
def test_memory_stays_flat_and_sigterm_drains(saved_run: SavedRun, expected: list[Generated]) -> None:
    with served(saved_run.folder, "--rows", "4", "--max-length", str(2 * ENDLESS)) as server:
        sizes = []
        for _ in range(8):
            found = asyncio.run(texts_of_all(server.options, ASKED))
            assert found == [text.text for text in expected]
            sizes.append(server.resident_bytes)
        # The first rounds compile, and fill the pools of the allocators.
        assert max(sizes[3:]) - sizes[2] < 8 * 2**20, sizes

        with openai.OpenAI(**server.options) as client:
            stream = client.completions.create(
                model="tiny",
                prompt="a",
                n=8,
                max_tokens=3000,
                logit_bias={str(END): -100},
                stream=True,
                stream_options={"include_usage": True},
            )
            next(stream)
            server.process.send_signal(signal.SIGTERM)
            *_, last = stream
        assert last.usage is not None
        assert last.usage.completion_tokens == 8 * 3000
        assert server.process.wait(30) == 0
