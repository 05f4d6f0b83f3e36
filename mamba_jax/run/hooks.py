"""Where code of a caller can look into a run, or take part in it."""

from collections.abc import Mapping

from mamba_jax.data.batch import LMBatch
from mamba_jax.training.train_state import TrainState


class Hooks:
    """What `train` calls while it runs; every method here does nothing, so a subclass defines only those it needs.

    Each of several processes calls its own hooks, at the same steps. An exception out of a hook ends the run as one of
    the loop itself would; of a failed sample, it costs that sample.

    Example:
        class StopEarly(Hooks):
            def after_step(self, step, values, state):
                if values["cross_entropy"] < 3.0:
                    signal.raise_signal(signal.SIGTERM)
                return state
    """

    def on_start(self, step: int, state: TrainState) -> None:
        """The step is compiled and the loop begins.

        Args:
            step: updates done so far; above 0 in a run that was resumed.
            state: fresh or restored.
        """

    def before_step(self, step: int, batch: LMBatch) -> LMBatch:
        """A batch was drawn.

        Args:
            step: number of the step that it is for, counted from 1.
            batch: rows of this process, on the host.

        Returns:
            The batch to train on.
        """
        return batch

    def after_step(self, step: int, values: Mapping[str, float], state: TrainState) -> TrainState:
        """The metrics of a step were read and written.

        Args:
            step: its number, counted from 1.
            values: fields of `StepMetrics`.
            state: the newest; where nothing is saved or evaluated after `step`, that is the state one step later,
                because a step is dispatched before the metrics of the one before it are read. The next step consumes
                it: copy what is to be kept.

        Returns:
            The state to go on with.
        """
        return state

    def before_evaluation(self, step: int) -> None:
        """Held-out text is about to be evaluated, `step` updates being done."""

    def before_sample(self, step: int) -> None:
        """The model is about to write a sample, `step` updates being done."""

    def after_save(self, step: int) -> None:
        """A save has begun, or for the last step is complete; the event "checkpoint" says when one is complete."""
