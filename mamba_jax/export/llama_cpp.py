"""Writes Mamba-1 and Mamba-2 as a GGUF file, by the names and conventions of llama.cpp's converter.

Differences from the `hf` layout: A = -exp(A_log) is stored and not its logarithm, the convolution has two dimensions,
and numbers that belong to a head have a second one. What is no matrix stays float32.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from mamba_jax.errors import InputError
from mamba_jax.export import files, huggingface
from mamba_jax.export.published_config import to_json
from mamba_jax.models.config import ModelConfig
from mamba_jax.models.parameters import Params

LAYOUT, FILE = "gguf", "model.gguf"
# Any; programs of fixed memory a token have no limit.
_CONTEXT_LENGTH = 2**20
# The classes of `transformers` whose models it computes.
_KINDS = ("MambaForCausalLM", "FalconMambaForCausalLM", "Mamba2ForCausalLM")
_NO_LIMITS = [0.0, {"__float__": "Infinity"}]
_FLOAT32 = ("ssm_a", "ssm_d", "ssm_conv1d.weight", "norm.weight", ".bias")
_TYPES = {"float32": ("F32", "ALL_F32"), "float16": ("F16", "MOSTLY_F16"), "bfloat16": ("BF16", "MOSTLY_BF16")}


def save(
    path: str | Path,
    config: ModelConfig,
    params: Params,
    *,
    end_of_document: int | None = None,
    companions: Mapping[str, bytes] | None = None,
) -> tuple[str, ...]:
    """Writes `model.gguf` into a new folder: all files appear together, or none.

    Args:
        path: the folder; it must not exist, or be empty.
        config: config of the model.
        params: its parameters, with layers stacked; matrices keep their dtype.
        end_of_document: id of the token that ends a text; None if it has none.
        companions: further files by name. A `tokenizer.json` among them goes into the GGUF file too, if llama.cpp has a
            tokenizer that gives the same ids; see `vocabulary`.

    Returns:
        Names of the files.

    Raises:
        InputError: the folder is not empty or cannot be written, the package gguf is missing, or llama.cpp does not
            compute what the model does.
    """
    gguf, path, given = _gguf(), Path(path), dict(companions or {})
    files.require_new_folder(path)
    content = _hf_config(config)
    has_heads = "num_heads" in content
    architecture = gguf.MODEL_ARCH.MAMBA2 if has_heads else gguf.MODEL_ARCH.MAMBA
    writer = gguf.GGUFWriter(None, gguf.MODEL_ARCH_NAMES[architecture])
    _describe(writer, content)
    writer.add_file_type(gguf.LlamaFileType[_TYPES[config.param_dtype][1]])
    words = vocabulary(given["tokenizer.json"]) if "tokenizer.json" in given else None
    _add_vocabulary(writer, words, rows=content["vocab_size"], end_of_document=end_of_document)
    names = gguf.get_tensor_name_map(architecture, config.num_layers)
    for name, value in huggingface.tensors_of(config, params, layout="hf").items():
        theirs = names.get_name(name.replace("dt_bias", "dt_proj.bias"), try_suffixes=(".weight", ".bias"))
        assert theirs is not None, f"gguf has no name for {name}"
        kind = gguf.GGMLQuantizationType["F32" if theirs.endswith(_FLOAT32) else _TYPES[config.param_dtype][0]]
        stored = gguf.quantize(_as_theirs(name, value.astype(np.float32), per_head=has_heads), kind)
        writer.add_tensor(theirs, np.ascontiguousarray(stored), raw_dtype=kind)
    with files.new_folder(path) as folder:
        writer.write_header_to_file(folder / FILE)
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        for name, data in given.items():
            (folder / name).write_bytes(data)
    return (FILE, *given)


def vocabulary(tokenizer: bytes) -> dict[str, Any] | None:
    """What llama.cpp needs to give the ids of a tokenizer; None if it has no tokenizer that does.

    It has that of GPT-2: byte-pair encoding of bytes, of text cut by one regular expression.

    Args:
        tokenizer: the content of `tokenizer.json`.

    Returns:
        The tokens by id, the ids of special ones, and the merges in order, by the names "tokens", "special", "merges".
    """
    content = json.loads(tokenizers.Tokenizer.from_buffer(tokenizer).to_str())
    model, cut = content["model"], content["pre_tokenizer"] or {}
    is_cut_as_theirs = cut.get("type") == "ByteLevel" and cut.get("use_regex", True) and not cut["add_prefix_space"]
    if model["type"] != "BPE" or not is_cut_as_theirs or content["normalizer"] is not None or not model["merges"]:
        return None
    if any(model.get(option) for option in ("dropout", "byte_fallback", "ignore_merges", "end_of_word_suffix")):
        return None
    added = {token["content"]: token["id"] for token in content["added_tokens"]}
    if not all(token["special"] for token in content["added_tokens"]):
        return None
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    tokens = {number: name for name, number in (model["vocab"] | added).items()}
    return {"tokens": tokens, "special": set(added.values()), "merges": merges}


def _gguf() -> Any:
    try:
        import gguf
    except ImportError:
        raise InputError(f"the layout {LAYOUT!r} needs the package gguf: pip install 'mamba-jax[gguf]'") from None
    return gguf


def _hf_config(config: ModelConfig) -> dict[str, Any]:
    """The config by Hugging Face's names, if llama.cpp computes what it says."""
    content = to_json(config, layout="hf", extra={})
    (kind,) = content["architectures"]
    if kind not in _KINDS:
        raise InputError(f"the layout {LAYOUT!r} is written for Mamba-1 and Mamba-2 alone, not for {kind!r}")
    width, epsilon = content["hidden_size"], content["layer_norm_epsilon"]
    inner = content["num_heads"] * content["head_dim"] if "num_heads" in content else content["intermediate_size"]
    needed = {
        "an inner width of twice d_model": inner == 2 * width,
        "no bias in projections": not content["use_bias"],
        "a bias in the convolution": content["use_conv_bias"],
        "one epsilon for all norms": content.get("mixer_rms_eps", epsilon) == epsilon,
        "one group": content.get("n_groups", 1) == 1,
        "no limits of the step size": content.get("time_step_limit", _NO_LIMITS) == _NO_LIMITS,
    }
    if missing := [what for what, is_there in needed.items() if not is_there]:
        raise InputError(f"llama.cpp computes {kind!r} only with {' and '.join(missing)}: export another layout")
    return content | {"inner": inner}


def _describe(writer: Any, content: Mapping[str, Any]) -> None:
    """Adds what llama.cpp wants to know of the network."""
    writer.add_context_length(_CONTEXT_LENGTH)
    writer.add_embedding_length(content["hidden_size"])
    writer.add_vocab_size(content["vocab_size"])
    # Its loader asks for these of every architecture.
    writer.add_feed_forward_length(0)
    writer.add_head_count(0)
    writer.add_block_count(content["num_hidden_layers"])
    writer.add_ssm_conv_kernel(content["conv_kernel"])
    writer.add_ssm_inner_size(content["inner"])
    writer.add_ssm_state_size(content["state_size"])
    writer.add_ssm_time_step_rank(content["num_heads" if "num_heads" in content else "time_step_rank"])
    writer.add_layer_norm_rms_eps(content["layer_norm_epsilon"])
    if "n_groups" in content:
        writer.add_ssm_group_count(content["n_groups"])
    else:
        writer.add_ssm_dt_b_c_rms("mixer_rms_eps" in content)


def _add_vocabulary(writer: Any, words: dict[str, Any] | None, *, rows: int, end_of_document: int | None) -> None:
    """Adds a vocabulary with a token for every row of the embedding; without one, programs work on ids."""
    if words is None:
        writer.add_tokenizer_model("none")
        return
    types = _gguf().TokenType
    kinds = [types.CONTROL if row in words["special"] else types.NORMAL for row in range(rows)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([words["tokens"].get(row, f"[PAD{row}]") for row in range(rows)])
    writer.add_token_types([kind if row in words["tokens"] else types.UNUSED for row, kind in enumerate(kinds)])
    writer.add_token_merges(words["merges"])
    writer.add_add_bos_token(False)
    if end_of_document is not None:
        writer.add_bos_token_id(end_of_document)
        writer.add_eos_token_id(end_of_document)
        writer.add_pad_token_id(end_of_document)


def _as_theirs(name: str, value: np.ndarray, *, per_head: bool) -> np.ndarray:
    """A tensor of the hf layout with the values and the shape of the GGUF file.

    Args:
        name: in the hf layout.
        value: of the tensor.
        per_head: whether A and D have a number for each head, as in Mamba-2.
    """
    if name.endswith(".conv1d.weight"):
        return value[:, 0]
    if name.endswith(".A_log"):
        value = -np.exp(value)
    if per_head and name.endswith((".A_log", ".D")):
        return value[:, None]
    # Groups by channels of a group.
    return value[None] if name.endswith(".mixer.norm.weight") else value
