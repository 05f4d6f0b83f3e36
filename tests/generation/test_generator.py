"""Text from a checkpoint: whole and in pieces, with stops, contexts and drafts; and the program that does it."""

import dataclasses
import io
import json
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from mamba_jax.commands import generate as program
from mamba_jax.config import MeshConfig, TokenizerConfig
from mamba_jax.errors import InputError
from mamba_jax.generation.sampling import SamplingConfig
from mamba_jax.generator import Generator, GeneratorConfig
from mamba_jax.loaded import Model, load
from tests.evaluation.conftest import SavedRun, saved_run

__all__ = ["saved_run"]

GREEDY = SamplingConfig(temperature=0.0)
PROMPTS = ["aé a", "a", "é é é é é a\naaé é\n", "aa é a é"]


@pytest.fixture(scope="module")
def model(saved_run: SavedRun) -> Model:
    return load(saved_run.folder)


@pytest.fixture(scope="module")
def generator(model: Model) -> Generator:
    return Generator(model, GeneratorConfig(rows=4))


@pytest.fixture(scope="module")
def texts(generator: Generator) -> list[Any]:
    return generator.generate(PROMPTS, num_tokens=20, sampling=SamplingConfig(temperature=0.8), seeds=[5, 1, 2, 9])


def test_a_continuation_is_that_of_the_full_forward_pass(generator: Generator, model: Model) -> None:
    (found,) = generator.generate(["aé a"], num_tokens=9, sampling=GREEDY)
    ids = list("aé a".encode())
    for token, log_probability in zip(found.tokens, found.log_probabilities, strict=True):
        log_probabilities = jax.nn.log_softmax(model([ids]).logits[0, -1, :257])
        assert token == int(np.argmax(log_probabilities))
        # Logits of order 10, sums of some float32 products in another order.
        np.testing.assert_allclose(log_probability, log_probabilities[token], rtol=0, atol=10 * 32 * 2.0**-24)
        ids.append(token)
    assert found.text == bytes(token for token in found.tokens if token < 256).decode(errors="replace")


def test_pieces_are_the_text(generator: Generator, texts: list[Any]) -> None:
    for number, (prompt, seed) in enumerate(zip(PROMPTS, [5, 1, 2, 9], strict=True)):
        settings = SamplingConfig(temperature=0.8)
        pieces = list(generator.stream(prompt, num_tokens=20, sampling=settings, seeds=seed))
        assert "".join(piece.text for piece in pieces) == texts[number].text
        assert [piece.generated for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
        assert pieces[-1].generated == texts[number]
        assert pieces[-1].num_tokens == len(texts[number].tokens)


def test_nothing_of_a_stop_string_is_shown(generator: Generator, texts: list[Any]) -> None:
    longest = max(texts, key=lambda found: len(found.text))
    number = texts.index(longest)
    stop = longest.text[7:10]
    settings = [SamplingConfig(temperature=0.8)]
    options: dict[str, Any] = {"num_tokens": 20, "sampling": settings, "seeds": [[5, 1, 2, 9][number]]}
    (found,) = generator.generate([PROMPTS[number]], stop=["not there", stop], **options)
    assert found.text == longest.text[: longest.text.find(stop)]
    assert found.finished == "stop"
    assert len(found.tokens) <= len(longest.tokens)
    # What was given up does not disturb what comes next.
    assert generator.generate([PROMPTS[number]], **options) == [longest]


def test_a_text_that_nobody_reads_on_is_given_up(generator: Generator, texts: list[Any]) -> None:
    stream = generator.stream(PROMPTS, num_tokens=20)
    next(stream)
    # As when the caller's loop ends early.
    del stream
    assert generator.engine.num_active == 0
    again = generator.generate(PROMPTS, num_tokens=20, sampling=SamplingConfig(temperature=0.8), seeds=[5, 1, 2, 9])
    assert again == texts


def test_streams_of_one_generator_are_read_in_turns(generator: Generator, texts: list[Any]) -> None:
    settings, seeds = SamplingConfig(temperature=0.8), [5, 1, 2, 9]
    streams = [generator.stream(PROMPTS[i], num_tokens=20, sampling=settings, seeds=seeds[i]) for i in range(4)]
    given_up = generator.stream(PROMPTS, num_tokens=20)
    next(given_up)
    found: dict[int, list[Any]] = {number: [next(stream)] for number, stream in enumerate(streams)}
    del given_up
    for number in (3, 1, 0, 2):
        found[number] += streams[number]
        assert "".join(piece.text for piece in found[number]) == texts[number].text
        assert tuple(token for piece in found[number] for token in piece.tokens) == texts[number].tokens
        assert found[number][-1].generated == texts[number]
    assert generator.engine.is_idle
    assert generator.engine.num_open == 0


def test_a_context_stands_in_front_of_every_prompt(generator: Generator, tmp_path: Path) -> None:
    context = generator.read("é a")
    generator.save(context, tmp_path / "state.safetensors")
    kept = generator.load(tmp_path / "state.safetensors")
    whole = generator.generate(["é aé", "é a a"], num_tokens=6, sampling=GREEDY)
    for one in (context, kept):
        found = generator.generate(["é", " a"], num_tokens=6, sampling=GREEDY, context=one)
        assert [text.tokens for text in found] == [text.tokens for text in whole]
    (bare,) = generator.generate([""], num_tokens=6, sampling=GREEDY, context=generator.read("é", context=context))
    assert bare.tokens == whole[0].tokens


def test_beams_find_likelier_texts_than_the_greedy_one(generator: Generator) -> None:
    (greedy,) = generator.generate(["aé a"], num_tokens=6, sampling=GREEDY)
    (one,) = generator.search("aé a", num_beams=1, num_tokens=6)
    assert (one.text, one.tokens, one.finished) == (greedy.text, greedy.tokens, greedy.finished)
    best, *others = generator.search("aé a", num_beams=3, num_tokens=6, length_penalty=0.0)
    # Sums of six log-probabilities of another program: some ten roundings of numbers up to 30.
    assert best.log_probability >= one.log_probability - 30 * 2.0**-20
    assert [best.score, *(other.score for other in others)] == sorted((best.score, *(o.score for o in others)))[::-1]
    behind = generator.search(" a", num_beams=3, num_tokens=6, length_penalty=0.0, context=generator.read("aé"))
    assert [found.text for found in behind] == [best.text, *(other.text for other in others)]


def test_a_draft_changes_nothing_but_the_time(model: Model, generator: Generator) -> None:
    small = Model(model.config, jax.tree.map(lambda leaf: leaf * 1.02, model.params), tokenizer=TokenizerConfig())
    with_draft = Generator(model, GeneratorConfig(rows=2, num_proposals=3), draft=small)
    found = with_draft.generate(PROMPTS[:3], num_tokens=12, sampling=GREEDY)
    assert found == [
        dataclasses.replace(text, log_probabilities=found[number].log_probabilities)
        for number, text in enumerate(generator.generate(PROMPTS[:3], num_tokens=12, sampling=GREEDY))
    ]
    assert 0 < with_draft.acceptance <= 1


def test_devices_share_out_rows_and_channels(model: Model, generator: Generator) -> None:
    split = Generator(model, GeneratorConfig(rows=4, mesh=MeshConfig(data=jax.device_count() // 2, tensor=2)))
    found = split.generate(PROMPTS, num_tokens=8, sampling=GREEDY)
    expected = generator.generate(PROMPTS, num_tokens=8, sampling=GREEDY)
    assert [text.tokens for text in found] == [text.tokens for text in expected]
    kernel = split.decoder.params["layers"]["mixer"]["in_proj"]["kernel"].arrays[0]
    assert kernel.addressable_shards[0].data.size * 2 == kernel.size


def test_int8_is_split_over_devices_too(model: Model) -> None:
    split, whole = (
        Generator(model, GeneratorConfig(rows=4, weights="int8", mesh=mesh))
        for mesh in (MeshConfig(data=4, tensor=2), MeshConfig(data=1))
    )
    found, expected = (one.generate(PROMPTS, num_tokens=2, sampling=GREEDY) for one in (split, whole))
    assert [text.tokens for text in found] == [text.tokens for text in expected]


def test_a_mesh_that_does_not_fit_is_refused(model: Model) -> None:
    with pytest.raises(InputError, match="tensor=64 does not fit 8 devices"):
        Generator(model, GeneratorConfig(mesh=MeshConfig(data=1, tensor=64)))


def test_rounded_matrices_and_states_give_nearly_the_same(model: Model, generator: Generator) -> None:
    rounded = Generator(
        Model(dataclasses.replace(model.config, compute_dtype="bfloat16"), model.params, tokenizer=TokenizerConfig()),
        GeneratorConfig(rows=4, weights="int8", state_dtype="bfloat16"),
    )
    options: dict[str, Any] = {"num_tokens": 1, "sampling": SamplingConfig(logit_bias=((97, 1e4),))}
    found, expected = (one.generate(PROMPTS, **options) for one in (rounded, generator))
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.tokens == theirs.tokens == (97,)
        # Logits of order 10 from matrices and activations that are off by 2^-8 of themselves, through two layers.
        np.testing.assert_allclose(ours.log_probabilities, theirs.log_probabilities, rtol=0.2, atol=1.0)


def test_weights_that_are_damaged_end_in_one_line(model: Model) -> None:
    params = jax.tree.map(lambda leaf: leaf * np.nan, model.params)
    broken = Generator(Model(model.config, params, tokenizer=TokenizerConfig()), GeneratorConfig(rows=4))
    with pytest.raises(InputError, match="logits are not finite"):
        broken.generate(PROMPTS, num_tokens=2)
    assert broken.engine.is_idle


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": [""]}, "the prompt is empty"),
        ({"prompts": ["a", "b"], "seeds": [1]}, "2 prompts but 1 seeds"),
        ({"sampling": [GREEDY, GREEDY]}, "1 prompts but 2 settings"),
        ({"stop": [""]}, "stop string has no characters"),
        ({"num_tokens": 0}, "must be positive, got 0"),
        ({"seeds": [-1]}, "seed must lie in"),
    ],
)
def test_what_cannot_be_continued_is_refused(generator: Generator, changes: dict[str, Any], message: str) -> None:
    options: dict[str, Any] = {"prompts": ["a"], **changes}
    with pytest.raises(InputError, match=message):
        generator.generate(**options)
    assert generator.engine.is_idle


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr("sys.argv", ["generate", *arguments])
    program.main()


def test_the_program_shows_the_text(
    monkeypatch: pytest.MonkeyPatch, saved_run: SavedRun, generator: Generator, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, few = str(saved_run.folder), ("--num-tokens", "12", "--sampling.temperature", "0", "--rows", "4")
    run(monkeypatch, folder, "--prompt", "aé a", *few)
    output = capsys.readouterr()
    (expected,) = generator.generate(["aé a"], num_tokens=12, sampling=GREEDY)
    assert output.out == f"aé a{expected.text}\n"
    assert "12 tokens" in output.err
    monkeypatch.setattr(sys, "stdin", io.StringIO("aé a\n\n"))
    run(monkeypatch, folder, *few)
    assert capsys.readouterr().out == f"aé a{expected.text}\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO("aé a\n"))
    run(monkeypatch, folder, *few, "--output", "json")
    assert json.loads(capsys.readouterr().out)["text"] == expected.text


def test_the_program_reads_a_file_and_writes_json(
    monkeypatch: pytest.MonkeyPatch,
    saved_run: SavedRun,
    generator: Generator,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "prompts.txt").write_text("aé a\n\naa é a é\n")
    few = ("--num-tokens", "12", "--sampling.temperature", "0", "--rows", "4", "--output", "json")
    run(monkeypatch, str(saved_run.folder), "--prompts", str(tmp_path / "prompts.txt"), *few)
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    expected = generator.generate(["aé a", "aa é a é"], num_tokens=12, sampling=GREEDY)
    assert [line["prompt"] for line in found] == ["aé a", "aa é a é"]
    assert [line["text"] for line in found] == [text.text for text in expected]
    assert [tuple(line["tokens"]) for line in found] == [text.tokens for text in expected]


def test_the_program_searches(
    monkeypatch: pytest.MonkeyPatch, saved_run: SavedRun, generator: Generator, capsys: pytest.CaptureFixture[str]
) -> None:
    search = (str(saved_run.folder), "--prompt", "aé a", "--num-beams", "3", "--num-tokens", "6")
    expected = generator.search("aé a", num_beams=3, num_tokens=6)
    run(monkeypatch, *search)
    assert capsys.readouterr().out == f"aé a{expected[0].text}\n"
    run(monkeypatch, *search, "--output", "json")
    line = json.loads(capsys.readouterr().out)
    assert [found["text"] for found in line["found"]] == [found.text for found in expected]


def test_a_state_is_kept_and_continued(
    monkeypatch: pytest.MonkeyPatch,
    saved_run: SavedRun,
    generator: Generator,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, state = str(saved_run.folder), str(tmp_path / "state.safetensors")
    greedy = ("--sampling.temperature", "0", "--rows", "4")
    run(monkeypatch, folder, "--prompt", "é a", "--num-tokens", "0", "--save-state", state)
    assert f"wrote {state} (4 tokens)" in capsys.readouterr().err
    run(monkeypatch, folder, "--load-state", state, "--prompt", " a", "--num-tokens", "6", *greedy)
    (expected,) = generator.generate(["é a a"], num_tokens=6, sampling=GREEDY)
    assert capsys.readouterr().out == f" a{expected.text}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--prompt", ""), "the prompt is empty"),
        (("--prompt", "a", "--prompts", "x"), "leave one out"),
        (("--prompts", "not/there"), "cannot read the prompts in not/there"),
        (("--prompt", "a", "--sampling.temperature", "nan"), "temperature must be finite"),
        (("--prompt", "a", "--num-tokens", "0"), "only reads prompts"),
        (("--prompt", "a", "b", "--save-state", "x"), "give one"),
        (("--prompt", "a", "--load-state", "not/there"), "not/there"),
        (("--prompt", "a", "--stop", ""), "stop string has no characters"),
        (("--prompt", "a", "--num-beams", "2", "--stop", "x"), "searches without --stop"),
        (("--prompt", "a", "--num-beams", "0"), "number of beams must lie in"),
        (("--prompt", "a", "--max-length", "5"), "would have 129 tokens, but max_length is 5"),
    ],
)
def test_bad_input_is_one_line(
    monkeypatch: pytest.MonkeyPatch,
    saved_run: SavedRun,
    arguments: tuple[str, ...],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, str(saved_run.folder), *arguments)
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error
