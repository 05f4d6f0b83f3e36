"""Which text a model learns from, and how it is cut."""

import dataclasses
from typing import Annotated, Literal

import pydantic

from mamba_jax.config_base import Config, require


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
Documents = Literal["packed", "concatenated"]
Order = Literal["shuffled", "streams"]


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
    documents: Documents = "packed"
    order: Order = "shuffled"
    cache_dir: str = "runs/data_cache"
    prefetch: int = 2

    def _check(self) -> None:
        self._require_positive("seq_len", "global_batch", "prefetch")
