"""Reads a SentencePiece model, and says the same as a file of the `tokenizers` library."""

import base64
import functools
import re
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message, message_factory
from tokenizers import normalizers

from mamba_jax.data.tokenization.description import bpe, description, split_at
from mamba_jax.data.tokenization.merges import merges_of
from mamba_jax.errors import InputError, brief

# Numbers of SentencePiece's own format, `sentencepiece_model.proto`.
_UNIGRAM, _BPE = 1, 2
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
_SPACE = "▁"
# What SentencePiece counts a user-defined symbol in a path of a Unigram, whatever its file says: pieces that make it
# together add up to less.
_SYMBOL_SCORE = -0.1
# The spaces in front of a text, as a regular expression of the library; text in the midst of a document keeps them.
LEADING_SPACES = r"\A +"

_Field = descriptor_pb2.FieldDescriptorProto
# Of each message the fields that decide ids: name, number, type, default or, of a message, its name.
_MESSAGES: dict[str, list[tuple[str, int, int, str]]] = {
    "Piece": [
        ("piece", 1, _Field.TYPE_STRING, ""),
        ("score", 2, _Field.TYPE_FLOAT, ""),
        ("type", 3, _Field.TYPE_INT32, "1"),
    ],
    "Trainer": [
        ("model_type", 3, _Field.TYPE_INT32, "1"),
        ("whitespace_as_suffix", 24, _Field.TYPE_BOOL, "false"),
        ("byte_fallback", 35, _Field.TYPE_BOOL, "false"),
    ],
    "Normalizer": [
        ("charsmap", 2, _Field.TYPE_BYTES, ""),
        ("add_dummy_prefix", 3, _Field.TYPE_BOOL, "true"),
        ("remove_extra_whitespaces", 4, _Field.TYPE_BOOL, "true"),
        ("escape_whitespaces", 5, _Field.TYPE_BOOL, "true"),
    ],
    "Model": [
        ("pieces", 1, _Field.TYPE_MESSAGE, "Piece"),
        ("trainer", 2, _Field.TYPE_MESSAGE, "Trainer"),
        ("normalizer", 3, _Field.TYPE_MESSAGE, "Normalizer"),
    ],
}


@functools.cache
def _message_class() -> Any:
    """The class of a model, without the fields that this library has no use for."""
    package = "mamba_jax_sentencepiece"
    file = descriptor_pb2.FileDescriptorProto(name=f"{package}.proto", package=package, syntax="proto2")
    for name, fields in _MESSAGES.items():
        declared = file.message_type.add(name=name)
        for field, number, kind, default in fields:
            is_message = kind == _Field.TYPE_MESSAGE
            label = _Field.LABEL_REPEATED if field == "pieces" else _Field.LABEL_OPTIONAL
            declared.field.add(name=field, number=number, label=label, type=kind)
            if is_message:
                declared.field[-1].type_name = f".{package}.{default}"
            elif default:
                declared.field[-1].default_value = default
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{package}.Model"))


def sentencepiece_description(data: bytes, path: str) -> dict[str, Any]:
    """The content of a `tokenizer.json` with the same ids as a SentencePiece model.

    Pieces keep their numbers. The text is not split before it is encoded, as SentencePiece does not: a Unigram is the
    best path through all of it, and a BPE joins the pair with the highest score anywhere in it.

    Args:
        data: the bytes of the model.
        path: the file, for messages.

    Raises:
        InputError: it is no such model, or one whose ids the library cannot give: of words or characters, with the
            space behind words, or with unused pieces.

    Source: SentencePiece 0.2, `sentencepiece_model.proto`, `normalizer.cc`, `unigram_model.cc`, `bpe_model.cc`.
    """
    try:
        model = _message_class().FromString(data)
    except message.DecodeError as error:
        raise InputError(f"{path!r} is no SentencePiece model: {brief(error)}") from None
    pieces = list(model.pieces)
    unknown = [number for number, piece in enumerate(pieces) if piece.type == _UNKNOWN]
    if any(isinstance(piece.piece, bytes) for piece in pieces):
        raise InputError(f"{path!r} is no SentencePiece model: a piece is not UTF-8 text")
    if not pieces or len(unknown) != 1:
        raise InputError(
            f"{path!r} is no SentencePiece model: it has {len(pieces)} pieces, {len(unknown)} of them for unknown text"
        )
    if model.trainer.model_type not in (_UNIGRAM, _BPE):
        raise InputError(f"{path!r} is a SentencePiece model of words or characters; only unigram and bpe are read")
    if model.trainer.whitespace_as_suffix:
        raise InputError(f"{path!r} has treat_whitespace_as_suffix, which is not read: train it without")
    if any(piece.type == _UNUSED for piece in pieces):
        raise InputError(f"{path!r} has unused pieces (a restricted vocabulary), which are not read: save it without")
    symbols = [piece.piece for piece in pieces if piece.type == _USER_DEFINED]
    _check_symbols(symbols, model.normalizer, path)
    is_unigram = model.trainer.model_type == _UNIGRAM
    return description(
        special={piece.piece: number for number, piece in enumerate(pieces) if piece.type in (_UNKNOWN, _CONTROL)},
        normalizer=_normalizer(model.normalizer),
        pre_tokenizer=None if is_unigram else _split(symbols),
        decoder=_decoder(model.normalizer),
        model=(_unigram if is_unigram else _bpe)(pieces, unknown[0], model.trainer.byte_fallback),
    )


def spelled_words(description: dict[str, Any]) -> tuple[str, ...]:
    """The pieces that the library finds spelt out in a text, and SentencePiece does not: <unk>, <0x0A>."""
    model = description["model"]
    if model["type"] == "BPE" and not model["ignore_merges"]:
        return ()
    unknown = model["unk_token"] if model["type"] == "BPE" else model["vocab"][model["unk_id"]][0]
    return (unknown, *(f"<0x{byte:02X}>" for byte in range(256) if model["byte_fallback"]))


def _split(symbols: list[str]) -> dict[str, Any] | None:
    """Sets user-defined symbols of a BPE apart from all around them, the longest where several begin."""
    if not symbols:
        return None
    longest_first = sorted(symbols, key=lambda symbol: -len(symbol))
    return split_at("|".join(map(re.escape, longest_first)))


def _check_symbols(symbols: list[str], spec: Any, path: str) -> None:
    """Refuses user-defined symbols that the normalizer changes: SentencePiece finds them in the text before it acts."""
    # A map that is cut short is refused later on; to open it here would take as much memory as it claims.
    is_whole = bool(spec.charsmap) and 4 + int.from_bytes(spec.charsmap[:4], "little") <= len(spec.charsmap)
    normalizer = normalizers.Precompiled(spec.charsmap) if symbols and is_whole else None
    for symbol in symbols:
        if (normalizer is not None and normalizer.normalize_str(symbol) != symbol) or " " in symbol:
            raise InputError(f"{path!r}: its normalizer changes the user-defined symbol {symbol!r}, which is not read")


def _normalizer(spec: Any) -> dict[str, Any]:
    """The steps of SentencePiece's normalizer, in order; spaces are U+0020 alone."""
    steps: list[dict[str, Any]] = []
    if spec.charsmap:
        steps.append({"type": "Precompiled", "precompiled_charsmap": base64.b64encode(spec.charsmap).decode()})
    if spec.remove_extra_whitespaces:
        trailing = rf"[ {_SPACE}]+\z" if spec.escape_whitespaces else r" +\z"
        steps += [_replace({"Regex": pattern}, "") for pattern in (LEADING_SPACES, trailing, r" +(?= )")]
    if spec.add_dummy_prefix:
        steps.append({"type": "Prepend", "prepend": _SPACE if spec.escape_whitespaces else " "})
    if spec.escape_whitespaces:
        steps.append(_replace({"String": " "}, _SPACE))
    return {"type": "Sequence", "normalizers": steps}


def _decoder(spec: Any) -> dict[str, Any]:
    steps = [_replace({"String": _SPACE}, " "), {"type": "ByteFallback"}, {"type": "Fuse"}]
    if spec.add_dummy_prefix:
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {"type": "Sequence", "decoders": steps}


def _replace(pattern: dict[str, str], content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


def _unigram(pieces: list[Any], unknown: int, byte_fallback: bool) -> dict[str, Any]:
    """A Unigram, whose best path has user-defined symbols wherever it can."""
    scores = [_SYMBOL_SCORE if piece.type == _USER_DEFINED else piece.score for piece in pieces]
    return {
        "type": "Unigram",
        "unk_id": unknown,
        "vocab": [[piece.piece, score] for piece, score in zip(pieces, scores, strict=True)],
        "byte_fallback": byte_fallback,
    }


def _bpe(pieces: list[Any], unknown: int, byte_fallback: bool) -> dict[str, Any]:
    """A BPE whose merges are all pairs that make a normal piece, those of the highest scores first."""
    made = {piece.piece: number for number, piece in enumerate(pieces) if piece.type == _NORMAL}
    by_score = sorted(made, key=lambda piece: -pieces[made[piece]].score)
    return bpe(
        {piece.piece: number for number, piece in enumerate(pieces)},
        merges_of(by_score, made),
        unknown=pieces[unknown].piece,
        byte_fallback=byte_fallback,
        # A symbol stands alone and nothing makes it.
        ignore_merges=any(piece.type == _USER_DEFINED for piece in pieces),
    )
