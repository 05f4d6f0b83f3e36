"""Induction heads: models trained on rows of 256 ids are asked on rows of up to 2^20 (arXiv 2312.00752, section 4.1.2).

Command:   python -m mamba_jax.experiments induction_heads --scale published
           Its first cell alone: python train.py configs/experiments/induction_heads.py
Hardware:  one GPU; with --scale reduced two CPU cores.
Data:      generated as training goes.
Expected:  docs/results.md
"""

from mamba_jax.config import AttentionConfig, ExperimentConfig, Hybrid, Mamba1Config, Mamba2Config, SyntheticSource
from mamba_jax.experiments.declaration import Cell, Experiment, Scale
from mamba_jax.experiments.synthetic import AnswerAccuracy, Size, synthetic_run

SOURCE = SyntheticSource(task="induction_heads", num_ids=16)
EPOCH = 8192
SIZES = {
    "reduced": Size(seq_len=32, rows=32, steps=1500, learning_rate=2e-3, tested=64),
    "short": Size(seq_len=256, rows=32, steps=EPOCH, learning_rate=1e-3, tested=256),
    "published": Size(seq_len=256, rows=8, steps=25 * EPOCH, learning_rate=1e-3, tested=256),
}
# Powers of two: the longest rows of the test, and the longest that are asked of attention.
LONGEST = {"reduced": (13, 11), "short": (20, 14), "published": (20, 14)}
ATTENTION = AttentionConfig(num_heads=8)
# Label, width, mixer, and the paper's numbers from 2^6 on.
MODELS = {
    "mamba": ("Mamba", 64, Mamba1Config(), (100.0,) * 15),
    "mamba-time-invariant": ("Mamba, nothing selective", 64, Mamba1Config(selective=()), ()),
    "mamba2": ("Mamba-2", 64, Mamba2Config(state_dim=64, head_dim=32), ()),
    "hybrid": ("Mamba and attention", 64, Hybrid.of_pattern("MA", M=Mamba1Config(), A=ATTENTION), ()),
    "attention-rope": ("Attention, RoPE", 128, ATTENTION, (100.0, 100.0, 100.0, 83.6, 31.3, 18.4, 8.6, 9.0, 5.5)),
    "attention-nope": ("Attention, no positions", 128, AttentionConfig(num_heads=8, rotary_dims=0), ()),
}


def get_config(scale: Scale = "published", model: str = "mamba") -> ExperimentConfig:
    _, width, mixer, _ = MODELS[model]
    batch_tested = 64 if model.startswith("mamba") else 8
    return synthetic_run(
        f"induction_heads_{model}", SOURCE, mixer, width=width, size=SIZES[scale], batch_tested=batch_tested
    )


def get_experiment(scale: Scale) -> Experiment:
    size, (longest, longest_of_attention) = SIZES[scale], LONGEST[scale]
    names = [f"2^{power}" for power in range(6, longest + 1)]
    beyond = dict.fromkeys(names[longest_of_attention - 5 :], "its state grows with the row")
    cells = tuple(
        Cell(
            name=model,
            label=label,
            config=get_config(scale, model),
            published=dict(zip(names, paper, strict=False)),
            leaves_out={} if model.startswith("mamba") else beyond,
        )
        for model, (label, _, _, paper) in MODELS.items()
    )
    return Experiment(
        title="Induction heads",
        source="arXiv 2312.00752, section 4.1.2, table 11 and appendix E.1.2",
        about=(
            "One of a row's random ids has the id 15 in front of it; another 15 at the end asks for it again. Two "
            "layers are trained on rows of one length, with the loss on the answer alone, and asked on rows of "
            "many, which are read in parts with the state handed on. The paper trains on 8 rows of 256 ids at a "
            "time, for Mamba 204,800 updates, and gives its attention absolute positions, RoPE or xPos; here it "
            "has RoPE or none, because the models of this library have no learned positions."
        ),
        trained=size.text,
        cells=cells,
        metrics=tuple(
            AnswerAccuracy(name=name, source=SOURCE, seq_len=2**power, num_rows=size.tested)
            for power, name in enumerate(names, start=6)
        ),
    )
