"""Multi-query associative recall (MQAR): accuracy against the size of the state (arXiv 2312.04927, section 4).

Command:   python -m mamba_jax.experiments associative_recall --scale published
           Its first cell alone: python train.py configs/experiments/associative_recall.py
Hardware:  one GPU; with --scale reduced two CPU cores.
Data:      generated as training goes.
Expected:  docs/results.md
"""

from collections.abc import Callable

from mamba_jax.config import AttentionConfig, ExperimentConfig, Hybrid, Mamba1Config, Mamba2Config, SyntheticSource
from mamba_jax.experiments.declaration import Cell, Experiment, Scale
from mamba_jax.experiments.synthetic import AnswerAccuracy, Size, synthetic_run
from mamba_jax.models.mixers.declaration import MixerConfig

SIZES = {
    "reduced": Size(seq_len=16, rows=64, steps=1500, learning_rate=3e-3, tested=256),
    "short": Size(seq_len=64, rows=256, steps=6000, learning_rate=2e-3, tested=2048),
    "published": Size(seq_len=512, rows=64, steps=100_000, learning_rate=1e-3, tested=3072),
}
# Vocabulary and pairs.
TASKS = {"reduced": (32, 4), "short": (256, 16), "published": (8192, 64)}
WIDTHS = {"reduced": (64,), "short": (32, 64), "published": (64, 128, 256)}
STATES = {"reduced": (4, 16), "short": (4, 16, 64), "published": (4, 16, 64)}
ATTENTION = AttentionConfig(num_heads=2)
# Mixers of a state N; attention has none.
OF_STATE: dict[str, tuple[str, Callable[[int], Mamba1Config | Mamba2Config]]] = {
    "mamba": ("Mamba", lambda state: Mamba1Config(state_dim=state)),
    "mamba2": ("Mamba-2", lambda state: Mamba2Config(state_dim=state, head_dim=32)),
}
WITH_ATTENTION = {
    "attention": ("Attention with short convolution", AttentionConfig(num_heads=2, conv_width=4)),
    "hybrid": ("Mamba and attention", Hybrid.of_pattern("MA", M=Mamba1Config(state_dim=16), A=ATTENTION)),
}


def source(scale: Scale) -> SyntheticSource:
    ids, pairs = TASKS[scale]
    return SyntheticSource(task="associative_recall", num_ids=ids, items=pairs)


def cell(scale: Scale, name: str, label: str, mixer: MixerConfig | Hybrid, width: int) -> Cell:
    config = synthetic_run(f"associative_recall_{name}", source(scale), mixer, width=width, size=SIZES[scale])
    return Cell(name=name, label=f"{label}, D={width}", config=config, series=label.split(", N")[0] + f", D={width}")


def get_config(scale: Scale = "published") -> ExperimentConfig:
    return get_experiment(scale).cells[0].config


def get_experiment(scale: Scale) -> Experiment:
    ids, pairs = TASKS[scale]
    size = SIZES[scale]
    cells = [
        cell(scale, f"{name}-d{width}-n{state}", f"{label}, N={state}", make(state), width)
        for name, (label, make) in OF_STATE.items()
        for width in WIDTHS[scale]
        for state in STATES[scale]
    ]
    cells += [
        cell(scale, f"{name}-d{width}", label, mixer, width)
        for name, (label, mixer) in WITH_ATTENTION.items()
        for width in WIDTHS[scale]
    ]
    asked = {"source": source(scale), "seq_len": size.seq_len, "num_rows": size.tested}
    return Experiment(
        title="Multi-query associative recall (MQAR)",
        source="arXiv 2312.04927, section 4 and figure 2; generator as in the authors' zoology/data/multiquery_ar.py",
        about=(
            "A row begins with pairs of a key and a value; then every key comes once more among random ids, and "
            "behind it its value is asked for. Two layers; the state is what a model remembers of a row, in "
            "bytes: for attention the keys and values of all its ids. The paper trains on 100,000 rows of 64 to "
            "512 ids in 64 epochs with the best of four learning rates and shows figures, not numbers; rows here "
            "are new in every update, and there is one learning rate."
        ),
        trained=f"{pairs} pairs of {ids:,} ids. {size.text}",
        cells=tuple(cells),
        metrics=(AnswerAccuracy(name="accuracy", **asked), AnswerAccuracy(name="whole rows", whole_rows=True, **asked)),
        picture="over_state",
    )
