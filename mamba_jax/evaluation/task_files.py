"""Tasks as files: questions in lines of JSON."""

import dataclasses
import difflib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mamba_jax.errors import InputError, reason, short


@dataclasses.dataclass(frozen=True, kw_only=True)
class Question:
    """A text, and what may follow it.

    Attributes:
        line: where it stands in its file, from 1.
        context: the text; empty for the start of a document.
        continuations: what may follow, as it is joined to the context; one, or several to choose from.
        sizes: characters of each choice, without the space in front of it; for normalised accuracy.
        answer: index of the right one.
    """

    line: int
    context: str
    continuations: tuple[str, ...]
    sizes: tuple[int, ...]
    answer: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskFile:
    """The questions of a file.

    Attributes:
        name: of the task.
        path: its file.
        is_choice: whether questions have choices, or one continuation that is right if it is what the model says.
        questions: in the order of the file.
    """

    name: str
    path: Path
    is_choice: bool
    questions: tuple[Question, ...]


def read_task(name: str, place: str | Path, *, limit: int | None = None) -> TaskFile:
    """Reads the file of a task; the fields of its lines say what kind of task it is.

        {"text": "..."}                                              the last word, as in LAMBADA
        {"context": "...", "continuation": "..."}                    a continuation, joined as it stands
        {"context": "...", "choices": ["...", "..."], "answer": 0}   one of several, joined by a space

    Args:
        name: name of the task.
        place: its file, or a folder that holds NAME.jsonl or NAME_test.jsonl.
        limit: read the first questions only; None reads all.

    Raises:
        InputError: there is no such file, it cannot be read, or a line of it is not such a question.
    """
    path = _found(name, Path(place))
    questions, kinds = [], set()
    for number, record in _records(path):
        if limit is not None and len(questions) == limit:
            break
        kind = next((fields for fields in _READERS if set(fields) <= record.keys()), None)
        if kind is None or len(kinds | {kind}) > 1:
            wanted = next(iter(kinds)) if kinds else None
            fields = " and ".join(wanted) if wanted else ", or ".join(" and ".join(fields) for fields in _READERS)
            raise InputError(f"{path}, line {number} has the fields {short(sorted(record))}, but needs {fields}")
        kinds.add(kind)
        try:
            questions.append(_READERS[kind](number, record))
        except InputError as error:
            raise InputError(f"{path}, line {number}: {error}") from None
    if not questions:
        raise InputError(f"{path} has no questions: write one JSON object a line")
    return TaskFile(name=name, path=path, is_choice=_CHOICES in kinds, questions=tuple(questions))


def _found(name: str, place: Path) -> Path:
    """The file of a task; the error names one that is called nearly so."""
    try:
        is_folder, is_there = place.is_dir(), place.exists()
        files = {path.name: path for path in place.glob("*.jsonl")} if is_folder else {}
    except (OSError, ValueError) as error:
        raise InputError(f"task {name!r}: cannot look into {str(place)!r} ({reason(error)})") from None
    if not is_there:
        raise InputError(
            f"task {name!r}: there is no {str(place)!r}; give --task-data FILE or FOLDER, nothing is downloaded"
        )
    if not is_folder:
        return place
    for file in (f"{name}.jsonl", f"{name}_test.jsonl"):
        if file in files:
            return files[file]
    names = sorted({file.removesuffix(".jsonl").removesuffix("_test") for file in files})
    close = difflib.get_close_matches(name, names, n=1)
    hint = f"; did you mean {close[0]}?" if close else f", which has {short(names)}" if names else ""
    raise InputError(f"no task {name!r}: no {name}.jsonl or {name}_test.jsonl in {str(place)!r}{hint}")


def _records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a file with the numbers of their lines; empty lines are passed over."""
    try:
        text = path.read_text("utf-8")
    except (OSError, ValueError) as error:
        problem = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise InputError(f"cannot read the task in {path} ({problem})") from None
    # Not splitlines: it would also cut at the rarer line ends that may stand inside of JSON strings.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            raise InputError(f"{path}, line {number} is not JSON: {short(line)}") from None
        if not isinstance(record, dict):
            raise InputError(f"{path}, line {number} is not a JSON object: {short(record)}")
        yield number, record


def _text(record: dict[str, Any], field: str) -> str:
    if not isinstance(record[field], str):
        raise InputError(f"{field} must be text, got {short(record[field])}")
    return record[field]


def _last_word(line: int, record: dict[str, Any]) -> Question:
    context, _, word = _text(record, "text").rpartition(" ")
    if not context or not word:
        raise InputError(f"text {short(record['text'])} must have a space in front of its last word")
    return Question(line=line, context=context, continuations=(f" {word}",), sizes=(len(word),), answer=0)


def _continuation(line: int, record: dict[str, Any]) -> Question:
    text = _text(record, "continuation")
    if not text:
        raise InputError("continuation is empty: there is nothing to score")
    return Question(line=line, context=_text(record, "context"), continuations=(text,), sizes=(len(text),), answer=0)


def _choices(line: int, record: dict[str, Any]) -> Question:
    """A question with several answers, each behind a space."""
    choices, answer = record["choices"], record["answer"]
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c for c in choices):
        raise InputError(f"choices must be a list of two or more texts, got {short(choices)}")
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(choices):
        raise InputError(f"answer must be the index of a choice, 0 to {len(choices) - 1}, got {short(answer)}")
    return Question(
        line=line,
        context=_text(record, "context"),
        continuations=tuple(f" {choice}" for choice in choices),
        sizes=tuple(map(len, choices)),
        answer=answer,
    )


_CHOICES = ("context", "choices", "answer")
_READERS: dict[tuple[str, ...], Callable[[int, dict[str, Any]], Question]] = {
    _CHOICES: _choices,
    ("context", "continuation"): _continuation,
    ("text",): _last_word,
}
