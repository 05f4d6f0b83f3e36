"""Files that lie beside the weights: the tokenizer's, and how `transformers` generates."""

import dataclasses
import json
from collections.abc import Iterator
from os.path import lexists
from pathlib import Path
from typing import Any

import tokenizers

from mamba_jax.data.config import TokenizerConfig
from mamba_jax.data.tokenizer import Tokenizer, make_tokenizer
from mamba_jax.errors import InputError, short
from mamba_jax.export.files import read_file, read_json, require_file
from mamba_jax.models.config import ModelConfig

_TOKENIZER = "tokenizer.json"
_OWN = (_TOKENIZER, "tokenizer_config.json", "special_tokens_map.json", "generation_config.json")


def tokenizer_beside(folder: Path) -> TokenizerConfig | None:
    """The tokenizer that lies in a folder; None if there is none.

    Its end of document is the `eos_token` of `tokenizer_config.json`, or that of `config.json`.

    Raises:
        InputError: a file of it cannot be read.
    """
    path = folder / _TOKENIZER
    if not lexists(path):
        return None
    require_file(path)
    end = next(_ends(folder), None)
    default = TokenizerConfig.end_of_document
    return TokenizerConfig(kind="hf_json", path=str(path), end_of_document=default if end is None else end)


def _ends(folder: Path) -> Iterator[str]:
    if lexists(folder / "tokenizer_config.json"):
        token = read_json(folder / "tokenizer_config.json").get("eos_token")
        token = token.get("content") if isinstance(token, dict) else token
        if token is not None and not isinstance(token, str):
            raise InputError(f"{folder / 'tokenizer_config.json'}: eos_token={short(token)} is not text")
        if token is not None:
            yield token
    if lexists(folder / "config.json"):
        number = read_json(folder / "config.json").get("eos_token_id")
        number = number[0] if isinstance(number, list) and number else number
        if isinstance(number, int) and 0 <= number < 2**31:
            token = _parse(read_file(folder / _TOKENIZER), folder / _TOKENIZER).id_to_token(number)
            if token is not None:
                yield token


def _parse(data: bytes, path: Path) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_buffer(data)
    except Exception as error:  # the library raises Exception itself
        raise InputError(f"{path} is not a tokenizer of the `tokenizers` library: {str(error)[:200]}") from None


def tokenizer_of_run(folder: Path, own: TokenizerConfig) -> TokenizerConfig:
    """The tokenizer of a training run: the file that lies in its folder, else the one that its config names."""
    path = folder / _TOKENIZER
    return dataclasses.replace(own, path=str(path)) if own.kind == "hf_json" and lexists(path) else own


def open_tokenizer(config: TokenizerConfig) -> Tokenizer:
    """The tokenizer of a checkpoint, whose path may come out of a config that was written elsewhere.

    Raises:
        InputError: the file is missing, or is not a regular file or not a tokenizer.
    """
    if config.path is not None:
        try:
            require_file(Path(config.path))
        except InputError as error:
            raise InputError(
                f"the tokenizer is missing ({error}): put it into the checkpoint's folder as {_TOKENIZER}"
            ) from None
    return make_tokenizer(config)


def special_tokens(config: TokenizerConfig) -> dict[str, int]:
    """Ids that `transformers` would otherwise take to be 0, which for bytes or words is an ordinary token."""
    end_of_document = open_tokenizer(config).end_of_document
    return dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), end_of_document)


def copied(folder: Path) -> dict[str, bytes]:
    """The files of a published model's folder that belong to its tokenizer, as they are."""
    return {name: read_file(folder / name) for name in _OWN if lexists(folder / name)}


def written(config: TokenizerConfig, model: ModelConfig, *, layout: str) -> dict[str, bytes]:
    """Files by which `transformers` reads the tokenizer of a training run and gives the same ids.

    Without `tokenizer_config.json` it would take another class for `MambaForCausalLM`, which replaces the
    pre-tokeniser. Text does not yield special tokens, whatever it spells; batches are padded on the left, where they
    leave the state of a recurrent model alone. Rows of the embedding that stand for no token are never generated.

    Args:
        config: of the tokenizer.
        model: whose embedding it indexes.
        layout: `generation_config.json` belongs to "hf" alone.

    Raises:
        InputError: the tokenizer cannot be read.
    """
    tokenizer = open_tokenizer(config)
    text = tokenizer.to_json()
    end = tokenizers.Tokenizer.from_str(text).id_to_token(tokenizer.end_of_document)
    own = b"" if config.path is None else read_file(Path(config.path))
    is_plain = bool(own) and not _adds(_parse(own, Path(config.path or "")))
    files: dict[str, bytes] = {
        _TOKENIZER: own if is_plain else text.encode(),
        "tokenizer_config.json": _json(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "bos_token": end,
                "eos_token": end,
                "pad_token": end,
                "clean_up_tokenization_spaces": False,
                "padding_side": "left",
                "split_special_tokens": True,
            }
        ),
    }
    if layout == "hf":
        generation: dict[str, Any] = special_tokens(config)
        if padding := list(range(tokenizer.vocab_size, model.padded_vocab_size)):
            generation["suppress_tokens"] = padding
        files["generation_config.json"] = _json(generation)
    return files


def _adds(tokenizer: tokenizers.Tokenizer) -> bool:
    """Whether a file makes more or less of a text than its tokens."""
    return bool(tokenizer.num_special_tokens_to_add(False) or tokenizer.truncation or tokenizer.padding)


def _json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()
