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
class RunRecord:
    """Content of `run.json`.

    Attributes:
        run: 32 hexadecimal digits, drawn when the run begins.
        data: identity of the training data, see `TokenDataset.identity`.
        saved: newest step whose checkpoint was complete; None before the first.
    """

    run: str
    data: Mapping[str, Any]
    saved: int | None = None

    @property
    def identity(self) -> dict[str, Any]:
        """The part that is stored in every checkpoint: everything but `saved`."""
        return {"run": self.run, "data": dict(self.data)}

    @classmethod
    def new(cls, data: Mapping[str, Any]) -> "RunRecord":
        """The record of a run that begins: a new id, nothing saved."""
        return cls(run=uuid.uuid4().hex, data=dict(data))


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
    return RunRecord(run=run, data=dict(data)) if isinstance(run, str) and isinstance(data, Mapping) else None


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
    changes = [
        f"{name} was {recorded[name]!r}, now {found[name]!r}"
        for name in sorted(recorded.keys() & found.keys())
        if recorded[name] != found[name]
    ]
    if not changes:
        return ""
    return (
        f"data.train is not what the run in {run_dir} was trained on ({'; '.join(changes)}): put that back, or choose "
        "another train.run_dir"
    )


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
    last = max(saved, default=0)
    if last > 0 or quarantined(run_dir):
        until = f" up to step {last}" if last else ""
        raise InputError(
            f"{run_dir} holds a run that was saved{until}, but no checkpoint any more: put one back into "
            f"{run_dir / FOLDER}, or pass --from-scratch to set aside what is left and begin at step 0"
        )
