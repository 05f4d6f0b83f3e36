"""Every configuration dataclass, declared once, validated on construction, with a strict JSON round trip.

A run is described by one `ExperimentConfig`. Files under `configs/` build one in `get_config()`; the command line
overrides single fields (`--train.num-steps 100`); the resolved result is stored with every checkpoint.

All classes are frozen and keyword-only. Derived quantities are properties, never fields. Units: lengths and batch sizes
are in tokens and sequences; learning rates are per optimizer step; fractions lie in [0, 1].
"""

import dataclasses
from typing import Annotated, Literal

import pydantic

from mamba_jax.config_base import Config, require
from mamba_jax.config_base import from_json as from_json
from mamba_jax.config_base import to_json as to_json

DType = Literal["float32", "bfloat16", "float16"]
ScanName = Literal["reference", "pallas_gpu", "pallas_tpu", "triton", "xla", "xla_sequential", "xla_associative"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mamba1Config(Config):
    """The Mamba-1 mixer (arXiv 2312.00752, sections 3.2-3.6) and the ablations of its section 4.6.

    Attributes:
        kind: discriminator between mixers.
        state_dim: N, recurrent states per inner channel.
        conv_width: K, taps of the short causal convolution.
        expand: inner channels E = expand * d_model.
        dt_rank: R, rank of the projection that makes dt; None means ceil(d_model / 16).
        dt_min: smallest initial step size.
        dt_max: largest initial step size.
        dt_init: distribution of the dt projection's weights.
        dt_scale: scale of the dt projection's initial weights, times R**-0.5.
        dt_init_floor: lower clamp of the initial step size.
        use_bias: biases on the input and output projections.
        use_conv_bias: bias on the convolution.
        use_conv: the short convolution; False leaves only its SiLU.
        use_gate: the SiLU(z) output gate; False also halves the input projection.
        selective: which of dt, B and C depend on the input; the others are learned constants.
        discretization: of B: "euler" is dt * B as in the released code, "zoh" is the exact zero-order hold
            (exp(dt A) - 1) / A * B of the paper's equation 4.
        a_init: "s4d_real" is A_n = -(n + 1), "constant" is -1/2, "random" is -exp(normal).
        scan_implementation: backend of the selective scan; None lets the platform decide.
    """

    kind: Literal["mamba1"] = "mamba1"
    state_dim: int = 16
    conv_width: int = 4
    expand: int = 2
    dt_rank: int | None = None
    dt_min: float = 0.001
    dt_max: float = 0.1
    dt_init: Literal["random", "constant"] = "random"
    dt_scale: float = 1.0
    dt_init_floor: float = 1e-4
    use_bias: bool = False
    use_conv_bias: bool = True
    use_conv: bool = True
    use_gate: bool = True
    selective: tuple[Literal["dt", "B", "C"], ...] = ("dt", "B", "C")
    discretization: Literal["euler", "zoh"] = "euler"
    a_init: Literal["s4d_real", "constant", "random"] = "s4d_real"
    scan_implementation: ScanName | None = None

    def _check(self) -> None:
        self._require_positive("state_dim", "conv_width", "expand", "dt_rank", "dt_min", "dt_scale", "dt_init_floor")
        require(
            self.dt_max >= self.dt_min, f"Mamba1Config.dt_max ({self.dt_max}) must not be below dt_min ({self.dt_min})"
        )
        require(
            len(set(self.selective)) == len(self.selective),
            f"Mamba1Config.selective names a projection twice: {self.selective}",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig(Config):
    """A language model: embedding, `num_layers` pre-norm residual blocks, final RMSNorm, head.

    Attributes:
        vocab_size: V, token ids are 0 .. V - 1.
        d_model: D, width of the residual stream.
        num_layers: number of blocks.
        mixer: the sequence mixer of every block.
        vocab_multiple: embedding rows are padded up to a multiple of this; padded ids are never sampled.
        tie_embeddings: the head shares the embedding's weights.
        norm_eps: epsilon of every RMSNorm.
        embedding_std: standard deviation of the embedding's normal initialiser.
        rescale_residual: divide the output projections' initial weights by sqrt(num_layers).
        param_dtype: dtype parameters are stored and updated in.
        compute_dtype: dtype of matrix products and activations; the residual stream, the recurrent state, A, dt, norm
            statistics and the loss stay float32 whatever this says.
        remat: what the backward pass recomputes: "none" keeps all activations, "block" keeps only the residual stream
            between blocks, "dots" also keeps the results of matrix products.
    """

    vocab_size: int
    d_model: int
    num_layers: int
    mixer: Mamba1Config = Mamba1Config()
    vocab_multiple: int = 8
    tie_embeddings: bool = True
    norm_eps: float = 1e-5
    embedding_std: float = 0.02
    rescale_residual: bool = True
    param_dtype: DType = "float32"
    compute_dtype: DType = "bfloat16"
    remat: Literal["none", "block", "dots"] = "block"

    def _check(self) -> None:
        self._require_positive("vocab_size", "d_model", "num_layers", "vocab_multiple", "norm_eps", "embedding_std")
        require(
            self.padded_vocab_size < 2**31, f"ModelConfig.vocab_size must stay below 2**31 ids, got {self.vocab_size}"
        )

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding: `vocab_size` rounded up to a multiple of `vocab_multiple`."""
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

    @property
    def d_inner(self) -> int:
        """E, channels inside the mixer."""
        return self.mixer.expand * self.d_model

    @property
    def dt_rank(self) -> int:
        """R, rank of the dt projection."""
        return self.mixer.dt_rank if self.mixer.dt_rank is not None else -(-self.d_model // 16)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerConfig(Config):
    """How text becomes token ids.

    Attributes:
        kind: "byte" is ids 0-255 for bytes and 256 for end-of-document; "hf_json" is a `tokenizers` JSON file.
        path: the JSON file of "hf_json".
        end_of_document: the token of "hf_json" that separates documents; it must be in the vocabulary.
    """

    kind: Literal["byte", "hf_json"] = "byte"
    path: str | None = None
    end_of_document: str = "<|endoftext|>"

    def _check(self) -> None:
        require(
            (self.kind == "hf_json") == (self.path is not None),
            f"TokenizerConfig: kind={self.kind!r}, path={self.path!r}; 'hf_json' needs a path and 'byte' takes none",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShardSource(Config):
    """Token shards that `python -m mamba_jax.data.prepare` wrote.

    Attributes:
        kind: discriminator.
        path: the folder that holds `index.json`.
    """

    kind: Literal["shards"] = "shards"
    path: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextFolderSource(Config):
    """A folder of UTF-8 text files, one document a file, tokenised once into a cache before the run starts.

    Attributes:
        kind: discriminator.
        path: the folder; relative to the installed package `package` if that is given.
        package: name of an installed Python package that carries the text as data.
        pattern: glob below the folder.
        part: "all" files, or the side of the held-out split by `validation_fraction`.
        validation_fraction: share of the files (by a hash of the name), or of each if too few, that is "validation".
    """

    kind: Literal["text_folder"] = "text_folder"
    path: str
    package: str | None = None
    pattern: str = "**/*.txt"
    part: Literal["all", "train", "validation"] = "all"
    validation_fraction: float = 0.05

    def _check(self) -> None:
        self._require_fraction("validation_fraction")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TfdsSource(Config):
    """A TensorFlow Datasets set prepared as array_record (reading needs no TensorFlow), tokenised once into a cache.

    Attributes:
        kind: discriminator.
        name: published name such as "lm1b" or "c4/en", or the folder of an already prepared set.
        split: split expression such as "train" or "train[:90%]".
        data_dir: where TFDS keeps prepared sets; None means its default.
        text_field: the feature that holds the text.
    """

    kind: Literal["tfds"] = "tfds"
    name: str
    split: str
    data_dir: str | None = None
    text_field: str = "text"


Source = ShardSource | TextFolderSource | TfdsSource


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig(Config):
    """Which text, how it is cut, and how large a batch is.

    Attributes:
        train: source of training text.
        validation: source of held-out text; None disables evaluation during training.
        tokenizer: must agree with the one that made a `ShardSource`.
        seq_len: L, tokens of a training sequence.
        global_batch: B, sequences of a batch over all hosts and devices, before accumulation splits it.
        documents: "packed" marks documents by segment ids and resets the state between them; "concatenated" lets the
            state run on across the end-of-document token, as the published models were trained.
        order: "shuffled" draws windows of seq_len tokens at random; "streams" reads the text in order, as global_batch
            parallel streams, and the recurrent state of each is carried from one step to the next.
        cache_dir: where sources that are not shards are tokenised to.
        prefetch: batches prepared ahead by background threads.
    """

    train: Annotated[Source, pydantic.Field(discriminator="kind")]
    validation: Annotated[Source | None, pydantic.Field(discriminator="kind")] = None
    tokenizer: TokenizerConfig = TokenizerConfig()
    seq_len: int
    global_batch: int
    documents: Literal["packed", "concatenated"] = "packed"
    order: Literal["shuffled", "streams"] = "shuffled"
    cache_dir: str = "runs/data_cache"
    prefetch: int = 2

    def _check(self) -> None:
        self._require_positive("seq_len", "global_batch", "prefetch")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig(Config):
    """Sizes of the device mesh axes; one of them may be -1, "all remaining devices".

    Attributes:
        data: replicas of the parameters, each with its part of the batch.
            Slices of a pod that only a data-centre network joins split this axis first.
        fsdp: the batch and the parameters are both split over this axis.
        sequence: the length of the sequences and the parameters are split over this axis.
        tensor: inner channels and the vocabulary are split over this axis.
    """

    data: int = -1
    fsdp: int = 1
    sequence: int = 1
    tensor: int = 1

    def _check(self) -> None:
        sizes = (self.data, self.fsdp, self.sequence, self.tensor)
        require(
            all(size == -1 or size > 0 for size in sizes) and sizes.count(-1) <= 1,
            f"MeshConfig: sizes must be positive with at most one -1, got (data, fsdp, sequence, tensor) = {sizes}",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class CosineSchedule(Config):
    """Linear warm-up from 0, then half a cosine down to `final_lr` at the last step (the paper's appendix E.2).

    Attributes:
        kind: discriminator.
        warmup_fraction: share of all steps spent warming up.
        final_lr: learning rate at the last step.
    """

    kind: Literal["cosine"] = "cosine"
    warmup_fraction: float = 0.1
    final_lr: float = 1e-5

    def _check(self) -> None:
        self._require_fraction("warmup_fraction")
        require(self.final_lr >= 0, f"CosineSchedule.final_lr must not be negative, got {self.final_lr}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class WarmupStableDecaySchedule(Config):
    """Linear warm-up from 0, a constant plateau, then a linear decay to `final_lr` at the last step.

    Attributes:
        kind: discriminator.
        warmup_fraction: share of all steps spent warming up.
        decay_fraction: share of all steps spent decaying.
        final_lr: learning rate at the last step.
    """

    kind: Literal["warmup_stable_decay"] = "warmup_stable_decay"
    warmup_fraction: float = 0.02
    decay_fraction: float = 0.2
    final_lr: float = 0.0

    def _check(self) -> None:
        self._require_fraction("warmup_fraction", "decay_fraction")
        total = self.warmup_fraction + self.decay_fraction
        require(
            total <= 1, f"WarmupStableDecaySchedule: warmup_fraction + decay_fraction must not exceed 1, got {total}"
        )


Schedule = CosineSchedule | WarmupStableDecaySchedule


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig(Config):
    """The update rule; by default AdamW with the paper's recipe (arXiv 2312.00752, appendix E.2.1).

    Attributes:
        algorithm: "adamw", or "muon": hidden matrices get orthogonalised momentum, scaled to the root mean square
            of an AdamW update so that `peak_lr` and `weight_decay` serve both; all else gets AdamW.
        peak_lr: learning rate at the top of the schedule.
        schedule: its shape over the run.
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: added to the square root of the second moment.
        weight_decay: decoupled decay of matrices; never of A_log, D, biases and norm scales.
        clip_norm: largest global gradient norm.
        muon_momentum: decay of Muon's momentum.
        ema_decay: keep an exponential moving average of the weights, average = decay * average + (1 - decay) * weights
            after every update; None keeps none.
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

    def _check(self) -> None:
        self._require_positive("peak_lr", "eps", "clip_norm")
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
        windows: parts that the sequence is cut into, one worked on after the other; the recurrent state passes between
            them, and the memory of activations is that of one part.
        window_gradient: "full" propagates gradients through the states between windows, which gives the gradient of the
            uncut sequence; "truncated" stops them there.
        z_loss: weight of the squared log-partition penalty; 0 disables it.
        loss_chunk: sequence positions whose logits exist at the same time.
        log_every: steps between metric lines.
        sample_every: steps between text samples; 0 disables them.
        sample_prompt: text that samples continue.
        sample_tokens: tokens of a sample.
        init_from: safetensors folder to start from instead of random weights.
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
    profile_steps: tuple[int, int] | None = None

    def _check(self) -> None:
        self._require_positive("num_steps", "accumulation_steps", "windows", "loss_chunk", "log_every", "sample_tokens")
        require(self.z_loss >= 0, f"TrainConfig.z_loss must not be negative, got {self.z_loss}")
        require(self.sample_every >= 0, f"TrainConfig.sample_every must not be negative, got {self.sample_every}")
        require(self.num_steps < 2**31, f"TrainConfig.num_steps must be below 2**31, got {self.num_steps}")
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
class EvaluationConfig(Config):
    """Perplexity on the validation source.

    Attributes:
        every: steps between evaluations during training; 0 evaluates only after the last step.
        max_batches: batches of an evaluation during training; None reads the whole split.
        batch_size: sequences of an evaluation batch; None takes `data.global_batch`.
    """

    every: int = 0
    max_batches: int | None = None
    batch_size: int | None = None

    def _check(self) -> None:
        require(self.every >= 0, f"EvaluationConfig.every must not be negative, got {self.every}")
        self._require_positive("max_batches", "batch_size")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FaultsConfig(Config):
    """What a run puts up with.

    Attributes:
        max_skipped: the run ends after so many skipped steps in a row. A step is skipped, its weights and moments kept
            as they were, when its loss or gradient is not finite, or the gradient is a spike.
        spike_factor: a gradient norm above this times the mean of the last `spike_window` accepted is a spike; None
            accepts any finite gradient.
        spike_window: accepted steps whose gradient norms are remembered; before there are so many, nothing is a spike.
        deadline_seconds: a process that does not get on for so long (a step, an evaluation batch, a save) prints the
            stacks of its threads and exits, so that a launcher can restart the job.
        startup_seconds: the same for restoring and compiling.
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
class ExperimentConfig(Config):
    """Everything that decides a run's result.

    Attributes:
        name: a short name for logs and plots.
        seed: of parameters, data order and samples.
        model: the network.
        data: the text.
        optimizer: the update rule.
        train: the loop.
        mesh: the devices.
        checkpoint: saving.
        evaluation: held-out loss.
        faults: skipped steps and deadlines.
    """

    name: str
    seed: int = 0
    model: ModelConfig
    data: DataConfig
    optimizer: OptimizerConfig
    train: TrainConfig
    mesh: MeshConfig = MeshConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    faults: FaultsConfig = FaultsConfig()

    @property
    def evaluation_batch_size(self) -> int:
        """Sequences of an evaluation batch."""
        return self.evaluation.batch_size or self.data.global_batch

    def _check(self) -> None:
        require(0 <= self.seed < 2**32, f"ExperimentConfig.seed must lie in 0 .. 2**32 - 1, got {self.seed}")
        batch, parts = self.data.global_batch, self.train.accumulation_steps
        require(
            batch % parts == 0,
            f"data.global_batch ({batch}) must be divisible by train.accumulation_steps ({parts}): change one of them",
        )
        length, windows = self.data.seq_len, self.train.windows
        require(
            length % windows == 0,
            f"data.seq_len ({length}) must be divisible by train.windows ({windows}): change one of them",
        )
        self._check_recipe()

    def _check_recipe(self) -> None:
        """Weights and moments stay finite as long as gradients are.

        No element of a clipped gradient exceeds clip_norm, so neither does a mean of them, and Adam's direction is at
        most clip_norm / eps; Muon's is far smaller. Decay alone brings a weight nearer to 0.
        """
        recipe = self.optimizer
        largest_lr = max(recipe.peak_lr, recipe.schedule.final_lr)
        decay, way = largest_lr * recipe.weight_decay, self.train.num_steps * largest_lr * recipe.clip_norm / recipe.eps
        require(
            decay <= 1,
            f"optimizer.peak_lr * weight_decay = {decay:.3g} must not exceed 1: weights would change their sign",
        )
        require(
            way <= 1e37,
            f"train.num_steps * optimizer.peak_lr * clip_norm / eps = {way:.3g}: weights could exceed what float32 "
            "holds; lower peak_lr or clip_norm, or raise eps",
        )
