"""Any checkpoint, trained further on text of your own: its model and weights, named by a flag, with a schedule anew.

Commands:  python train.py configs/own/fine_tune.py --train.init-from runs/quickstart/export \
               --data.train.path corpus.txt --data.validation.path corpus.txt
           the same with --lora.rank 8, for adapters alone
Hardware:  that of the model. On a CPU --model.compute-dtype float32 takes less time.
Data:      a file, a folder or a glob of JSON lines, parquet or text, the last 5 % of it held out. Checkpoints with a
           tokenizer of their own want --data.tokenizer.kind hf_json --data.tokenizer.path FOLDER/tokenizer.json.
Expected:  held-out loss before the first step and at the end; docs/fine_tuning.md has the figures of the quickstart.
"""

from mamba_jax.config import (
    FROM_CHECKPOINT,
    CheckpointConfig,
    CosineSchedule,
    DataConfig,
    EvaluationConfig,
    ExperimentConfig,
    FilesSource,
    OptimizerConfig,
    TrainConfig,
)


def get_config() -> ExperimentConfig:
    return ExperimentConfig(
        name="fine_tune",
        model=FROM_CHECKPOINT,
        data=DataConfig(
            train=FilesSource(path="corpus.txt", part="train"),
            validation=FilesSource(path="corpus.txt", part="validation"),
            seq_len=256,
            global_batch=4,
        ),
        optimizer=OptimizerConfig(peak_lr=1e-3, schedule=CosineSchedule(warmup_fraction=0.1, final_lr=1e-5)),
        train=TrainConfig(num_steps=300, run_dir="runs/fine_tuned", log_every=20),
        checkpoint=CheckpointConfig(every=100),
        evaluation=EvaluationConfig(every=100, batch_size=16),
    )
