"""Mamba-130M with the scaling-law recipe of arXiv 2312.00752, appendix E.2.1: 2.5 billion tokens of C4.

Command:   python train.py configs/mamba_130m.py --data.tokenizer.path 20B_tokenizer.json
Hardware:  any mesh of accelerators whose size divides the batch of 256 sequences (0.5 million tokens).
Data:      TFDS c4/en prepared as array_record, tokenised with GPT-NeoX-20B (a `tokenizers` JSON file).
Expected:  129,135,360 parameters, 4,800 steps. The paper shows this run's loss as a curve only; no figure of ours yet.
"""

from typing import Any

from mamba_jax.config import (
    CheckpointConfig,
    CosineSchedule,
    DataConfig,
    EvaluationConfig,
    ExperimentConfig,
    ModelConfig,
    OptimizerConfig,
    TfdsSource,
    TokenizerConfig,
    TrainConfig,
)


def recipe(name: str, *, peak_lr: float, num_steps: int, global_batch: int = 256, **model: Any) -> ExperimentConfig:
    """The paper's run of a model of this size; configs/mamba_370m.py and its like hold the other rows of its table."""
    return ExperimentConfig(
        name=name,
        model=ModelConfig(vocab_size=50277, **model),
        data=DataConfig(
            train=TfdsSource(name="c4/en", split="train"),
            validation=TfdsSource(name="c4/en", split="validation"),
            tokenizer=TokenizerConfig(kind="hf_json", path="20B_tokenizer.json"),
            seq_len=2048,
            global_batch=global_batch,
            documents="concatenated",
        ),
        optimizer=OptimizerConfig(peak_lr=peak_lr, schedule=CosineSchedule(warmup_fraction=0.1, final_lr=1e-5)),
        train=TrainConfig(num_steps=num_steps, run_dir=f"runs/{name}", sample_every=500),
        checkpoint=CheckpointConfig(every=500),
        evaluation=EvaluationConfig(every=500, max_batches=16),
    )


def get_config() -> ExperimentConfig:
    return recipe("mamba_130m", d_model=768, num_layers=24, peak_lr=3e-3, num_steps=4800)
