"""The command lines that read documents, whose flags are the fields of every source of documents."""

import dataclasses
import re
import typing
from collections.abc import Iterator
from typing import Annotated, Any

import tyro

from mamba_jax.config_base import require
from mamba_jax.data.config import SOURCES, Source, TokenizerConfig
from mamba_jax.data.shard_writer import SHARD_TOKENS
from mamba_jax.data.tokenization.config import tokenizer_kind
from mamba_jax.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceArguments:
    """A command that reads documents; the flags of the sources are added by `arguments_class`."""

    def source(self) -> Source:
        """The config of the source that the flags describe.

        Raises:
            InputError: the flags name no source or several, a flag is missing, or one belongs to another source.
        """
        sources = list(_sources())
        named = [cls for cls in sources if getattr(self, _flags(cls)[_leading(cls)]) is not None]
        if len(named) != 1:
            *usages, last = map(_usage, sources)
            raise InputError(f"give exactly one of {', '.join(usages)} and {last}")
        (cls,) = named
        own = _flags(cls)
        given = {field: value for field, flag in own.items() if _is_given(value := getattr(self, flag))}
        foreign = {flag for other in sources for flag in _flags(other).values()} - set(own.values())
        if wrong := sorted(flag for flag in foreign if _is_given(getattr(self, flag))):
            raise InputError(f"{_written(wrong)} cannot be given with {_usage(cls)}: leave {_them(wrong)} out")
        missing = [own[field.name] for field in _fields(cls) if _is_required(field) and field.name not in given]
        if missing:
            raise InputError(f"{_usage(cls)} needs {_written(missing)}: --help explains {_them(missing)}")
        return cls(**given)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrepareArguments(SourceArguments):
    """Writes token shards from files (--files), a folder of text (--text) or a TensorFlow Datasets set (--tfds).

    A command that was killed goes on behind the last shard that it finished when it is given again. Flags of the
    sources follow.

    Attributes:
        output: the new folder; nothing is ever overwritten.
        tokenizer: `tokenizers` JSON file, SentencePiece .model or .tiktoken vocabulary; bytes without it.
        end_of_document: token of that file that separates documents.
        encoding: of a .tiktoken vocabulary, its encoding, such as cl100k_base, or its regular expression.
        chat_template: jinja2 file that writes messages, in place of the one beside the tokenizer.
        shard_tokens: token ids in a shard file.
        workers: processes that tokenise; all cores without it. The result does not depend on it.
    """

    output: str
    tokenizer: str | None = None
    end_of_document: str = TokenizerConfig.end_of_document
    encoding: str | None = None
    chat_template: str | None = None
    shard_tokens: int = SHARD_TOKENS
    workers: int | None = None

    def __post_init__(self) -> None:
        require(self.workers is None or self.workers > 0, f"--workers must be positive, got {self.workers}")

    @property
    def tokenizer_config(self) -> TokenizerConfig:
        """The config of the tokenizer that the flags describe."""
        return TokenizerConfig(
            kind=tokenizer_kind(self.tokenizer),
            path=self.tokenizer,
            end_of_document=self.end_of_document,
            encoding=self.encoding,
            chat_template=self.chat_template,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainTokenizerArguments(SourceArguments):
    """Trains a byte-level BPE on files (--files), a folder of text (--text) or a TensorFlow Datasets set (--tfds).

    It writes a JSON file of the `tokenizers` library, for `--tokenizer` of the prepare command and
    `--data.tokenizer.path` of a run. Flags of the sources follow.

    Attributes:
        output: the new JSON file; nothing is ever overwritten.
        vocab_size: tokens to learn, with the 256 bytes and the end of a document.
        end_of_document: token that separates documents.
        max_bytes: text to learn from, in bytes from the start; all without it.
    """

    output: str
    vocab_size: int = 32768
    end_of_document: str = TokenizerConfig.end_of_document
    max_bytes: int | None = None

    def __post_init__(self) -> None:
        require(self.max_bytes is None or self.max_bytes > 0, f"--max-bytes must be positive, got {self.max_bytes}")
        require(self.end_of_document != "", "--end-of-document must not be empty: name a token, such as <|endoftext|>")


def arguments_class[T: SourceArguments](base: type[T]) -> type[T]:
    """A command's arguments with a flag for every field of the sources; a flag that is not given is None."""
    flags: dict[str, tuple[str, Any, Any]] = {}
    for cls in _sources():
        hints = typing.get_type_hints(cls)
        for field in _fields(cls):
            flag = _flags(cls)[field.name]
            explained = tyro.conf.arg(help=_explanation(cls, field))
            # A flag without a value is given or not; there is no flag for its opposite.
            is_switch = hints[field.name] is bool
            kind = tyro.conf.FlagCreatePairsOff[bool] if is_switch else hints[field.name] | None
            flags[flag] = (flag, Annotated[kind, explained], dataclasses.field(default=False if is_switch else None))
    made = dataclasses.make_dataclass(base.__name__, flags.values(), bases=(base,), frozen=True, kw_only=True)
    made.__doc__ = base.__doc__
    return typing.cast(type[T], made)


def _sources() -> Iterator[type[Source]]:
    return (cls for cls in SOURCES if cls.prepare_flag is not None)


def _fields(cls: type[Source]) -> list[dataclasses.Field[Any]]:
    return [field for field in dataclasses.fields(cls) if field.name != "kind"]


def _leading(cls: type[Source]) -> str:
    assert cls.prepare_flag is not None
    return cls.prepare_flag[0]


def _flags(cls: type[Source]) -> dict[str, str]:
    """Name of the flag for each field: that of the field, but for the leading one, whose flag names the kind of source.

    For example the field `path` of a text folder is the flag --text.
    """
    assert cls.prepare_flag is not None
    return {field.name: field.name for field in _fields(cls)} | dict([cls.prepare_flag])


def _is_given(value: object) -> bool:
    return value is not None and value is not False


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _explanation(cls: type[Source], field: dataclasses.Field[Any]) -> str:
    """Help text of a flag: what the docstring of the source says about the field, and the default."""
    documents = "\n".join(base.__doc__ or "" for base in cls.__mro__ if issubclass(base, Source))
    found = re.search(rf"^ +{field.name}: (.+?)(?=^ +\w+: |\Z|^\s*$)", documents, re.MULTILINE | re.DOTALL)
    text = " ".join(found[1].split()).rstrip(".") if found else field.name
    if _is_required(field):
        return text
    return f"{text} (default: {field.default})"


def _usage(cls: type[Source]) -> str:
    field, flag = _leading(cls), _flags(cls)[_leading(cls)]
    return f"--{flag} {'FOLDER' if flag == 'text' else field.upper()}"


def _written(flags: list[str]) -> str:
    return " and ".join(f"--{flag.replace('_', '-')}" for flag in flags)


def _them(flags: list[str]) -> str:
    return "it" if len(flags) == 1 else "them"
