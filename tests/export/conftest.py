"""Tokenizers of every kind that people train on, and a model with random weights."""

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from mamba_jax.config import Mamba1Config, ModelConfig, TokenizerConfig
from mamba_jax.models import parameters

END = "<|endoftext|>"
_TEXT = ["the theory of the thing and the other thing", "naïve Füße don't walk .  They run , don't they ?"] * 9


def random_model(**changes: Any) -> tuple[ModelConfig, Any]:
    """A small model of uneven sizes; keywords replace fields of its config."""
    config, params = _random_model(**changes)
    return config, jax.tree.map(np.asarray, params)


@functools.cache
def _random_model(**changes: Any) -> tuple[ModelConfig, Any]:
    mixer = Mamba1Config(state_dim=3, conv_width=3, dt_rank=5, use_bias=True)
    config = ModelConfig(
        vocab_size=31, d_model=8, num_layers=3, mixer=mixer, tie_embeddings=False, compute_dtype="float32"
    )
    config = dataclasses.replace(config, **changes)
    return config, jax.jit(parameters.init, static_argnums=0)(config, jax.random.key(0))


def _byte_level(*, add_prefix_space: bool) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=[END], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(_TEXT, trainer)
    return tokenizer


def _unigram() -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=60, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(_TEXT, trainer)
    # Not among what is trained: text would spell it.
    tokenizer.add_special_tokens([END])
    end = tokenizer.token_to_id(END)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {END}", special_tokens=[(END, end)])
    return tokenizer


def _llama() -> tokenizers.Tokenizer:
    """Byte-pair encoding of words marked by ▁, with tokens for bytes of what it does not know."""
    trained = tokenizers.Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator(_TEXT, trainers.BpeTrainer(vocab_size=60, show_progress=False))
    names = ["<unk>", "<s>", END, *(f"<0x{byte:02X}>" for byte in range(256))]
    names += sorted(set(trained.get_vocab()) - set(names))
    merges = [tuple(pair) for pair in json.loads(trained.to_str())["model"]["merges"]]
    model = models.BPE(
        {name: number for number, name in enumerate(names)},
        merges,
        unk_token="<unk>",
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens(["<unk>", "<s>", END])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def _wordpiece() -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    special = ["[UNK]", "[CLS]", "[SEP]"]
    trainer = trainers.WordPieceTrainer(vocab_size=80, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(_TEXT, trainer)
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=12, pad_token="[UNK]")
    return tokenizer


TOKENIZERS: dict[str, Callable[[], tokenizers.Tokenizer] | None] = {
    "bytes": None,
    "byte-level": lambda: _byte_level(add_prefix_space=False),
    "byte-level with prefix space": lambda: _byte_level(add_prefix_space=True),
    "unigram": _unigram,
    "llama": _llama,
    "wordpiece": _wordpiece,
}


@pytest.fixture(scope="session")
def tokenizer_configs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TokenizerConfig]:
    folder = tmp_path_factory.mktemp("tokenizers")
    configs = {}
    for name, make in TOKENIZERS.items():
        if make is None:
            configs[name] = TokenizerConfig()
            continue
        path: Path = folder / f"{name}.json"
        make().save(str(path))
        configs[name] = TokenizerConfig(
            kind="hf_json", path=str(path), end_of_document="[SEP]" if name == "wordpiece" else END
        )
    return configs
