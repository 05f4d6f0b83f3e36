"""Saves checkpoints from the training loop, logs failures, and leaves out states that should not be kept."""

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from mamba_jax.checkpoint import FOLDER, Checkpointer, SaveFailed
from mamba_jax.errors import InputError
from mamba_jax.experiment import ExperimentConfig
from mamba_jax.run.record import RunRecord, write_record
from mamba_jax.telemetry.run_log import RunLog
from mamba_jax.training.train_state import TrainState


class Saves:
    """Saves the checkpoints of one execution of the loop.

    Nothing is saved while steps are being skipped, except at the end: the cause may be in the state itself, and then
    new checkpoints of it would push out good old ones. A skipped step leaves the weights as they were after the last
    good step, so the final state is saved even after skipped steps, if it is finite.
    """

    def __init__(self, config: ExperimentConfig, checkpointer: Checkpointer, record: RunRecord, log: RunLog) -> None:
        """Stores the arguments.

        Args:
            config: the experiment; stored in every checkpoint.
            checkpointer: writes checkpoints to the run directory.
            record: record of this run; `run.json` is updated from it when a checkpoint is complete.
            log: receives an event for every save that is left out or fails.
        """
        self._config, self._checkpointer, self._record, self._log = config, checkpointer, record, log
        self._run_dir = Path(config.train.run_dir)
        self._pending: int | None = None

    def save(self, step: int, state: TrainState, *, skipped_in_a_row: int) -> bool:
        """Starts to save in the background; a save that cannot start is logged, and training continues.

        Args:
            step: updates done.
            state: the training state after that many updates.
            skipped_in_a_row: number of steps skipped directly before; unless it is 0, nothing is saved.

        Returns:
            Whether a save has begun.
        """
        if skipped_in_a_row:
            reason = f"the last {skipped_in_a_row} steps were skipped"
            self._log.event("save_left_out", step=step, reason=reason)
            self._log.note(f"step {step} is not saved: {reason}")
            return False
        has_begun = True
        try:
            self._start(step, state)
        except SaveFailed as error:
            has_begun = False
            self._log.event("save_failed", step=step, reason=str(error))
        self._log.goodput(step)
        return has_begun

    def save_last(self, step: int, state: TrainState) -> None:
        """Saves the final state of this execution, and waits until everything is on disk.

        Raises:
            InputError: saving failed, or the state is not finite.
        """
        try:
            self._start(step, state)
            with self._log.measure("checkpoint"):
                self._checkpointer.wait()
        except SaveFailed as error:
            self._log.event("save_failed", step=step, reason=str(error))
            raise InputError(
                f"step {step} could not be saved: {error}; remove the cause and run the same command, which resumes "
                f"from the last checkpoint in {self._run_dir}"
            ) from None
        self._log.goodput(step)
        self.look()

    def look(self) -> None:
        """Updates `run.json` if the checkpoint being saved has become complete; called after every step.

        If all checkpoints are lost later, `run.json` still says that there was one, and the run refuses to start over
        silently (`check_may_begin`).
        """
        if self._pending is None or not (self._run_dir / FOLDER / str(self._pending)).is_dir():
            return
        saved = max(self._pending, self._record.saved or 0)
        self._record, self._pending = dataclasses.replace(self._record, saved=saved), None
        if jax.process_index() == 0:
            # Not worth stopping for: while the checkpoint exists, it says the same.
            with contextlib.suppress(OSError):
                write_record(self._run_dir, self._record)

    def _start(self, step: int, state: TrainState) -> None:
        items = state.items()
        with self._log.measure("checkpoint"):
            self.look()
            if name := _not_finite(items):
                raise SaveFailed(f"the array {name} holds values that are not finite")
            self._checkpointer.save(step, items, self._config)
        self._pending = step


def _not_finite(tree: Any) -> str | None:
    """Name of the first array with a value that is NaN or infinite; None if all are finite."""
    floats = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree.leaves_with_path(tree)
        if jnp.issubdtype(leaf.dtype, jnp.inexact)
    }
    finite = jax.device_get(_are_finite(list(floats.values())))
    return next((name for name, is_finite in zip(floats, finite, strict=True) if not is_finite), None)


@jax.jit
def _are_finite(leaves: list[jax.Array]) -> list[jax.Array]:
    return [jnp.all(jnp.isfinite(leaf)) for leaf in leaves]
