"""Small tokenizers of every kind that the `tokenizers` library knows, each trained on a few words."""

import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from mamba_jax.data.tokenizer import JsonTokenizer

END = "<|endoftext|>"
SPECIAL = ["<unk>", "<s>", "</s>", END]
# Line breaks stand alone, as sentencepiece leaves them: no token holds one and more.
CORPUS = ["the state of the union is strong", "\n", "and the other thing, 42 times"] * 9
LOSSLESS = ("byte_level", "byte_level_prefix", "llama")
LOSSY = (
    "metaspace_always",
    "metaspace_first",
    "metaspace_never",
    "unigram",
    "t5",
    "word_piece",
    "word_level",
    "suffix",
)


def small(kind: str) -> str:
    """The JSON of the small tokenizer of a kind."""
    return _everything()[kind]


@functools.cache
def _everything() -> dict[str, str]:
    return dict(_all())


def saved(kind: str, folder: Path) -> JsonTokenizer:
    """The small tokenizer of a kind, through a file."""
    return opened(small(kind), folder)


def opened(content: str | bytes | dict[str, Any], folder: Path, *, end_of_document: str = END) -> JsonTokenizer:
    """The tokenizer of a file with this content."""
    path = folder / "tokenizer.json"
    if isinstance(content, dict):
        content = json.dumps(content)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return JsonTokenizer(str(path), end_of_document=end_of_document)


def _all() -> Iterator[tuple[str, str]]:
    bpe = functools.partial(trainers.BpeTrainer, special_tokens=SPECIAL, show_progress=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    for kind, prefix in (("byte_level", False), ("byte_level_prefix", True)):
        before = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
        trainer = bpe(vocab_size=300, initial_alphabet=alphabet)
        yield kind, _trained(models.BPE(), trainer, before=before, decoder=decoders.ByteLevel())
    for scheme in ("always", "first", "never"):
        before = pre_tokenizers.Metaspace(prepend_scheme=scheme)
        decoder = decoders.Metaspace(prepend_scheme=scheme)
        yield f"metaspace_{scheme}", _trained(models.BPE(unk_token="<unk>"), bpe(), before=before, decoder=decoder)
    yield "llama", _llama(bpe(special_tokens=[*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]))
    unigram = trainers.UnigramTrainer(vocab_size=60, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False)
    metaspace = pre_tokenizers.Metaspace()
    yield "unigram", _trained(models.Unigram(), unigram, before=metaspace, decoder=decoders.Metaspace())
    words = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), metaspace])
    t5 = json.loads(_trained(models.Unigram(), unigram, before=words, decoder=decoders.Metaspace()))
    t5["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "NFKC"}, {"type": "Lowercase"}]}
    yield "t5", json.dumps(t5)
    word_piece = trainers.WordPieceTrainer(special_tokens=["[UNK]", *SPECIAL[1:]], show_progress=False)
    bert = pre_tokenizers.BertPreTokenizer()
    model = models.WordPiece(unk_token="[UNK]")
    parts = json.loads(_trained(model, word_piece, before=bert, decoder=decoders.WordPiece()))
    yield "word_piece", json.dumps({**parts, "normalizer": json.loads(normalizers.BertNormalizer().__getstate__())})
    word_level = trainers.WordLevelTrainer(special_tokens=SPECIAL, show_progress=False)
    yield "word_level", _trained(models.WordLevel(unk_token="<unk>"), word_level, before=pre_tokenizers.Whitespace())
    suffix = models.BPE(unk_token="<unk>", end_of_word_suffix="</w>")
    before = pre_tokenizers.WhitespaceSplit()
    yield "suffix", _trained(suffix, bpe(end_of_word_suffix="</w>"), before=before, decoder=decoders.BPEDecoder())


def _trained(
    model: models.Model,
    trainer: trainers.Trainer,
    *,
    before: pre_tokenizers.PreTokenizer,
    decoder: decoders.Decoder | None = None,
) -> str:
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = before
    if decoder is not None:
        tokenizer.decoder = decoder
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer.to_str()


def _llama(trainer: trainers.Trainer) -> str:
    """BPE as sentencepiece writes it: spaces are marks, characters that it lacks are bytes, words may span spaces."""
    before = pre_tokenizers.Metaspace()
    parts = json.loads(_trained(models.BPE(unk_token="<unk>"), trainer, before=before))
    parts["model"] |= {"byte_fallback": True, "fuse_unk": True}
    parts["pre_tokenizer"] = None
    parts["added_tokens"] = parts["added_tokens"][: len(SPECIAL)]
    marks = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    parts["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, marks]}
    parts["decoder"] = {
        "type": "Sequence",
        "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ],
    }
    return json.dumps(parts)
