"""Tasks: their files, their tokens, their figures, and `eval.py --tasks`."""

import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mamba_jax.data.tokenizer import ByteTokenizer
from mamba_jax.errors import InputError
from mamba_jax.evaluation.scoring import Score, Scorer
from mamba_jax.evaluation.task_files import read_task
from mamba_jax.evaluation.tasks import encode_pairs, measure_task
from mamba_jax.loaded import load
from tests.data.small_tokenizers import END, saved, small
from tests.evaluation.conftest import SavedRun
from tests.evaluation.test_checkpoints import evaluate_on_command_line

GOLDEN = Path(__file__).parents[1] / "golden" / "mamba1_tiny"
WORDS = [
    {"text": "the state of the union is strong"},
    {"text": "and the other thing, 42 times"},
    {"text": "the union of the other state"},
    {"text": "the thing"},
]


def written(folder: Path, records: Sequence[Any], name: str = "words") -> Path:
    path = folder / f"{name}.jsonl"
    path.write_text("".join(f"{record if isinstance(record, str) else json.dumps(record)}\n" for record in records))
    return path


class Told(Scorer):
    """A scorer that knows without a model: each text has the score of its number."""

    def __init__(self, log_p: Sequence[float], greedy: Sequence[bool]) -> None:
        self._scores = [
            Score(log_probabilities=np.array([value, 0], np.float32), is_greedy=flag)
            for value, flag in zip(log_p, greedy, strict=True)
        ]

    def score(self, pairs: Sequence[Any], *, progress: Any = None) -> list[Score]:
        assert len(pairs) == len(self._scores)
        progress(len(pairs))
        return self._scores


def test_the_last_word_is_the_continuation(tmp_path: Path) -> None:
    path = written(tmp_path, ['{"text": "a  b\\u2028c d\\ne,"}', "", {"text": "one two", "more": 1}])
    task = read_task("words", path)
    assert [(q.line, q.context, q.continuations) for q in task.questions] == [
        (1, "a  b\u2028c", (" d\ne,",)),
        (3, "one", (" two",)),
    ]
    assert read_task("words", tmp_path, limit=1).questions == task.questions[:1]


def test_a_file_is_found_by_the_name_of_its_task(tmp_path: Path) -> None:
    path = written(tmp_path, WORDS, "lambada_openai_test")
    assert read_task("lambada_openai", tmp_path).path == path
    with pytest.raises(InputError, match=r"no lambda_openai.jsonl or .* in .*; did you mean lambada_openai\?"):
        read_task("lambda_openai", tmp_path)
    with pytest.raises(InputError, match=r"which has .*'lambada_openai'"):
        read_task("hellaswag", tmp_path)
    with pytest.raises(InputError, match="give --task-data FILE or FOLDER, nothing is downloaded"):
        read_task("lambada_openai", tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["{"], r"words.jsonl, line 1 is not JSON: '\{'"),
        (["", "[1]"], r"line 2 is not a JSON object: \[1\]"),
        ([{"txt": "a b"}], r"line 1 has the fields \['txt'\], but needs context and choices and answer, or context"),
        ([{"text": "a b"}, {"context": "a", "continuation": "b"}], "line 2 has the fields .*, but needs text"),
        ([{"text": "a b"}, {"text": "word"}], "line 2: text 'word' must have a space in front of its last word"),
        ([{"text": ""}], "line 1: text '' must have a space"),
        ([{"text": "ends with a space "}], "must have a space in front of its last word"),
        ([{"text": 1}], "line 1: text must be text, got 1"),
        ([{"context": "a", "continuation": ""}], "line 1: continuation is empty"),
        ([{"context": None, "continuation": "a"}], "line 1: context must be text, got None"),
        ([{"context": "a", "choices": ["b"], "answer": 0}], "line 1: choices must be a list of two or more texts"),
        ([{"context": "a", "choices": ["b", ""], "answer": 0}], "line 1: choices must be"),
        ([{"context": "a", "choices": ["b", "c"], "answer": 2}], "line 1: answer must be the index .* 0 to 1, got 2"),
        ([{"context": "a", "choices": ["b", "c"], "answer": True}], "line 1: answer must be"),
        (["", ""], "words.jsonl has no questions"),
    ],
)
def test_bad_files_are_one_line(tmp_path: Path, lines: list[Any], message: str) -> None:
    path = written(tmp_path, lines)
    with pytest.raises(InputError, match=message):
        read_task("words", path)


def test_what_is_no_text_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "words.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match=r"cannot read the task in .*words.jsonl \(it is not UTF-8 text\)"):
        read_task("words", tmp_path)


def test_where_contexts_end_in_tokens(tmp_path: Path) -> None:
    """White space goes to the continuation; contexts of nothing else start a document."""
    tokenizer = saved("metaspace_always", tmp_path)
    (plain, rest), (moved, spaced), (empty, whole), (blank, after) = encode_pairs(
        tokenizer, [("the union", " of"), ("the union  ", "of"), ("", "the union"), (" \n", "the union")]
    )
    assert plain.tolist() == moved.tolist() == tokenizer.encode("the union").tolist()
    assert np.concatenate([plain, rest]).tolist() == tokenizer.encode("the union of").tolist()
    assert np.concatenate([moved, spaced]).tolist() == tokenizer.encode("the union  of").tolist()
    assert empty.tolist() == blank.tolist() == [tokenizer.end_of_document]
    assert whole.tolist() == tokenizer.encode("the union").tolist()
    assert after.tolist() == tokenizer.encode(" \nthe union").tolist()


def test_accuracy_and_perplexity_of_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task = read_task("words", written(tmp_path, WORDS))
    result = measure_task(task, ByteTokenizer(), Told([-1, -2, -4, -1], [True, False, False, True]))
    assert (result.task, result.examples, result.accuracy, result.tokens) == ("words", 4, 0.5, 8)
    assert result.accuracy_error == pytest.approx(math.sqrt(0.25 / 3))
    assert result.perplexity == pytest.approx(math.exp(2))
    assert result.normalised_accuracy is None
    # The last byte of each text is only predicted.
    assert f"words: {sum(len(record['text']) - 1 for record in WORDS)} tokens in" in capsys.readouterr().err


def test_accuracy_of_choices(tmp_path: Path) -> None:
    """The second answer is right after division by its 4 characters; equal ones are decided for the first."""
    records = [
        {"context": "q", "choices": ["a", "b"], "answer": 0},
        {"context": "q", "choices": ["a", "bbbb"], "answer": 1},
        {"context": "q", "choices": ["a", "b", "c"], "answer": 1},
    ]
    task = read_task("words", written(tmp_path, records))
    result = measure_task(task, ByteTokenizer(), Told([-1, -2, -1, -3, -1, -1, -2], [False] * 7))
    assert result.accuracy == pytest.approx(1 / 3)
    assert result.normalised_accuracy == pytest.approx(2 / 3)
    assert result.perplexity is None
    single = read_task("words", tmp_path, limit=1)
    assert measure_task(single, ByteTokenizer(), Told([-1, -2], [False] * 2)).accuracy_error is None


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A published checkpoint with a tokenizer beside it."""
    folder = tmp_path_factory.mktemp("published") / "model"
    shutil.copytree(GOLDEN, folder)
    (folder / "tokenizer.json").write_text(small("metaspace_always"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": END}))
    return folder


def test_published_checkpoint_by_one_command(
    published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The figures that follow from the logits of each text alone; this model says the last word again."""
    model = load(published, compute_dtype="float32")
    records = [*WORDS, {"text": "the other state state"}]
    total, right = 0.0, 0
    for record in records:
        ids = model.tokenizer.encode(record["text"])
        first = len(model.tokenizer.encode(record["text"].rpartition(" ")[0]))
        logits = np.asarray(model(ids[None, :-1]).logits[0, first - 1 :], np.float64)
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        total += log_p[np.arange(len(log_p)), ids[first:]].sum()
        right += bool((log_p.argmax(-1) == ids[first:]).all())
    written(tmp_path, records, "lambada_openai_test")
    flags = ["--task-data", str(tmp_path), "--compute-dtype", "float32"]
    evaluate_on_command_line(monkeypatch, str(published), "--tasks", "lambada_openai", *flags, "--output", "json")
    (line,) = capsys.readouterr().out.splitlines()
    found = json.loads(line)
    assert right == 1
    assert (found["task"], found["examples"], found["accuracy"]) == ("lambada_openai", 5, right / 5)
    # Five sums of some logits of order 10, each with some 100 roundings.
    assert found["perplexity"] == pytest.approx(math.exp(-total / 5), rel=1e-4)
    evaluate_on_command_line(monkeypatch, str(published), "--tasks", "lambada_openai", *flags, "--limit", "3")
    printed = capsys.readouterr().out
    assert printed.startswith("task           lambada_openai\nexamples       3\naccuracy       0")
    assert "perplexity     " in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "words"], "task 'words': there is no 'data'; give --task-data FILE or FOLDER"),
        (["--tasks", "word", "--task-data", "{folder}"], "did you mean words?"),
        (["--tasks", "words", "--task-data", "{folder}", "--limit", "0"], "--limit must be positive, got 0"),
        (["--tasks", "words", "--task-data", "{folder}", "--max-length", "1"], "but max_length is 1: raise it"),
    ],
)
def test_bad_requests_are_one_line(
    saved_run: SavedRun,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    written(tmp_path, WORDS)
    with pytest.raises(SystemExit) as stop:
        evaluate_on_command_line(
            monkeypatch, str(saved_run.folder), *(part.format(folder=tmp_path) for part in arguments)
        )
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert "(task" not in error
    assert message in error
