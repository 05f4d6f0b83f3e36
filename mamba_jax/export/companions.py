"""Files that belong beside exported weights: those of the tokenizer, and settings of generation for `transformers`."""

import dataclasses
import json
from collections.abc import Iterator
from os.path import lexists
from pathlib import Path
from typing import Any

import tokenizers

from mamba_jax.data.config import TokenizerConfig
from mamba_jax.data.tokenization.chat import CHAT_TEMPLATE
from mamba_jax.data.tokenizer import Tokenizer, make_tokenizer
from mamba_jax.errors import InputError, short
from mamba_jax.export.files import read_file, read_json, require_file
from mamba_jax.models.config import ModelConfig

_TOKENIZER = "tokenizer.json"
_OWN = (_TOKENIZER, "tokenizer_config.json", "special_tokens_map.json", CHAT_TEMPLATE, "generation_config.json")


def tokenizer_beside(folder: Path) -> TokenizerConfig | None:
    """The config of the tokenizer in a model's folder; None if the folder has no `tokenizer.json`.

    The end-of-document token is `eos_token` of `tokenizer_config.json`, else `eos_token_id` of `config.json`.

    Raises:
        InputError: one of these files cannot be read.
    """
    path = folder / _TOKENIZER
    if not lexists(path):
        return None
    require_file(path)
    end = next(_ends(folder), None)
    default = TokenizerConfig.end_of_document
    return TokenizerConfig(kind="hf_json", path=str(path), end_of_document=default if end is None else end)


def _ends(folder: Path) -> Iterator[str]:
    """Yields the end-of-document tokens that the files beside a published model name, the best source first."""
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
    """The tokenizer of a training run: the files in its folder, if it holds them, else those that its config names."""
    path, template = folder / _TOKENIZER, folder / CHAT_TEMPLATE
    if lexists(template):
        own = dataclasses.replace(own, chat_template=str(template))
    if own.path is None:
        return own
    if lexists(path):
        return dataclasses.replace(own, kind="hf_json", path=str(path), encoding=None)
    same = folder / Path(own.path).name
    return dataclasses.replace(own, path=str(same)) if lexists(same) else own


def open_tokenizer(config: TokenizerConfig) -> Tokenizer:
    """Opens the tokenizer of a checkpoint; its path may be one of another machine, where the config was written.

    Raises:
        InputError: the file is missing, or is not a regular file or not a tokenizer.
    """
    if config.path is not None:
        try:
            require_file(Path(config.path))
        except InputError as error:
            name = _TOKENIZER if config.kind == "hf_json" else Path(config.path).name
            raise InputError(
                f"the tokenizer is missing ({error}): put it into the checkpoint's folder as {name}"
            ) from None
    return make_tokenizer(config)


def special_tokens(config: TokenizerConfig) -> dict[str, int]:
    """The ids of special tokens by their names in `transformers`, which would take 0 for them, an ordinary token."""
    end_of_document = open_tokenizer(config).end_of_document
    return dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), end_of_document)


def copied(folder: Path) -> dict[str, bytes]:
    """The tokenizer's files and generation settings in the folder of a published model, by name, unchanged."""
    return {name: read_file(folder / name) for name in _OWN if lexists(folder / name)}


def written(config: TokenizerConfig, model: ModelConfig, *, layout: str) -> dict[str, bytes]:
    """Files with which `transformers` loads the tokenizer of a training run and gets the same ids.

    Without `tokenizer_config.json`, `transformers` would use a tokenizer class for `MambaForCausalLM` that replaces the
    pre-tokeniser. The settings make sure that plain text never becomes a special token, unless there is a chat
    template, which has to spell them, and that batches are padded on the left, in front of the text.
    `generation_config.json` excludes ids that stand for no token.

    Args:
        config: config of the tokenizer.
        model: config of the model, whose padded vocabulary may be larger than that of the tokenizer.
        layout: name of the layout; only "hf" gets a `generation_config.json`.

    Returns:
        Contents of the files by name.

    Raises:
        InputError: the tokenizer cannot be read.
    """
    tokenizer = open_tokenizer(config)
    text = tokenizer.to_json()
    end = tokenizers.Tokenizer.from_str(text).id_to_token(tokenizer.end_of_document)
    own = read_file(Path(config.path)) if config.kind == "hf_json" and config.path is not None else b""
    is_plain = bool(own) and not _adds(_parse(own, Path(config.path or "")))
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": end,
        "eos_token": end,
        "pad_token": end,
        "clean_up_tokenization_spaces": False,
        "padding_side": "left",
        "split_special_tokens": True,
    }
    if (template := tokenizer.chat_template) is not None:
        # The model has learned what the template writes with these tokens, and as these tokens.
        named = {name: token for name, token in template.special_tokens.items() if token}
        settings |= {**named, "chat_template": template.text, "split_special_tokens": False}
    files: dict[str, bytes] = {
        _TOKENIZER: own if is_plain else text.encode(),
        "tokenizer_config.json": _json(settings),
    }
    if layout == "hf":
        generation: dict[str, Any] = special_tokens(config)
        if padding := list(range(tokenizer.vocab_size, model.padded_vocab_size)):
            generation["suppress_tokens"] = padding
        files["generation_config.json"] = _json(generation)
    return files


def _adds(tokenizer: tokenizers.Tokenizer) -> bool:
    """Whether a tokenizer adds special tokens to a text, truncates it or pads it."""
    return bool(tokenizer.num_special_tokens_to_add(False) or tokenizer.truncation or tokenizer.padding)


def _json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()
