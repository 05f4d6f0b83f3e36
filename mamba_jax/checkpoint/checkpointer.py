"""Saves the training state in the background while the run continues, and restores it when the run is resumed."""

import contextlib
import dataclasses
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from mamba_jax.checkpoint import record as records
from mamba_jax.checkpoint.agreement import Outcome, from_first, highest_of_all, same_for_all
from mamba_jax.checkpoint.arrays import check_written, read_arrays
from mamba_jax.checkpoint.damage import CheckpointGone, DamagedCheckpoint, one_line
from mamba_jax.checkpoint.quiet import quiet
from mamba_jax.checkpoint.steps import (
    FOLDER,
    LiteralPath,
    check_path,
    quarantine,
    remove_leftovers,
    remove_oldest,
    steps_in,
)
from mamba_jax.errors import InputError
from mamba_jax.experiment import ExperimentConfig
from mamba_jax.training.config import CheckpointConfig

# How long a process waits for the others to write their parts. A judgement: long enough for slow shared storage.
_DEADLINE_SECONDS = 1200
# How long to keep removing what Orbax's threads still write after one of them has failed. Judged: its writes are short.
_AFTERMATH_SECONDS = 10.0


class SaveFailed(Exception):
    """A checkpoint could not be written; the message is one line with the cause. Older checkpoints are untouched."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Restored:
    """The state of a checkpoint.

    Attributes:
        step: updates done.
        items: the parts of the state by name, in the shardings that were asked for.
    """

    step: int
    items: dict[str, Any]


class Checkpointer:
    """Saves and restores the training state of one run directory.

    With several processes, each makes the same calls, on storage that all of them see. Each reads its own part without
    waiting for the others; then all decide together, by the worst result of any of them. Only the first process moves
    and removes folders. If a background save fails in one process, it fails in all: in the others once Orbax's deadline
    of 20 minutes has passed. If it cannot even be started in one of several processes, the job ends.

    A checkpoint is written under a temporary name. It gets the name of its step once everything it should hold has been
    found in the folder; only then are older checkpoints removed.
    """

    def __init__(
        self,
        run_dir: str | Path,
        config: CheckpointConfig,
        *,
        identity: Mapping[str, Any] | None = None,
        on_event: Callable[..., None] = lambda *_, **__: None,
    ) -> None:
        """Creates the folder of checkpoints if it is missing, and removes what unfinished saves have left in it.

        Args:
            run_dir: the run directory; checkpoints go to its folder "checkpoints".
            config: how many checkpoints are kept.
            identity: a JSON object that distinguishes this run from others; restoring a checkpoint with another
                identity is refused. None accepts any.
            on_event: called with the name of an event: "checkpoint" with the field `step` when a save is complete;
                "quarantined", "save_failed" and "not_removed" with the fields `step` and `reason`. Some of the calls
                come from a background thread.

        Raises:
            InputError: checkpoints cannot be kept in a folder of this name.
            OSError: the folder cannot be created.
        """
        check_path(run_dir)
        self._run_dir, self._config, self._on_event = Path(run_dir), config, on_event
        self._folder = self._run_dir.absolute() / FOLDER
        self._identity = None if identity is None else json.loads(json.dumps(dict(identity)))
        self._background = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._saving: tuple[records.Record, Future[None]] | None = None
        steps_in(self._folder)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._open(patience=0.0)

    def save(self, step: int, items: Mapping[str, Any], config: ExperimentConfig) -> None:
        """Starts to save in the background, after the previous save is done; its failure is reported to `on_event`.

        Args:
            step: updates done; a step that is already saved is left alone.
            items: trees of arrays by name ("params", "rest", "ema"); they may be donated as soon as this returns.
            config: the resolved experiment.

        Raises:
            SaveFailed: this save could not be started. Later ones may succeed.
        """
        before = self._saving
        try:
            self.wait()
        except SaveFailed as error:
            self._on_event("save_failed", step=before[0].step if before else None, reason=str(error))
        with self._failure_in_one_line():
            steps = steps_in(self._folder)
        if from_first(int(step in steps)):
            return
        record = records.describe(step, self._identity, config, items)
        args: dict[str, Any] = {name: ocp.args.StandardSave(tree) for name, tree in items.items()}
        args |= {name: ocp.args.JsonSave(value) for name, value in record.items().items()}
        with self._failure_in_one_line():
            self._record = record
            self._writer.save(LiteralPath(self._folder / str(step)), args=ocp.args.Composite(**args))
            self._saving = record, self._background.submit(self._finish, record)

    def wait(self) -> None:
        """Waits until everything is on disk.

        Raises:
            SaveFailed: the last save failed.
        """
        with self._failure_in_one_line():
            if self._saving:
                self._saving[1].result()
        self._saving = None

    def restore_newest(self, abstract: Mapping[str, Any]) -> Restored | None:
        """Reads the newest checkpoint that is not damaged; damaged ones are moved to the folder `damaged`.

        Args:
            abstract: trees of `jax.ShapeDtypeStruct` with shardings, by name of the item.

        Returns:
            None if the run has no checkpoint.

        Raises:
            InputError: a checkpoint cannot be read now, or is of another run, another step or another model, or all of
                them were damaged.
        """
        moved, gone = 0, None
        while (step := self._newest()) is not None:
            try:
                return Restored(step=step, items=self.restore(step, abstract))
            except DamagedCheckpoint as error:
                self._quarantine(step, str(error))
                moved += 1
            except CheckpointGone as error:
                if gone == step:
                    raise InputError(f"{error}: make sure that every process sees the same folder") from error
                gone = step
        if moved:
            raise InputError(
                f"all checkpoints of {self._run_dir} are damaged and were moved to {self._run_dir / 'damaged'}: put a "
                "good copy back, or pass --from-scratch to set aside what is left and begin at step 0"
            )
        return None

    def restore(self, step: int, abstract: Mapping[str, Any]) -> dict[str, Any]:
        """Reads a step into the shardings of the abstract arrays, and compares all that it records.

        Raises:
            DamagedCheckpoint: its files do not hold what was saved.
            InputError: it cannot be read now, or is of another run, another step or another model.
        """
        return read_arrays(self._folder / str(step), abstract, identity=self._identity)

    def close(self) -> None:
        """Waits for what is being saved, and stops; unlike `wait`, this process alone, which may be on its way out."""
        self._background.shutdown()
        with contextlib.suppress(Exception):
            self._writer.close()

    def _open(self, *, patience: float) -> None:
        """Makes a new Orbax writer, after process 0 has removed what unfinished saves left (see `remove_leftovers`)."""
        quiet()
        if jax.process_index() == 0:
            remove_leftovers(self._folder, patience=patience)
        self._writer = ocp.AsyncCheckpointer(
            ocp.CompositeCheckpointHandler(),
            async_options=ocp.AsyncOptions(
                timeout_secs=_DEADLINE_SECONDS, post_finalization_callback=self._check_unfinished
            ),
        )

    def _newest(self) -> int | None:
        with same_for_all():
            steps = steps_in(self._folder)
        newest = from_first(max(steps, default=-1))
        return None if newest < 0 else newest

    def _check_unfinished(self) -> None:
        """Called by Orbax in the first process, in the background, just before the step gets its name."""
        check_written(self._folder / f"{self._record.step}.orbax-checkpoint-tmp", self._record)

    def _finish(self, record: records.Record) -> None:
        """Runs in the background thread: waits for the save to complete, then removes checkpoints beyond `keep`."""
        self._writer.wait_until_finished()
        self._on_event("checkpoint", step=record.step)
        if jax.process_index() == 0:
            problem = remove_oldest(self._folder, keep=self._config.keep, identity=self._identity)
            if problem:
                self._on_event("not_removed", step=record.step, reason=problem)

    @contextlib.contextmanager
    def _failure_in_one_line(self) -> Iterator[None]:
        """Context manager: turns any failure of writing, in any process, into `SaveFailed` in all of them.

        The Orbax writer is replaced, because its threads may still be busy with the failed save.
        """
        problem, cause, outcome = "", None, Outcome.DONE
        try:
            yield
        except Exception as error:
            root: BaseException = error
            while inner := root.__cause__ or root.__context__:
                root = inner
            problem, cause = f"{type(root).__name__}: {one_line(root)}", error
            # TensorStore's messages can be so long that the reason does not stay in one line of them.
            code = re.search(r"os_error_code='(\d+)'", str(root))
            if code is not None and (reason := os.strerror(int(code[1]))) not in problem:
                problem = f"{reason}: {problem}"
            outcome = Outcome.WAITED_IN_VAIN if "DEADLINE_EXCEEDED" in problem else Outcome.FAILED
        worst, problem = highest_of_all(outcome, problem)
        if worst != Outcome.DONE:
            self._saving = None
            with contextlib.suppress(Exception):
                self._writer.close()
            self._open(patience=_AFTERMATH_SECONDS)
            raise SaveFailed(problem) from cause

    def _quarantine(self, step: int, reason: str) -> None:
        with same_for_all():
            if jax.process_index() == 0:
                try:
                    quarantine(self._run_dir, step)
                except OSError as error:
                    raise InputError(f"{reason}, and cannot be moved away ({error.strerror}): do that") from error
        self._on_event("quarantined", step=step, reason=reason)
