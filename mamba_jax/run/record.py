"""The record of a run: its id, the identity of its data, and how far it was saved.

It is stored in `run.json`, and its identity in every checkpoint, so that checkpoints of another run are recognised.
"""

import contextlib
import dataclasses
import json
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mamba_jax.checkpoint import FOLDER, quarantined
from mamba_jax.errors import InputError
from mamba_jax.files import replacement
from mamba_jax.telemetry.events import read_events
from mamba_jax.telemetry.metrics import read_metrics

RECORD = "run.json"
# Events that carry the number of a step whose checkpoint was complete ("start" carries 0 in a new run).
_AFTER_A_SAVE = ("start", "checkpoint", "preempted", "finished")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lineage:
    """What a run began with that another run or a folder gave.

    Attributes:
        kind: "weights", "average" for averaged ones or "moments" for those of the optimizer as well: all else began
            anew; or "branch", for the whole state of a step, from which the run goes on.
        path: the folder, as the config names it.
        step: updates done there; None for a folder of weights, which does not tell.
        run: id of that run; None if it has none.
        changes: a phrase for each field of the config that differs from that run's and changes the result.
    """

    kind: str
    path: str
    step: int | None = None
    run: str | None = None
    changes: tuple[str, ...] = ()

    @property
    def first_step(self) -> int:
        """Updates done when the run began."""
        return (self.step or 0) if self.kind == "branch" else 0

    def __str__(self) -> str:
        names = {"branch": "a branch", "average": "averaged weights", "moments": "weights and moments"}
        return f"{names.get(self.kind, 'weights')} of {self.path}" + (
            "" if self.step is None else f" at step {self.step}"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunRecord:
    """Content of `run.json`.

    Attributes:
        run: 32 hexadecimal digits, drawn when the run begins.
        data: identity of the training data, see `TokenDataset.identity`.
        saved: newest step whose checkpoint was complete; None before the first.
        lineage: what the run began with; None if its weights were drawn at random.
    """

    run: str
    data: Mapping[str, Any]
    saved: int | None = None
    lineage: Lineage | None = None

    @property
    def identity(self) -> dict[str, Any]:
        """The part that is stored in every checkpoint: everything but `saved`."""
        identity = {"run": self.run, "data": dict(self.data)}
        return identity if self.lineage is None else {**identity, "lineage": dataclasses.asdict(self.lineage)}

    @classmethod
    def new(cls, data: Mapping[str, Any], lineage: Lineage | None = None) -> "RunRecord":
        """The record of a run that begins: a new id, nothing saved."""
        return cls(run=uuid.uuid4().hex, data=dict(data), lineage=lineage)


def to_text(record: RunRecord) -> str:
    """The record as JSON."""
    return json.dumps(dataclasses.asdict(record))


def from_text(text: str) -> RunRecord:
    """Reads a text that `to_text` has written.

    Raises:
        ValueError: the text is not JSON, or not the JSON of a record.
    """
    value = json.loads(text)
    record = from_identity(value)
    if record is None:
        raise ValueError("not the record of a run")
    saved = value.get("saved")
    return dataclasses.replace(record, saved=saved if isinstance(saved, int) else None)


def from_identity(identity: Any) -> RunRecord | None:
    """The record of the run that a checkpoint belongs to, from the identity stored in it; None without a valid one."""
    if not isinstance(identity, Mapping):
        return None
    run, data = identity.get("run"), identity.get("data")
    if not isinstance(run, str) or not isinstance(data, Mapping):
        return None
    return RunRecord(run=run, data=dict(data), lineage=_lineage(identity.get("lineage")))


def _lineage(value: Any) -> Lineage | None:
    """The lineage that `dataclasses.asdict` has made an object of; None if it is another one."""
    if not isinstance(value, Mapping):
        return None
    kind, path, step, run = (value.get(name) for name in ("kind", "path", "step", "run"))
    if not isinstance(kind, str) or not isinstance(path, str):
        return None
    changes = value.get("changes")
    return Lineage(
        kind=kind,
        path=path,
        step=step if isinstance(step, int) else None,
        run=run if isinstance(run, str) else None,
        changes=tuple(map(str, changes)) if isinstance(changes, list | tuple) else (),
    )


def read_record(run_dir: Path) -> RunRecord | None:
    """The record in `run.json`; None if the file is missing or damaged."""
    path = run_dir / RECORD
    with contextlib.suppress(ValueError, RecursionError):
        return from_text(path.read_text()) if path.is_file() else None
    return None


def write_record(run_dir: Path, record: RunRecord) -> None:
    """Replaces `run.json`.

    Raises:
        OSError: the file cannot be written; the old one stays.
    """
    with replacement(run_dir / RECORD) as temporary:
        temporary.write_text(to_text(record) + "\n")


def data_problem(run_dir: Path, recorded: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """Compares the identity of the data that the run was trained on with that of `data.train` now.

    Args:
        run_dir: the run's folder, for the message.
        recorded: identity in the record of the run.
        found: identity of the data that `data.train` names now.

    Returns:
        An error message of one line; empty if no key that both have differs.
    """
    changes = data_changes(recorded, found)
    if not changes:
        return ""
    return (
        f"data.train is not what the run in {run_dir} was trained on ({'; '.join(changes)}): put that back, or choose "
        "another train.run_dir"
    )


def data_changes(recorded: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """A phrase for each part of the identity of training data that both have and that differs."""
    return [
        f"{name} was {recorded[name]!r}, now {found[name]!r}"
        for name in sorted(recorded.keys() & found.keys())
        if recorded[name] != found[name]
    ]


def has_recorded_steps(run_dir: Path) -> bool:
    """Whether `metrics.jsonl` holds any training step, so that the folder holds a run even without a checkpoint."""
    return any(record["kind"] == "train" for record in read_metrics(run_dir))


def check_may_begin(run_dir: Path, record: RunRecord | None) -> None:
    """Makes sure that a run without checkpoints never had one; only then may it begin at step 0 again.

    A run that was killed before its first checkpoint loses nothing by starting over: it repeats the same steps. If it
    had checkpoints that are gone now, starting over would silently discard its work.

    Raises:
        InputError: the record, the events or the folder of damaged checkpoints show that there was a checkpoint.
    """
    told = [event.get("step") for event in read_events(run_dir) if event["event"] in _AFTER_A_SAVE]
    saved = [step for step in (record.saved if record else None, *told) if isinstance(step, int)]
    # The first start of a branch tells of a step that the other run has saved.
    first = 0 if record is None or record.lineage is None else record.lineage.first_step
    last = max((step for step in saved if step > first), default=0)
    if last or quarantined(run_dir):
        until = f" up to step {last}" if last else ""
        raise InputError(
            f"{run_dir} holds a run that was saved{until}, but no checkpoint any more: put one back into "
            f"{run_dir / FOLDER}, or pass --from-scratch to set aside what is left and begin at step 0"
        )
