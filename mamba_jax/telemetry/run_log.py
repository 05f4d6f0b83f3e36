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
from mamba_jax.telemetry.events import EventLog, EventName
from mamba_jax.telemetry.goodput import Goodput
from mamba_jax.telemetry.loss_curve import plot_loss_curve
from mamba_jax.telemetry.metrics import Kind, MetricWriter, StatusDisplay

# Time that training takes as long as nothing else is done.
_TRAINING = ("step", "data", "other")
_GOODPUT_EVERY = 60.0


class RunLog:
    """Writes what happens in a run; only the first of several processes does."""

    def __init__(self, config: ExperimentConfig, mesh: Mesh, run_dir: Path) -> None:
        """Starts the clock.

        Args:
            config: the resolved experiment.
            mesh: the devices that it runs on.
            run_dir: an existing folder.
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

    def start(self, first_step: int) -> None:
        """Says what is about to run; metrics of later steps than `first_step` are dropped and written again."""
        self._display = StatusDisplay(self.config.train.num_steps, first_step, enabled=self._is_main)
        self._writer = MetricWriter(self.run_dir, first_step=first_step) if self._is_main else None
        kind = self.mesh.devices.flat[0].device_kind
        self.event("start", step=first_step, devices=self.mesh.size, device_kind=kind, processes=jax.process_count())
        resumed = f", resuming at step {first_step}" if first_step else ""
        count = parameters.count(self.config.model)
        self.note(f"{self.config.name}: {count:,} parameters on {self.mesh.size} x {kind}{resumed}")

    def live(self) -> AbstractContextManager[None]:
        """Shows the progress bar while the block runs."""
        return self._display.live()

    def measure(self, bucket: str) -> AbstractContextManager[None]:
        """Counts the time of the block for a bucket of `goodput`."""
        return self._goodput.measure(bucket)

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds of this process by bucket."""
        return self._goodput.seconds

    def event(self, name: EventName, **fields: object) -> None:
        """Writes to `events.jsonl`; what a user should know at once is printed too."""
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
            values: fields of `StepMetrics`.
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

    def evaluation(self, kind: Kind, step: int, result: Perplexity) -> None:
        """Reports held-out loss, of the weights or of their average."""
        if self._writer is not None:
            self._writer.write(kind, step, dataclasses.asdict(result))
        of_average = " of the averaged weights" if kind == "validation_ema" else ""
        self.note(
            f"step {step}: held-out loss{of_average} {result.loss:.4f} nats/token, perplexity {result.perplexity:.3f}, "
            f"{result.bits_per_byte:.4f} bits/byte"
        )

    def sample(self, step: int, text: str) -> None:
        """Reports text that the model wrote."""
        if self._writer is not None:
            self._writer.write_sample(step, text)
        self.note(f"step {step} sample: {text!r}")

    def goodput(self, step: int) -> None:
        """Writes where the time of this process went so far."""
        self._last_goodput = time.monotonic()
        seconds = {bucket: round(value, 3) for bucket, value in self.seconds.items()}
        self.event("goodput", step=step, seconds=seconds)

    def end(self, step: int, *, is_complete: bool) -> None:
        """Says how this process ended, everything being saved."""
        self.goodput(step)
        self.event("finished" if is_complete else "preempted", step=step)
        if self._writer is not None:
            try:
                plot_loss_curve(self.run_dir, title=self.config.name)
            # A picture ends no run, whatever is wrong with fonts, caches, settings or numbers.
            except Exception as error:
                reason = getattr(error, "strerror", None) or clean_line(f"{type(error).__name__}: {error}")
                warnings.warn(f"no loss curve in {self.run_dir}: it cannot be written ({reason})", stacklevel=2)

    def close(self) -> None:
        """Writes what is buffered or waits for room, and tells what is lost."""
        self._events.close()
        if self._writer is not None:
            self._writer.close()

    def _seconds_per_step(self, step: int) -> float | None:
        """Average since the last call, without what is not training; None at the first."""
        seconds = self.seconds
        now = sum(seconds.get(bucket, 0.0) for bucket in _TRAINING)
        last, self._last = self._last, (step, now)
        return None if last is None or step == last[0] or now <= last[1] else (now - last[1]) / (step - last[0])

    def _mfu(self, tokens_per_second: float) -> float | None:
        return model_flops_utilization(
            self.config.model,
            tokens_per_second,
            length=self.config.data.seq_len,
            device_kind=self.mesh.devices.flat[0].device_kind,
            num_devices=self.mesh.size,
        )
