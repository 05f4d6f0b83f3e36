"""Configs of training: optimizer, schedule, loop, checkpoints, faults, and what the compiled step depends on."""

import dataclasses
from typing import Annotated, Literal

import pydantic

from mamba_jax.config_base import Config, require
from mamba_jax.data.config import Documents, Order
from mamba_jax.models.config import LoraConfig, ModelConfig, check_pattern


@dataclasses.dataclass(frozen=True, kw_only=True)
class CosineSchedule(Config):
    """Linear warm-up from 0, then half a cosine down to `final_lr` at the last step (the paper's appendix E.2).

    Attributes:
        kind: discriminator.
        warmup_fraction: share of all steps spent warming up.
        warmup_steps: the same as a number of steps, in place of the fraction.
        final_lr: learning rate at the last step.
    """

    kind: Literal["cosine"] = "cosine"
    warmup_fraction: float = 0.1
    warmup_steps: int | None = None
    final_lr: float = 1e-5

    def warmup(self, num_steps: int) -> int:
        """Updates of the warm-up in a run of `num_steps`."""
        return _number(self.warmup_steps, self.warmup_fraction * num_steps)

    def _check(self) -> None:
        self._require_fraction("warmup_fraction")
        _require_not_negative(self, "warmup_steps")
        require(self.final_lr >= 0, f"CosineSchedule.final_lr must not be negative, got {self.final_lr}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class WarmupStableDecaySchedule(Config):
    """Linear warm-up from 0, a constant plateau, then a linear decay to `final_lr` at the last step.

    A run can be extended, and branches be taken from it, while the plateau lasts; without a decay it never ends.

    Attributes:
        kind: discriminator.
        warmup_fraction: share of all steps spent warming up.
        warmup_steps: the same as a number of steps, in place of the fraction; it stays when `num_steps` changes.
        decay_fraction: share of all steps spent decaying.
        decay_steps: the same as a number of steps, in place of the fraction.
        final_lr: learning rate at the last step.
    """

    kind: Literal["warmup_stable_decay"] = "warmup_stable_decay"
    warmup_fraction: float = 0.02
    warmup_steps: int | None = None
    decay_fraction: float = 0.2
    decay_steps: int | None = None
    final_lr: float = 0.0

    def warmup(self, num_steps: int) -> int:
        """Updates of the warm-up in a run of `num_steps`."""
        return _number(self.warmup_steps, self.warmup_fraction * num_steps)

    def decay(self, num_steps: int) -> int:
        """Updates of the decay in a run of `num_steps`."""
        return _number(self.decay_steps, self.decay_fraction * num_steps)

    def _check(self) -> None:
        self._require_fraction("warmup_fraction", "decay_fraction")
        _require_not_negative(self, "warmup_steps", "decay_steps")
        total = self.warmup_fraction + self.decay_fraction
        require(
            total <= 1, f"WarmupStableDecaySchedule: warmup_fraction + decay_fraction must not exceed 1, got {total}"
        )


Schedule = CosineSchedule | WarmupStableDecaySchedule


def _number(given: int | None, share: float) -> int:
    return round(share) if given is None else given


def _require_not_negative(config: Schedule, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        require(value is None or value >= 0, f"{type(config).__name__}.{name} must not be negative, got {value}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig(Config):
    """The update rule; by default AdamW with the paper's recipe (arXiv 2312.00752, appendix E.2.1).

    Attributes:
        algorithm: "adamw", or "muon": hidden matrices get orthogonalised momentum, scaled to the root mean square
            of an AdamW update so that `peak_lr` and `weight_decay` serve both; all else gets AdamW.
        peak_lr: learning rate at the top of the schedule.
        schedule: shape of the learning rate over the run.
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: added to the square root of the second moment.
        weight_decay: decoupled decay of matrices; never of A_log, D, biases and norm scales.
        clip_norm: largest global gradient norm.
        muon_momentum: decay of Muon's momentum.
        ema_decay: keep an exponential moving average of the weights, average = decay * average + (1 - decay) * weights
            after every update; None keeps none.
        lr_multipliers: pairs of a regular expression and a factor on the learning rate of the parameters in whose
            paths, such as "layers/mixer/A_log", it is found; of several the first. 0 freezes them, and then they have
            no moments. All others have 1.
    """

    algorithm: Literal["adamw", "muon"] = "adamw"
    peak_lr: float
    schedule: Annotated[Schedule, pydantic.Field(discriminator="kind")] = CosineSchedule()
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    muon_momentum: float = 0.95
    ema_decay: float | None = None
    lr_multipliers: tuple[tuple[str, float], ...] = ()

    def _check(self) -> None:
        """Refuses numbers that no update can have, and patterns that are none."""
        self._require_positive("peak_lr", "eps", "clip_norm")
        for pattern, factor in self.lr_multipliers:
            check_pattern("OptimizerConfig.lr_multipliers", pattern)
            require(factor >= 0, f"OptimizerConfig.lr_multipliers: {pattern!r} has the factor {factor}, below 0")
        self._require_fraction("b1", "b2", "muon_momentum", "ema_decay", below_one=True)
        require(self.weight_decay >= 0, f"OptimizerConfig.weight_decay must not be negative, got {self.weight_decay}")
        require(
            self.clip_norm <= 1e18,
            f"OptimizerConfig.clip_norm must not exceed 1e18, whose square float32 still holds, got {self.clip_norm}",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig(Config):
    """The training loop.

    Attributes:
        num_steps: optimizer steps of the whole run.
        run_dir: where checkpoints, metrics, samples and plots go; a run found there is resumed.
        accumulation_steps: microbatches whose gradients are averaged into one step.
        windows: number of parts that the sequence is cut into. They are processed one after the other, passing on the
            recurrent state, so that only the activations of one part are in memory.
        window_gradient: "full" propagates gradients through the states between windows, which gives the gradient of the
            uncut sequence; "truncated" stops them there.
        z_loss: weight of the squared log-partition penalty; 0 disables it.
        loss_chunk: sequence positions whose logits exist at the same time.
        log_every: steps between metric lines.
        sample_every: steps between text samples; 0 disables them.
        sample_prompt: text that samples continue.
        sample_tokens: tokens of a sample.
        init_from: weights to start from instead of random ones: a training run, RUN or RUN@STEP, or a safetensors
            folder. The schedule and the data begin anew.
        init_weights: of a training run, "weights" for those of the last update, "average" for their moving average.
        init_optimizer: take the moments of that run's optimizer too.
        branch_from: another run's step to go on from, RUN@STEP, with its weights, moments and position in the data;
            the learning rate of every step before it must be the same here.
        profile_steps: first and last step of a profiler trace, counted from 1; None traces nothing.
    """

    num_steps: int
    run_dir: str
    accumulation_steps: int = 1
    windows: int = 1
    window_gradient: Literal["full", "truncated"] = "full"
    z_loss: float = 0.0
    loss_chunk: int = 512
    log_every: int = 10
    sample_every: int = 0
    sample_prompt: str = "\n"
    sample_tokens: int = 128
    init_from: str | None = None
    init_weights: Literal["weights", "average"] = "weights"
    init_optimizer: bool = False
    branch_from: str | None = None
    profile_steps: tuple[int, int] | None = None

    def _check(self) -> None:
        """Refuses numbers that no run has, and two things to begin with."""
        self._require_positive("num_steps", "accumulation_steps", "windows", "loss_chunk", "log_every", "sample_tokens")
        require(self.z_loss >= 0, f"TrainConfig.z_loss must not be negative, got {self.z_loss}")
        require(self.sample_every >= 0, f"TrainConfig.sample_every must not be negative, got {self.sample_every}")
        require(self.num_steps < 2**31, f"TrainConfig.num_steps must be below 2**31, got {self.num_steps}")
        require(
            self.init_from is None or self.branch_from is None,
            f"TrainConfig.init_from ({self.init_from}) and branch_from ({self.branch_from}) exclude each other: the "
            "first takes weights alone, the second the whole state",
        )
        require(
            not self.init_optimizer or (self.init_from is not None and self.init_weights == "weights"),
            "TrainConfig.init_optimizer takes the moments of the weights of a run: give init_from=RUN or RUN@STEP, and "
            "no init_weights",
        )
        first, last = self.profile_steps or (1, 1)
        fits = 1 <= first <= last <= self.num_steps
        require(fits, f"TrainConfig.profile_steps must be 1 <= first <= last <= num_steps, got ({first}, {last})")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig(Config):
    """When training state is saved.

    Attributes:
        every: steps between checkpoints; the last step is always saved.
        keep: newest checkpoints that are kept.
    """

    every: int = 1000
    keep: int = 3

    def _check(self) -> None:
        self._require_positive("every", "keep")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FaultsConfig(Config):
    """How a run handles faults.

    Attributes:
        max_skipped: the run ends after this many skipped steps in a row. A step is skipped, its weights and moments
            kept as they were, when its loss or gradient is not finite, or the gradient is a spike.
        spike_factor: a gradient norm above this times the mean of the last `spike_window` accepted is a spike; None
            accepts any finite gradient.
        spike_window: accepted steps whose gradient norms are remembered; until that many have been accepted, nothing
            counts as a spike.
        deadline_seconds: a process that makes no progress for this long (a step, an evaluation batch, a save) prints
            the stacks of its threads and exits, so that a launcher can restart the job.
        startup_seconds: the same limit while it restores and compiles.
    """

    max_skipped: int = 10
    spike_factor: float | None = None
    spike_window: int = 64
    deadline_seconds: float = 1800.0
    startup_seconds: float = 7200.0

    def _check(self) -> None:
        self._require_positive("max_skipped", "spike_window", "deadline_seconds", "startup_seconds")
        longest = max(self.deadline_seconds, self.startup_seconds)
        require(longest <= 1e9, f"FaultsConfig: deadlines must not exceed 1e9 seconds, got {longest}")
        require(
            self.spike_factor is None or self.spike_factor > 1,
            f"FaultsConfig.spike_factor must be above 1 or None, got {self.spike_factor}",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProgramConfig(Config):
    """Exactly what the compiled training step depends on, taken from the experiment by `ExperimentConfig.program`.

    Attributes:
        model: the network.
        optimizer: the update rule.
        faults: which steps are skipped.
        lora: adapters that are trained in place of the network's parameters.
        seed: seed of the initial parameters.
        num_steps: see `TrainConfig`.
        global_batch: see `DataConfig`.
        seq_len: see `DataConfig`.
        documents: see `DataConfig`.
        order: see `DataConfig`.
        accumulation_steps: see `TrainConfig`.
        windows: see `TrainConfig`.
        window_gradient: see `TrainConfig`.
        z_loss: see `TrainConfig`.
        loss_chunk: see `TrainConfig`.
    """

    model: ModelConfig
    optimizer: OptimizerConfig
    faults: FaultsConfig = FaultsConfig()
    lora: LoraConfig = LoraConfig()
    seed: int = 0
    num_steps: int
    global_batch: int
    seq_len: int
    documents: Documents = "packed"
    order: Order = "shuffled"
    accumulation_steps: int = 1
    windows: int = 1
    window_gradient: Literal["full", "truncated"] = "full"
    z_loss: float = 0.0
    loss_chunk: int = 512

    def _check(self) -> None:
        """Refuses a batch or a sequence that cannot be divided into the parts of a step."""
        batch, parts = self.global_batch, self.accumulation_steps
        require(
            batch % parts == 0,
            f"data.global_batch ({batch}) must be divisible by train.accumulation_steps ({parts}): change one of them",
        )
        length, windows = self.seq_len, self.windows
        require(
            length % windows == 0,
            f"data.seq_len ({length}) must be divisible by train.windows ({windows}): change one of them",
        )
        if self.order == "streams":
            for stack in self.model.stacks:
                stack.mixer.check_endless()
        self._check_schedule()
        self._check_recipe()

    def _check_schedule(self) -> None:
        """Refuses numbers of steps that the run does not have; fractions always fit."""
        schedule, total = self.optimizer.schedule, self.num_steps
        decay = schedule.decay(total) if isinstance(schedule, WarmupStableDecaySchedule) else 0
        given = (schedule.warmup_steps, getattr(schedule, "decay_steps", None))
        require(
            given == (None, None) or schedule.warmup(total) + decay <= total,
            f"optimizer.schedule has {schedule.warmup(total)} steps of warm-up and {decay} of decay, more than "
            f"train.num_steps = {total}: change one of them",
        )

    def _check_recipe(self) -> None:
        """Makes sure that weights and moments stay finite as long as gradients do.

        No element of a clipped gradient exceeds clip_norm, so no mean of them does, and Adam's direction is at most
        clip_norm / eps in size; Muon's is far smaller. Weight decay only brings weights nearer to 0.
        """
        recipe = self.optimizer
        factor = max((1.0, *(factor for _, factor in recipe.lr_multipliers)))
        largest_lr = factor * max(recipe.peak_lr, recipe.schedule.final_lr)
        decay, way = largest_lr * recipe.weight_decay, self.num_steps * largest_lr * recipe.clip_norm / recipe.eps
        require(
            decay <= 1,
            f"optimizer.peak_lr * weight_decay = {decay:.3g} must not exceed 1: weights would change their sign",
        )
        require(
            way <= 1e37,
            f"train.num_steps * optimizer.peak_lr * clip_norm / eps = {way:.3g}: weights could exceed what float32 "
            "holds; lower peak_lr or clip_norm, or raise eps",
        )
