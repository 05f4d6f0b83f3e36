"""The command line of `mamba_jax.data.prepare`, whose flags are the fields of every source of documents."""

import dataclasses
import re
import typing
from collections.abc import Iterator
from typing import Annotated, Any

import tyro

from mamba_jax.data.config import SOURCES, Source, TokenizerConfig
from mamba_jax.data.shard_writer import SHARD_TOKENS
from mamba_jax.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrepareArguments:
    """Writes token shards from a folder of text files (--text) or a TensorFlow Datasets set (--tfds).

    Flags of the sources follow; see `arguments_class`.

    Attributes:
        output: the new folder; nothing is ever overwritten.
        tokenizer: `tokenizers` JSON file; bytes without it.
        end_of_document: token of that file that separates documents.
        shard_tokens: token ids in a shard file.
    """

    output: str
    tokenizer: str | None = None
    end_of_document: str = TokenizerConfig.end_of_document
    shard_tokens: int = SHARD_TOKENS

    @property
    def tokenizer_config(self) -> TokenizerConfig:
        """The config of the tokenizer that the flags describe."""
        kind = "byte" if self.tokenizer is None else "hf_json"
        return TokenizerConfig(kind=kind, path=self.tokenizer, end_of_document=self.end_of_document)

    def source(self) -> Source:
        """The config of the source that the flags describe.

        Raises:
            InputError: the flags name no source or several, a flag is missing, or one belongs to another source.
        """
        sources = list(_sources())
        named = [cls for cls in sources if getattr(self, _flags(cls)[_leading(cls)]) is not None]
        if len(named) != 1:
            raise InputError(f"give exactly one of {' and '.join(_usage(cls) for cls in sources)}")
        (cls,) = named
        own = _flags(cls)
        given = {field: value for field, flag in own.items() if (value := getattr(self, flag)) is not None}
        foreign = {flag for other in sources for flag in _flags(other).values()} - set(own.values())
        if wrong := sorted(flag for flag in foreign if getattr(self, flag) is not None):
            raise InputError(f"{_written(wrong)} cannot be given with {_usage(cls)}: leave {_them(wrong)} out")
        missing = [own[field.name] for field in _fields(cls) if _is_required(field) and field.name not in given]
        if missing:
            raise InputError(f"{_usage(cls)} needs {_written(missing)}: --help explains {_them(missing)}")
        return cls(**given)


def arguments_class() -> type[PrepareArguments]:
    """`PrepareArguments` with a flag for every field of the sources; a flag that is not given is None."""
    flags: dict[str, tuple[str, Any, Any]] = {}
    for cls in _sources():
        hints = typing.get_type_hints(cls)
        for field in _fields(cls):
            flag = _flags(cls)[field.name]
            explained = tyro.conf.arg(help=_explanation(cls, field))
            flags[flag] = (flag, Annotated[hints[field.name] | None, explained], dataclasses.field(default=None))
    made = dataclasses.make_dataclass(
        PrepareArguments.__name__, flags.values(), bases=(PrepareArguments,), frozen=True, kw_only=True
    )
    made.__doc__ = PrepareArguments.__doc__
    return typing.cast(type[PrepareArguments], made)


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


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _explanation(cls: type[Source], field: dataclasses.Field[Any]) -> str:
    """Help text of a flag: what the docstring of the source says about the field, and the default."""
    found = re.search(rf"^ +{field.name}: (.+?)(?=^ +\w+: |\Z|^\s*$)", cls.__doc__ or "", re.MULTILINE | re.DOTALL)
    text = " ".join(found[1].split()).rstrip(".") if found else field.name
    if _is_required(field):
        return text
    return f"{text} (default: {field.default})"


def _usage(cls: type[Source]) -> str:
    field, flag = _leading(cls), _flags(cls)[_leading(cls)]
    return f"--{flag} {'FOLDER' if field == 'path' else field.upper()}"


def _written(flags: list[str]) -> str:
    return " and ".join(f"--{flag.replace('_', '-')}" for flag in flags)


def _them(flags: list[str]) -> str:
    return "it" if len(flags) == 1 else "them"
