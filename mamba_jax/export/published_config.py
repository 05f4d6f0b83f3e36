"""`config.json` of published checkpoints, to and from `ModelConfig`, in whichever format recognises it."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mamba_jax.config_base import from_json
from mamba_jax.errors import InputError, short
from mamba_jax.export.files import read_json
from mamba_jax.models import layouts
from mamba_jax.models.config import ModelConfig
from mamba_jax.models.mixers.declaration import MIXERS
from mamba_jax.models.published import Format, layer_of_original

_MESSAGE = 500
# Formats that are registered in addition to those of the mixers; docs/add_a_layout.md says how to add one.
FORMATS: list[Format] = []


@dataclasses.dataclass(frozen=True, kw_only=True)
class PublishedConfig:
    """A `config.json` that has been read.

    Attributes:
        format: the format that recognised it.
        config: config of the model that it describes.
        extra: its keys that do not describe the network, such as the ids of special tokens.
    """

    format: Format
    config: ModelConfig
    extra: dict[str, Any]


def formats() -> tuple[Format, ...]:
    """All formats that are known, in the order in which they are asked."""
    return (*layouts.FORMATS, *(found for mixer in MIXERS for found in mixer.formats()), *FORMATS)


def format_of(config: ModelConfig, layout: str) -> Format:
    """The format in which a model is written in a layout.

    Args:
        config: config of the model.
        layout: name of the layout, such as "hf".

    Raises:
        InputError: the model's mixers have no published tensor names, or none in this layout; for a hybrid, why none
            of the published families can express it.
    """
    known = [found for found in formats() if found.mixer == config.mixer.kind]
    here = [found for found in known if found.layout == layout]
    if len(here) == 1 and not here[0].family:
        return here[0]
    reasons = []
    for found in here:
        try:
            found.write_config(config)
        except InputError as error:
            reasons.append(f"{found.family}: {error}")
        else:
            return found
    if here:
        raise InputError(f"no family of the layout {layout!r} can express this model ({'; '.join(reasons)})")
    if known:
        names = sorted({repr(found.layout) for found in known})
        raise InputError(f"unknown layout {layout!r}: choose {' or '.join(names)}")
    kinds = ", ".join(sorted({stack.mixer.kind for stack in config.stacks}))
    raise InputError(f"models of the mixers {kinds} have no published names, so that none can be written")


def read(path: Path) -> PublishedConfig:
    """Reads `config.json`.

    Raises:
        InputError: no format recognises it, or it lacks a key, has an ill-typed one, or describes a model that is not
            supported; one short line, whatever the file holds.
    """
    content = read_json(path)
    found = next((found for found in formats() if found.recognises(content)), None)
    if found is None:
        raise InputError(f"{path}{_unknown(content)}")
    try:
        fields = found.read_config(content)
    except KeyError as error:
        raise InputError(f"{path} lacks the key {error}") from None
    except InputError as error:
        raise InputError(_shortened(f"{path}: {error}")) from None
    config = _validated(fields, path)
    try:
        found.check_config(content, config)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    if not found.keeps_extra:
        return PublishedConfig(format=found, config=config, extra={})
    own = {*found.write_config(config), "torch_dtype"}
    extra = {key: value for key, value in content.items() if key not in own}
    return PublishedConfig(format=found, config=config, extra=extra)


def _unknown(content: Mapping[str, Any]) -> str:
    """Why no format recognises the content of a file."""
    if "model_type" in content:
        return f": model_type={short(content['model_type'])} is not supported"
    if "d_model" in content:
        return f": ssm_cfg.layer={short(layer_of_original(content))} is not supported"
    return " has neither 'model_type' nor 'd_model': not a config of a Mamba checkpoint"


def _validated(fields: dict[str, Any], path: Path) -> ModelConfig:
    """The config made of fields from a published file, whose types are checked like those of our own JSON files."""
    try:
        return from_json(ModelConfig, json.dumps(fields), origin=str(path))
    except InputError as error:
        raise InputError(_shortened(str(error))) from None
    except RecursionError:
        raise InputError(f"{path}: a value is nested too deeply") from None


def _shortened(text: str) -> str:
    """A message that may quote a value of any length, such as a list, without the end of it."""
    return text if len(text) <= _MESSAGE else text[:_MESSAGE] + " ..."


def to_json(config: ModelConfig, *, layout: str, extra: Mapping[str, Any]) -> dict[str, Any]:
    """The content of `config.json` for a model.

    Args:
        config: config of the model.
        layout: name of the layout, which decides the keys.
        extra: further keys to write; formats without a place for them leave them out.

    Raises:
        InputError: the layout cannot express the model.
    """
    found = format_of(config, layout)
    content = found.write_config(config)
    return {**extra, **content} if found.keeps_extra else content
