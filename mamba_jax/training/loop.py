"""The training loop."""

import contextlib
import dataclasses
import math
import signal
import threading
import time
from collections.abc import Iterator, Sequence

import jax
from jax.sharding import Mesh

from mamba_jax.checkpoint import Checkpointer
from mamba_jax.config import ExperimentConfig
from mamba_jax.data.pipeline import TrainBatches, evaluation_batches, open_source
from mamba_jax.data.shards import TokenDataset
from mamba_jax.data.tokenizer import Tokenizer, make_tokenizer
from mamba_jax.errors import InputError
from mamba_jax.evaluation.perplexity import Perplexity, evaluate
from mamba_jax.export import huggingface
from mamba_jax.generation.text import complete
from mamba_jax.models.parameters import ModelDefinition, Params, define
from mamba_jax.sharding import batch_shards, check_batches, make_mesh, put_batch
from mamba_jax.training import train_state
from mamba_jax.training.flops import model_flops_utilization
from mamba_jax.training.loss_curve import plot_loss_curve
from mamba_jax.training.metric_writer import MetricWriter, StatusDisplay
from mamba_jax.training.optimizer import make_optimizer
from mamba_jax.training.run_directory import check_run_directory, claim_run_directory
from mamba_jax.training.step import StepMetrics, make_train_step
from mamba_jax.training.train_state import TrainState


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What a call of `train` did.

    Attributes:
        step: updates done in the whole run.
        is_complete: the run has reached its last step; False if a signal stopped it, after saving.
        loss: cross entropy of the last step, nats per token; None if this call did no step.
        validation: the last evaluation; None without a validation source.
    """

    step: int
    is_complete: bool
    loss: float | None
    validation: Perplexity | None


def train(config: ExperimentConfig, *, devices: Sequence[jax.Device] | None = None) -> TrainResult:
    """Trains a model as `config` says, resuming the run in `config.train.run_dir` if there is one.

    Everything that can be wrong with the config, the data and the run directory is checked before the first device
    computation.

    Args:
        config: the run.
        devices: to use; None is all there are.

    Raises:
        InputError: one line about what is wrong.
    """
    tokenizer = make_tokenizer(config.data.tokenizer)
    _check_model(config, tokenizer)
    check_run_directory(config)
    initial = _initial_params(config)
    mesh = make_mesh(config.mesh, devices)
    check_batches(config, batch_shards(mesh))
    dataset = open_source(config.data.train, config.data, tokenizer)
    validation = open_source(config.data.validation, config.data, tokenizer) if config.data.validation else None
    return _Run(config, mesh, tokenizer, dataset, validation, initial).execute()


def _check_model(config: ExperimentConfig, tokenizer: Tokenizer) -> None:
    if tokenizer.vocab_size > config.model.vocab_size:
        raise InputError(
            f"model.vocab_size is {config.model.vocab_size} but the tokenizer has {tokenizer.vocab_size} ids: "
            f"set model.vocab_size to {tokenizer.vocab_size} or more"
        )
    if config.model.param_dtype != "float32":
        raise InputError(f"training needs model.param_dtype='float32', got {config.model.param_dtype!r}")
    if config.model.compute_dtype == "float16":
        raise InputError(
            "training in model.compute_dtype='float16' would lose small gradients: choose 'bfloat16' or 'float32'"
        )


def _initial_params(config: ExperimentConfig) -> Params | None:
    if config.train.init_from is None:
        return None
    loaded = huggingface.load(config.train.init_from)
    expected = define(config.model).params
    same_tree = jax.tree.structure(loaded.params) == jax.tree.structure(expected)
    if not same_tree or any(
        a.shape != b.shape for a, b in zip(jax.tree.leaves(loaded.params), jax.tree.leaves(expected), strict=True)
    ):
        raise InputError(
            f"train.init_from {config.train.init_from} holds another model: {loaded.config.num_layers} layers of width "
            f"{loaded.config.d_model}, vocabulary {loaded.config.padded_vocab_size}; the config has "
            f"{config.model.num_layers}, {config.model.d_model}, {config.model.padded_vocab_size}"
        )
    return loaded.params


class _Run:
    """One execution of the loop; holds what its parts share."""

    def __init__(
        self,
        config: ExperimentConfig,
        mesh: Mesh,
        tokenizer: Tokenizer,
        dataset: TokenDataset,
        validation: TokenDataset | None,
        initial: Params | None,
    ) -> None:
        self.config, self.mesh, self.tokenizer = config, mesh, tokenizer
        self.validation = validation
        self.definition: ModelDefinition = define(config.model)
        self.batches = TrainBatches(
            dataset,
            config.data,
            seed=config.seed,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        optimizer = make_optimizer(config.optimizer, num_steps=config.train.num_steps, decay=self.definition.decay)
        abstract = train_state.abstract_state(self.definition, optimizer, mesh)
        self.train_step = make_train_step(config, self.definition, optimizer, abstract)
        self.run_dir = claim_run_directory(config)
        self.checkpointer = Checkpointer(self.run_dir, config.checkpoint)
        self.first_step = self.checkpointer.latest_step or 0
        if self.checkpointer.latest_step is None:
            self.state = train_state.initialize(self.definition, optimizer, abstract, seed=config.seed, params=initial)
        else:
            params, rest = self.checkpointer.restore(self.first_step, params=abstract.params, rest=_rest(abstract))
            self.state = TrainState(params=params, **rest)
        self.is_main = jax.process_index() == 0
        self.display = StatusDisplay(config.train.num_steps, self.first_step, enabled=self.is_main)
        self.writer = MetricWriter(self.run_dir, first_step=self.first_step) if self.is_main else None
        self.clock = _Clock()
        self.last_loss: float | None = None
        self.last_validation: Perplexity | None = None

    def execute(self) -> TrainResult:
        config, last = self.config, self.config.train.num_steps
        resumed = f", resuming at step {self.first_step}" if self.first_step else ""
        count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(self.definition.params))
        self.display.note(
            f"{config.name}: {count:,} parameters on {self.mesh.size} x "
            f"{self.mesh.devices.flat[0].device_kind}{resumed}"
        )
        step = self.first_step
        with _stop_requests() as stop, self.display.live(), contextlib.closing(self.checkpointer):
            step = self._steps(stop)
            if step == last:
                self._evaluate(step)
                self._sample(step)
            self._save(step)
        if self.writer is not None:
            self.writer.close()
            plot_loss_curve(self.run_dir, title=config.name)
        if step < last:
            self.display.note(f"stopped and saved at step {step}; run the same command again to go on")
        return TrainResult(step=step, is_complete=step == last, loss=self.last_loss, validation=self.last_validation)

    def _steps(self, stop: threading.Event) -> int:
        """Runs steps until the last or until asked to stop; returns the number of updates done.

        The metrics of a step are read after the next one was dispatched, so the devices never wait for the host. They
        are read first where something is saved or evaluated, so that a state that is not finite is never kept.
        """
        config, last = self.config, self.config.train.num_steps
        batches = self.batches.iterate(self.first_step)
        pending: tuple[int, StepMetrics] | None = None
        step = self.first_step
        while step < last and not stop.is_set():
            evaluate_now = _is_due(step, config.evaluation.every)
            save_now = _is_due(step, config.checkpoint.every)
            sample_now = _is_due(step, config.train.sample_every)
            if evaluate_now or save_now or sample_now:
                self._report(pending)
                pending = None
                with self.clock.paused():
                    if evaluate_now:
                        self._evaluate(step)
                    if sample_now:
                        self._sample(step)
                    if save_now:
                        self._save(step)
            batch = put_batch(self.mesh, next(batches))
            with jax.set_mesh(self.mesh):
                self.state, metrics = self.train_step(self.state, batch)
            step += 1
            self._report(pending)
            pending = (step, metrics)
        self._report(pending)
        return step

    def _report(self, pending: tuple[int, StepMetrics] | None) -> None:
        if pending is None:
            return
        step, metrics = pending
        values = {name: float(value) for name, value in dataclasses.asdict(jax.device_get(metrics)).items()}
        if not math.isfinite(values["loss"]) or not math.isfinite(values["grad_norm"]):
            raise InputError(
                f"step {step}: loss {values['loss']}, gradient norm {values['grad_norm']}; nothing was saved after the "
                f"last checkpoint in {self.run_dir}: lower optimizer.peak_lr or look at the data of this step"
            )
        self.last_loss = values["cross_entropy"]
        is_logged = step % self.config.train.log_every == 0 or step == self.config.train.num_steps
        if not is_logged:
            self.display.advance(step, None, None)
            return
        seconds_per_step = self.clock.seconds_per_step(step)
        speed = None
        if seconds_per_step is not None:
            speed = self.config.data.global_batch * self.config.data.seq_len / seconds_per_step
        mfu = None if speed is None else self._mfu(speed)
        if self.writer is not None:
            tokens = step * self.config.data.global_batch * self.config.data.seq_len
            self.writer.write("train", step, {**values, "tokens": tokens, "tokens_per_second": speed, "mfu": mfu})
        status = f"loss {values['cross_entropy']:.4f}"
        status += "" if speed is None else f" | {speed:,.0f} tokens/s"
        status += "" if mfu is None else f" | MFU {mfu:.1%}"
        left = None if seconds_per_step is None else seconds_per_step * (self.config.train.num_steps - step)
        self.display.advance(step, status, left)

    def _mfu(self, tokens_per_second: float) -> float | None:
        return model_flops_utilization(
            self.config.model,
            tokens_per_second,
            device_kind=self.mesh.devices.flat[0].device_kind,
            num_devices=self.mesh.size,
        )

    def _evaluate(self, step: int) -> None:
        if self.validation is None:
            return
        is_last = step == self.config.train.num_steps
        batches = evaluation_batches(
            self.validation,
            self.config.data,
            batch_size=self.config.evaluation_batch_size,
            max_batches=None if is_last else self.config.evaluation.max_batches,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        result = evaluate(
            self.definition,
            self.state.params,
            batches,
            mesh=self.mesh,
            tokens_per_byte=self.validation.num_tokens / self.validation.num_bytes,
            loss_chunk=self.config.train.loss_chunk,
        )
        self.last_validation = result
        if self.writer is not None:
            self.writer.write("validation", step, dataclasses.asdict(result))
        self.display.note(
            f"step {step}: held-out loss {result.loss:.4f} nats/token, perplexity {result.perplexity:.3f}, "
            f"{result.bits_per_byte:.4f} bits/byte"
        )

    def _sample(self, step: int) -> None:
        if not self.config.train.sample_every:
            return
        text = complete(
            self.definition,
            self.state.params,
            self.tokenizer,
            self.config.train.sample_prompt,
            num_tokens=self.config.train.sample_tokens,
            key=jax.random.fold_in(jax.random.key(self.config.seed), step),
        )
        if self.writer is not None:
            self.writer.write_sample(step, text)
        self.display.note(f"step {step} sample: {text!r}")

    def _save(self, step: int) -> None:
        self.checkpointer.save(step, params=self.state.params, rest=_rest(self.state), config=self.config)


def _rest(state: TrainState) -> dict:
    return {"step": state.step, "opt_state": state.opt_state}


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step > 0 and step % every == 0


class _Clock:
    """Time per step since the last report, without the pauses; the time to the first, which compiles, is left out."""

    def __init__(self) -> None:
        self._step: int | None = None
        self._time = 0.0
        self._paused = 0.0

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._paused += time.perf_counter() - start

    def seconds_per_step(self, step: int) -> float | None:
        """Average since the last call; None at the first."""
        now = time.perf_counter()
        elapsed = None
        if self._step is not None and step > self._step:
            elapsed = (now - self._time - self._paused) / (step - self._step)
        self._step, self._time, self._paused = step, now, 0.0
        return elapsed


@contextlib.contextmanager
def _stop_requests() -> Iterator[threading.Event]:
    """An event that Ctrl-C or SIGTERM sets; a second Ctrl-C interrupts at once."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def request(number: int, frame: object) -> None:
        del frame
        stop.set()
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)

    for number in previous:
        signal.signal(number, request)
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
