"""The training loop."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax

from mamba_jax.checkpoint import Checkpointer
from mamba_jax.data.batch import LMBatch
from mamba_jax.data.batches import Task
from mamba_jax.data.mixture import Mixture
from mamba_jax.data.pipeline import open_data, train_batches
from mamba_jax.data.shards import TokenDataset
from mamba_jax.data.tokenizer import Tokenizer, make_tokenizer
from mamba_jax.errors import InputError
from mamba_jax.evaluation.perplexity import Perplexity
from mamba_jax.experiment import FROM_CHECKPOINT, ExperimentConfig
from mamba_jax.export.initial import model_for
from mamba_jax.generation.text import complete
from mamba_jax.models.parameters import define
from mamba_jax.models.storage.low_rank import merged
from mamba_jax.run.checks import check_model, check_runs_here
from mamba_jax.run.directory import (
    begins_at_zero,
    check_is_run_or_free,
    claim_run_directory,
    schedule_changes,
    set_aside,
    settle_run,
    store_record,
)
from mamba_jax.run.distributed import from_first
from mamba_jax.run.held_out import HeldOut
from mamba_jax.run.hooks import Hooks
from mamba_jax.run.out_of_memory import out_of_memory_in_one_line
from mamba_jax.run.ownership import owned
from mamba_jax.run.record import RunRecord
from mamba_jax.run.saves import Saves
from mamba_jax.run.start import Start
from mamba_jax.run.start import find_start as _initial_params
from mamba_jax.run.stop_requests import StopRequests
from mamba_jax.run.watchdog import Watchdog
from mamba_jax.sharding import make_mesh, process_rows, put_batch
from mamba_jax.telemetry.run_log import RunLog
from mamba_jax.training.program import TrainProgram, check_rows
from mamba_jax.training.step import StepMetrics
from mamba_jax.training.train_state import TrainState


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What a call of `train` did.

    Attributes:
        step: updates done in the whole run, skipped ones included.
        is_complete: the run has reached its last step; False if a signal stopped it, after saving.
        stop_signal: number of the signal that stopped it; None if none did.
        loss: cross entropy of the last step, nats per token; None if this call did no step.
        validation: the last evaluation; None without a validation source.
    """

    step: int
    is_complete: bool
    stop_signal: int | None
    loss: float | None
    validation: Perplexity | None


def train(
    config: ExperimentConfig,
    *,
    devices: Sequence[jax.Device] | None = None,
    wait: bool = False,
    from_scratch: bool = False,
    hooks: Hooks | None = None,
) -> TrainResult:
    """Trains a model as `config` says, resuming the run in `config.train.run_dir` if there is one.

    Everything is checked before the first device computation. Several processes call this with the same arguments.

    Args:
        config: the whole experiment.
        devices: the devices to train on; None takes all.
        wait: if another job is training in the run directory, wait until it is done instead of raising.
        from_scratch: move the run that is in the run directory aside, and begin at step 0.
        hooks: callbacks of the caller; None calls nothing.

    Raises:
        InputError: config, data or run directory are wrong, saving failed, memory ran out, or too many steps in a row
            were skipped; one line says what is wrong, the value and what to do.
    """
    if config.model == FROM_CHECKPOINT:
        config = dataclasses.replace(config, model=model_for(config.train))
    tokenizer = make_tokenizer(config.data.tokenizer)
    check_model(config, tokenizer)
    if config.train.sample_every:
        tokenizer.check_prompt(config.train.sample_prompt)
    check_is_run_or_free(config)
    with owned(Path(config.train.run_dir), wait=wait):
        begins = from_first(lambda: begins_at_zero(config, from_scratch=from_scratch)) == str(True)
        start = _initial_params(config) if begins else Start()
        mesh = make_mesh(config.mesh, devices)
        check_rows(mesh, "evaluation.batch_size", config.evaluation_batch_size)
        program = TrainProgram(config.program, mesh)
        dataset = open_data(config.data.train, config.data.cache_dir, tokenizer)
        held_out = config.data.validation
        validation = None if held_out is None else open_data(held_out, config.data.cache_dir, tokenizer)
        start.check_data(config, dataset.identity)
        record = settle_run(config, dataset.identity, from_scratch=from_scratch, lineage=start.lineage)
        given = _Given(
            tokenizer=tokenizer,
            dataset=dataset,
            validation=validation,
            record=record,
            start=start,
            from_scratch=from_scratch,
        )
        with StopRequests() as stop, Watchdog() as watchdog, out_of_memory_in_one_line(config, watchdog):
            watchdog.arm(config.faults.startup_seconds, "starting")
            run = _Run(config, program, given, stop=stop, watchdog=watchdog, hooks=hooks or Hooks())
            return run.execute()


def _open_checkpoints(config: ExperimentConfig, record: RunRecord, log: RunLog) -> Checkpointer:
    run_dir = Path(config.train.run_dir)
    try:
        return Checkpointer(run_dir, config.checkpoint, identity=record.identity, on_event=log.event)
    except OSError as error:
        raise InputError(f"cannot keep checkpoints in {run_dir} ({error.strerror}): make room there") from error


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Given:
    """What `train` has opened and decided before the loop starts.

    Attributes:
        tokenizer: the tokenizer of training text, held-out text and samples.
        dataset: training text.
        validation: held-out text; None without a validation source.
        record: record of the run that begins or resumes.
        start: what the run begins with, unless it is resumed.
        from_scratch: move the run that is in the run directory aside.
    """

    tokenizer: Tokenizer
    dataset: TokenDataset | Task | Mixture
    validation: TokenDataset | Task | Mixture | None
    record: RunRecord
    start: Start
    from_scratch: bool


class _Run:
    """One execution of the loop: constructing it restores the state and compiles the step, `execute` trains."""

    def __init__(
        self,
        config: ExperimentConfig,
        program: TrainProgram,
        given: _Given,
        *,
        stop: StopRequests,
        watchdog: Watchdog,
        hooks: Hooks,
    ) -> None:
        self.config, self.program, self.given = config, program, given
        self.stop, self.watchdog, self.hooks = stop, watchdog, hooks
        self.definition, self.mesh = program.definition, program.mesh
        index, count = process_rows(self.mesh)
        self.batches = train_batches(
            given.dataset, config.data, seed=config.seed, process_index=index, process_count=count
        )
        check_runs_here(program)
        self.run_dir = Path(config.train.run_dir)
        aside = from_first(lambda: set_aside(self.run_dir)) if given.from_scratch else ""
        self.log = RunLog(config, self.mesh, self.run_dir)
        with self.log.measure("init"):
            self.checkpointer = _open_checkpoints(config, given.record, self.log)
            restored = self.checkpointer.restore_newest(program.state.items())
            self.is_resumed = restored is not None
            if restored is None:
                self.first_step, self.state = given.start.step, given.start.state(program)
            else:
                self.first_step, self.state = restored.step, TrainState.from_items(restored.items)
            jax.block_until_ready(self.state)
        changes = from_first(lambda: "; ".join(schedule_changes(config))) if self.is_resumed else ""
        # What the last evaluation and sample of a shorter run have left is made again, as they were.
        self.extended_at = self.first_step if changes else None
        from_first(lambda: store_record(claim_run_directory(config), given.record))
        self.saves = Saves(config, self.checkpointer, given.record, self.log)
        self.held_out = None
        if given.validation is not None:
            self.held_out = HeldOut(config, program, given.validation, self.log, stop=stop, watchdog=watchdog)
        self.log.start(self.first_step, self.definition)
        self._tell_origin(changes)
        if aside:
            self.log.note(f"the records of the run before are in {aside}")
        if given.tokenizer.lossy:
            self.log.note(f"warning: {given.tokenizer.lossy}")
        with self.log.measure("compile"), jax.set_mesh(self.mesh):
            self.train_step = program.lower().compile()
        self.log.event("compiled", seconds=self.log.seconds["compile"])
        self.last_loss: float | None = None
        self.last_validation: Perplexity | None = None
        self.skipped_in_a_row = 0

    def _tell_origin(self, changes: str) -> None:
        """Says what the run began with, and which fields of its schedule (`changes`) are others from here on."""
        if not self.is_resumed and self.given.record.lineage is not None:
            self.log.note(f"begins as {self.given.record.lineage}")
        if changes:
            self.log.event("extended", step=self.first_step, changes=changes)
            self.log.note(f"goes on from step {self.first_step} with another schedule: {changes}")

    def execute(self) -> TrainResult:
        """Trains and saves, then evaluates: if the last evaluation fails, a restart need not train again."""
        last, deadline = self.config.train.num_steps, self.config.faults.deadline_seconds
        with contextlib.closing(self.checkpointer), contextlib.closing(self.log), self.log.live():
            step = self._steps()
            self.watchdog.arm(deadline, f"saving step {step}")
            if step > self.first_step or not self.is_resumed:
                self.saves.save_last(step, self.state)
                self.hooks.after_save(step)
            if step == last:
                self._evaluate(step)
                self._sample(step)
            is_complete = step == last and not self.stop.requested()
            self.log.end(step, is_complete=is_complete)
            self.watchdog.arm(deadline, "closing files")
        if not is_complete:
            self.log.note(f"stopped and saved at step {step}; run the same command again to go on")
        elif (found := self.last_validation) is not None:
            self.log.note(f"{found.bits_per_byte:.4f} bits per byte on held-out text; see {self.run_dir}")
        return TrainResult(
            step=step,
            is_complete=is_complete,
            stop_signal=None if is_complete else self.stop.signal,
            loss=self.last_loss,
            validation=self.last_validation,
        )

    def _steps(self) -> int:
        """Runs steps until the last or until asked to stop; returns the number of updates done.

        A step's metrics are read after the next step is dispatched, so that devices never wait for the host, but at
        once before a save, an evaluation or a sample. A save comes first: if evaluation crashes, no step is repeated.
        """
        config, last = self.config, self.config.train.num_steps
        batches = self.batches.iterate(self.first_step)
        self.hooks.on_start(self.first_step, self.state)
        # What was learned elsewhere is measured before this run changes it.
        begun_at = self.given.record.lineage.first_step if self.given.record.lineage is not None else None
        pending: tuple[int, StepMetrics] | None = None
        step = self.first_step
        while step < last and not self.stop.requested():
            evaluate_now = _is_due(step, config.evaluation.every) or step in (begun_at, self.extended_at)
            save_now = _is_due(step, config.checkpoint.every)
            sample_now = _is_due(step, config.train.sample_every) or step == self.extended_at
            if evaluate_now or save_now or sample_now:
                self._finish_step(pending)
                pending = None
                if save_now and step > self.first_step:
                    self.watchdog.arm(config.faults.deadline_seconds, f"saving step {step}")
                    if self.saves.save(step, self.state, skipped_in_a_row=self.skipped_in_a_row):
                        self.hooks.after_save(step)
                if evaluate_now:
                    self._evaluate(step)
                if sample_now:
                    self._sample(step)
                # If the evaluation was cut short: a run that resumes at this step, not a later one, does it again.
                if self.stop.requested():
                    break
            metrics = self._step(step, batches)
            step += 1
            self._finish_step(pending)
            pending = (step, metrics)
        self._finish_step(pending)
        return step

    def _step(self, step: int, batches: Iterator[LMBatch]) -> StepMetrics:
        """Draws a batch and dispatches the step after `step`."""
        first, last = self.config.train.profile_steps or (0, 0)
        self.watchdog.arm(self.config.faults.deadline_seconds, f"step {step + 1}")
        with self.log.measure("data"):
            batch = put_batch(self.mesh, self.hooks.before_step(step + 1, next(batches)))
        if step + 1 == first:
            self._call_profiler(jax.profiler.start_trace, str(self.run_dir / "profile"))
        with self.log.measure("step"), jax.set_mesh(self.mesh):
            self.state, metrics = self.train_step(self.state, batch)
            if step + 1 == last and first > self.first_step:
                jax.block_until_ready(metrics)
        if step + 1 == last and first > self.first_step and self._call_profiler(jax.profiler.stop_trace):
            self.log.event("profile", first=first, last=last, folder="profile")
        return metrics

    def _call_profiler(self, call: Callable[..., None], *args: str) -> bool:
        """Whether it worked; a failed profile never stops the run."""
        try:
            call(*args)
        except Exception as error:
            self.log.note(f"no profile: {' '.join(str(error).split())}")
            return False
        return True

    def _finish_step(self, pending: tuple[int, StepMetrics] | None) -> None:
        """Waits for a dispatched step, if any, and logs it; too many skipped in a row end the run without a save."""
        if pending is None:
            return
        step, metrics = pending
        with self.log.measure("step"):
            values = {name: float(value) for name, value in dataclasses.asdict(jax.device_get(metrics)).items()}
        self.last_loss, self.skipped_in_a_row = values["cross_entropy"], int(values["skipped_in_a_row"])
        self.log.step(step, values | self.batches.epochs(step))
        self.state = self.hooks.after_step(step, values, self.state)
        self.saves.look()
        if values["skipped_in_a_row"] >= self.config.faults.max_skipped:
            self.log.goodput(step)
            self.log.event("aborted", step=step, reason="too many skipped steps in a row")
            raise InputError(
                f"step {step}: {self.config.faults.max_skipped} steps in a row were skipped (loss {values['loss']}, "
                f"gradient norm {values['grad_norm']}); the last checkpoint in {self.run_dir} is from before them: "
                "lower optimizer.peak_lr or look at the data of these steps"
            )

    def _evaluate(self, step: int) -> None:
        """Measures the held-out text with the weights, and with their moving average if the run keeps one."""
        if self.held_out is None:
            return
        is_last = step in (self.config.train.num_steps, self.extended_at)
        with self.log.measure("evaluation"):
            self.hooks.before_evaluation(step)
            found = self.held_out.measure("validation", step, self.state.params, whole=is_last)
            self.last_validation = found or self.last_validation
            if self.state.ema is not None and not self.stop.requested():
                self.held_out.measure("validation_ema", step, self.state.ema, whole=is_last)

    def _sample(self, step: int) -> None:
        """Logs text drawn from the model; it is only there to be looked at, so no failure of it ends the run."""
        if not self.config.train.sample_every or self.stop.requested():
            return
        self.watchdog.arm(self.config.faults.deadline_seconds, f"sample of step {step}")
        try:
            with self.log.measure("sample"), jax.set_mesh(self.mesh):
                self.hooks.before_sample(step)
                text = complete(
                    define(self.config.model),
                    merged(self.state.params),
                    self.given.tokenizer,
                    self.config.train.sample_prompt,
                    num_tokens=self.config.train.sample_tokens,
                    key=jax.random.fold_in(jax.random.key(self.config.seed), step),
                )
            self.log.sample(step, text)
        except Exception as error:
            self.log.note(f"no sample of step {step}: {type(error).__name__}: {' '.join(str(error).split())[:400]}")


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step > 0 and step % every == 0
