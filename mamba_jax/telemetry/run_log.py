"""Writes metrics, events, samples and timings of a run to its files and to the terminal."""

import dataclasses
import math
import time
import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path

import jax
from jax.sharding import Mesh

from mamba_jax.errors import clean_line
from mamba_jax.evaluation.perplexity import Perplexity
from mamba_jax.experiment import ExperimentConfig
from mamba_jax.models import parameters
from mamba_jax.models.flops import model_flops_utilization
from mamba_jax.models.parameters import ModelDefinition
from mamba_jax.telemetry.events import EventLog, EventName
from mamba_jax.telemetry.goodput import Goodput
from mamba_jax.telemetry.loss_curve import plot_loss_curve
from mamba_jax.telemetry.metrics import MetricWriter, StatusDisplay

# Buckets of time that count as training when the speed is computed; evaluation, saving and the like do not.
_TRAINING = ("step", "data", "other")
# Seconds between "goodput" events. A run that is killed loses at most the account of its last minute.
_GOODPUT_EVERY = 60.0


class RunLog:
    """Reports the progress of a run to its files and the terminal; only the first of several processes writes."""

    def __init__(self, config: ExperimentConfig, mesh: Mesh, run_dir: Path) -> None:
        """Starts the accounting of time.

        Args:
            config: the resolved experiment.
            mesh: the mesh of devices that the run uses.
            run_dir: the run directory; it must exist.
        """
        self.config, self.mesh, self.run_dir = config, mesh, run_dir
        self._is_main = jax.process_index() == 0
        self._goodput = Goodput()
        self._events = EventLog(run_dir, enabled=self._is_main)
        self._display = StatusDisplay(config.train.num_steps, 0, enabled=self._is_main)
        self._writer: MetricWriter | None = None
        self._last: tuple[int, float] | None = None
        self._last_goodput = time.monotonic()
        self._skipped = 0.0
        self._definition: ModelDefinition | None = None

    def start(self, first_step: int, definition: ModelDefinition) -> None:
        """Opens the files, removes records that are written again, and announces the run.

        Args:
            first_step: updates done so far; see `MetricWriter`.
            definition: the model; it says which parameters are trained, all, a part of them or adapters.
        """
        self._display = StatusDisplay(self.config.train.num_steps, first_step, enabled=self._is_main)
        self._writer = MetricWriter(self.run_dir, first_step=first_step) if self._is_main else None
        kind = self.mesh.devices.flat[0].device_kind
        self._definition = definition
        count, num_trained = parameters.count(self.config.model), definition.num_trained
        self.event(
            "start",
            step=first_step,
            devices=self.mesh.size,
            device_kind=kind,
            processes=jax.process_count(),
            parameters=count,
            trained_parameters=num_trained,
        )
        resumed = f", resuming at step {first_step}" if first_step else ""
        trained = "" if num_trained == count else f", trains {num_trained:,} ({num_trained / count:.2%} of them)"
        self.note(f"{self.config.name}: {count:,} parameters{trained} on {self.mesh.size} x {kind}{resumed}")

    def live(self) -> AbstractContextManager[None]:
        """Shows the progress bar while the block runs."""
        return self._display.live()

    def measure(self, bucket: str) -> AbstractContextManager[None]:
        """Context manager that counts the time of its block in a bucket, see `Goodput.measure`."""
        return self._goodput.measure(bucket)

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds that this process has spent so far, by bucket."""
        return self._goodput.seconds

    def event(self, name: EventName, **fields: object) -> None:
        """Writes an event to `events.jsonl`; problems with checkpoints are printed, too."""
        self._events.write(name, **fields)
        if name == "quarantined":
            self.note(f"checkpoint of step {fields['step']} is damaged and was moved away: {fields['reason']}")
        elif name == "save_failed":
            self.note(f"step {fields['step']} could not be saved: {fields['reason']}")
        elif name == "not_removed":
            self.note(f"an older checkpoint could not be removed: {fields['reason']}")

    def note(self, text: str) -> None:
        """Prints a line."""
        self._display.note(text)

    def step(self, step: int, values: Mapping[str, float]) -> None:
        """Reports a finished step.

        Args:
            step: updates done.
            values: the fields of `StepMetrics` by name, and how often the text was gone through.
        """
        if values["skipped"] > self._skipped and values["skipped_in_a_row"]:
            finite = math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"])
            reason = "spike of the gradient" if finite else "loss or gradient not finite"
            self.event("skipped", step=step, reason=reason, grad_norm=values["grad_norm"])
            self.note(
                f"step {step} skipped, {values['skipped']:.0f} so far: {reason} (loss {values['loss']:.4f}, "
                f"gradient norm {values['grad_norm']:.4f})"
            )
        self._skipped = values["skipped"]
        if time.monotonic() - self._last_goodput > _GOODPUT_EVERY:
            self.goodput(step)
        if step % self.config.train.log_every and step != self.config.train.num_steps:
            self._display.advance(step, None, None)
            return
        seconds = self._seconds_per_step(step)
        batch_tokens = self.config.data.global_batch * self.config.data.seq_len
        speed = None if seconds is None else batch_tokens / seconds
        mfu = None if speed is None else self._mfu(speed)
        if self._writer is not None:
            reported = {**values, "tokens": step * batch_tokens, "tokens_per_second": speed, "mfu": mfu}
            self._writer.write("train", step, reported)
        status = f"loss {values['cross_entropy']:.4f}"
        status += "" if speed is None else f" | {speed:,.0f} tokens/s"
        status += "" if mfu is None else f" | MFU {mfu:.1%}"
        status += f" | skipped {values['skipped']:.0f}" if values["skipped"] else ""
        left = None if seconds is None else seconds * (self.config.train.num_steps - step)
        self._display.advance(step, status, left)

    def evaluation(self, kind: str, step: int, result: Perplexity) -> None:
        """Reports held-out loss; `kind` is that of `MetricWriter.write`."""
        if self._writer is not None:
            self._writer.write(kind, step, dataclasses.asdict(result))
        weights, _, part = kind.partition("/")
        of_average = " of the averaged weights" if weights == "validation_ema" else ""
        on_part = f" on {part}" if part else ""
        self.note(
            f"step {step}: held-out loss{on_part}{of_average} {result.loss:.4f} nats/token, "
            f"perplexity {result.perplexity:.3f}, {result.bits_per_byte:.4f} bits/byte"
        )

    def sample(self, step: int, text: str) -> None:
        """Reports text that the model wrote."""
        if self._writer is not None:
            self._writer.write_sample(step, text)
        self.note(f"step {step} sample: {text!r}")

    def goodput(self, step: int) -> None:
        """Writes a "goodput" event: the seconds that this process has spent so far, by bucket."""
        self._last_goodput = time.monotonic()
        seconds = {bucket: round(value, 3) for bucket, value in self.seconds.items()}
        self.event("goodput", step=step, seconds=seconds)

    def end(self, step: int, *, is_complete: bool) -> None:
        """Writes the last event and the loss curve; call it after the final save.

        Args:
            step: updates done.
            is_complete: whether this was the last step of the run, and not a stop on request.
        """
        self.goodput(step)
        self.event("finished" if is_complete else "preempted", step=step)
        if self._writer is not None:
            try:
                plot_loss_curve(self.run_dir, title=self.config.name)
            # No problem of drawing (fonts, caches, settings, numbers) is worth failing a run that is complete.
            except Exception as error:
                reason = getattr(error, "strerror", None) or clean_line(f"{type(error).__name__}: {error}")
                warnings.warn(f"no loss curve in {self.run_dir}: it cannot be written ({reason})", stacklevel=2)

    def close(self) -> None:
        """Writes everything that is buffered or waits for room on the disk, and warns of records that are lost."""
        self._events.close()
        if self._writer is not None:
            self._writer.close()

    def _seconds_per_step(self, step: int) -> float | None:
        """Average training time per step since the last call, without evaluation and saving; None at the first call."""
        seconds = self.seconds
        now = sum(seconds.get(bucket, 0.0) for bucket in _TRAINING)
        last, self._last = self._last, (step, now)
        return None if last is None or step == last[0] or now <= last[1] else (now - last[1]) / (step - last[0])

    def _mfu(self, tokens_per_second: float) -> float | None:
        """The share of the devices' peak that a speed amounts to; None if the peak is not known."""
        return model_flops_utilization(
            self.config.model,
            tokens_per_second,
            length=self.config.data.seq_len,
            device_kind=self.mesh.devices.flat[0].device_kind,
            num_devices=self.mesh.size,
            definition=self._definition,
        )
