"""Two texts of your own in one model, mostly the first and toward the end more of the second, each measured apart.

Commands:  python -m mamba_jax.data.train_tokenizer --files corpus.jsonl --vocab-size 8192 --output tokenizer.json
           python train.py configs/own/mixture.py --data.train.parts.1.weight 0.5
Hardware:  as configs/own/text.py.
Data:      corpus.jsonl and notes.jsonl, or what --data.train.parts.0.source.path and its like name; of each the last
           5 % are held out. Shares are of windows, so of tokens.
"""

import dataclasses

from configs.own import text
from mamba_jax.config import ExperimentConfig, FilesSource, MixturePart, MixtureSource


def get_config() -> ExperimentConfig:
    config = text.get_config()
    return dataclasses.replace(
        config,
        name="own_mixture",
        data=dataclasses.replace(
            config.data,
            train=MixtureSource(
                parts=(
                    MixturePart(name="corpus", source=FilesSource(path="corpus.jsonl", part="train"), weight=0.9),
                    MixturePart(
                        name="notes",
                        source=FilesSource(path="notes.jsonl", part="train"),
                        weight=0.1,
                        schedule=((800, 0.1), (1200, 0.9)),
                    ),
                )
            ),
            validation=MixtureSource(
                parts=(
                    MixturePart(name="corpus", source=FilesSource(path="corpus.jsonl", part="validation")),
                    MixturePart(name="notes", source=FilesSource(path="notes.jsonl", part="validation")),
                )
            ),
        ),
        train=dataclasses.replace(config.train, run_dir="runs/own_mixture"),
    )
