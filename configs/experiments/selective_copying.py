"""Selective copying: the layer's selection against its gate (arXiv 2312.00752, section 4.1.1 and table 1).

Command:   python -m mamba_jax.experiments selective_copying --scale published
           Its first cell alone: python train.py configs/experiments/selective_copying.py
Hardware:  one GPU; with --scale reduced two CPU cores.
Data:      generated as training goes.
Expected:  docs/results.md
"""

from mamba_jax.config import ExperimentConfig, Mamba1Config, Mamba2Config, SyntheticSource
from mamba_jax.experiments.declaration import Cell, Experiment, Scale
from mamba_jax.experiments.synthetic import AnswerAccuracy, Size, synthetic_run

SIZES = {
    "reduced": Size(seq_len=48, rows=32, steps=1500, learning_rate=3e-3, tested=256),
    "short": Size(seq_len=256 + 16, rows=64, steps=15_000, learning_rate=1e-3, tested=1024),
    "published": Size(seq_len=4096 + 16, rows=64, steps=400_000, learning_rate=1e-4, tested=1024),
}
# Items to copy, of so many ids.
TASKS = {"reduced": (4, 8), "short": (16, 16), "published": (16, 16)}
# Label, mixer, and the paper's number.
MODELS = {
    "mamba-s6": ("Mamba with S6", Mamba1Config(), 99.8),
    "mamba-s4": ("Mamba with S4", Mamba1Config(selective=()), 56.4),
    "plain-s6": ("S6, no gate", Mamba1Config(use_conv=False, use_gate=False), 97.0),
    "plain-s4": ("S4, no gate", Mamba1Config(use_conv=False, use_gate=False, selective=()), 18.3),
    "mamba2": ("Mamba-2", Mamba2Config(state_dim=64, head_dim=32), None),
}


def source(scale: Scale) -> SyntheticSource:
    items, ids = TASKS[scale]
    return SyntheticSource(task="selective_copying", num_ids=ids, items=items)


def get_config(scale: Scale = "published", model: str = "mamba-s6") -> ExperimentConfig:
    return synthetic_run(f"selective_copying_{model}", source(scale), MODELS[model][1], width=64, size=SIZES[scale])


def get_experiment(scale: Scale) -> Experiment:
    size = SIZES[scale]
    cells = tuple(
        Cell(
            name=model,
            label=label,
            config=get_config(scale, model),
            published={} if paper is None else {"accuracy": paper},
        )
        for model, (label, _, paper) in MODELS.items()
    )
    asked = {"source": source(scale), "seq_len": size.seq_len, "num_rows": size.tested}
    return Experiment(
        title="Selective copying",
        source="arXiv 2312.00752, section 4.1.1, table 1 and appendix E.1.1",
        about=(
            "Random ids stand at random places among zeros, and have to be named in their order behind the row. "
            "Two layers of width 64. S6 is the selective state space, S4 the same with learned constants for dt, "
            "B and C, and real A (the paper's S4 has a complex one); no gate is the layer without gate and "
            "convolution. The paper copies 16 of 14 ids out of 4,096 places in 400,000 updates. Its architecture "
            "H3 and its layer Hyena are not in this library, so those five of its nine cells have no run."
        ),
        trained=f"{TASKS[scale][0]} ids to copy, of {TASKS[scale][1] - 2}. {size.text}",
        cells=cells,
        metrics=(AnswerAccuracy(name="accuracy", **asked), AnswerAccuracy(name="whole rows", whole_rows=True, **asked)),
        picture="side_by_side",
    )
