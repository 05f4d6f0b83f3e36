"""Callbacks with which the caller of `train` can observe a run or change its batches and state."""

from collections.abc import Mapping

from mamba_jax.data.batch import LMBatch
from mamba_jax.training.train_state import TrainState


class Hooks:
    """What `train` calls while it runs; every method here does nothing, so a subclass defines only those it needs.

    With several processes, each calls its own hooks, at the same steps. An exception raised by a hook ends the run as
    an exception of the loop does; raised by `before_sample`, it only skips that sample.

    Example:
        class StopEarly(Hooks):
            def after_step(self, step, values, state):
                if values["cross_entropy"] < 3.0:
                    signal.raise_signal(signal.SIGTERM)
                return state
    """

    def on_start(self, step: int, state: TrainState) -> None:
        """Called once, when the step has been compiled and the loop begins.

        Args:
            step: updates done so far; above 0 in a run that was resumed.
            state: the training state, newly initialised or restored from a checkpoint.
        """

    def before_step(self, step: int, batch: LMBatch) -> LMBatch:
        """Called when a batch has been drawn.

        Args:
            step: number of the step that will train on it, counted from 1.
            batch: the rows of this process, numpy arrays on the host.

        Returns:
            The batch to train on.
        """
        return batch

    def after_step(self, step: int, values: Mapping[str, float], state: TrainState) -> TrainState:
        """Called when the metrics of a step have been read from the device and written.

        Args:
            step: number of the step, counted from 1.
            values: the fields of `StepMetrics` by name.
            state: the newest training state. The loop dispatches step k + 1 before it reads the metrics of step k, so
                this is the state after k + 1, or after k where something is saved, evaluated or sampled after k. The
                next step donates its buffers: copy what is to be kept.

        Returns:
            The state to go on with.
        """
        return state

    def before_evaluation(self, step: int) -> None:
        """Called before held-out text is evaluated, after `step` updates."""

    def before_sample(self, step: int) -> None:
        """Called before the model writes a sample of text, after `step` updates."""

    def after_save(self, step: int) -> None:
        """Called when saving `step` has begun in the background; after the last step, when it is complete.

        The event "checkpoint" in `events.jsonl` says when any save is complete.
        """
