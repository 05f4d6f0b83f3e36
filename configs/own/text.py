"""A small model of your own text, with a tokenizer of your own: JSON lines, parquet or text files, named by flags.

Commands:  python -m mamba_jax.data.train_tokenizer --files corpus.jsonl --vocab-size 8192 --output tokenizer.json
           python train.py configs/own/text.py --data.train.path corpus.jsonl --data.validation.path corpus.jsonl
Hardware:  two CPU cores, about 2 GB of memory; a GPU or TPU as it is.
Data:      whatever --data.train.path names: a file, a folder or a glob. Of few files the last 5 % are held out, of many
           5 % of the files.
"""

import dataclasses

from configs import quickstart
from mamba_jax.config import ExperimentConfig, FilesSource, TokenizerConfig


def get_config() -> ExperimentConfig:
    config = quickstart.get_config()
    return dataclasses.replace(
        config,
        name="own_text",
        model=dataclasses.replace(config.model, vocab_size=8192),
        data=dataclasses.replace(
            config.data,
            train=FilesSource(path="corpus.jsonl", part="train"),
            validation=FilesSource(path="corpus.jsonl", part="validation"),
            tokenizer=TokenizerConfig(kind="hf_json", path="tokenizer.json"),
        ),
        train=dataclasses.replace(config.train, run_dir="runs/own_text", sample_prompt="The "),
    )
