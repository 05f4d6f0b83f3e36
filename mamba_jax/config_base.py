"""What every configuration dataclass shares: checks on construction, and a strict JSON round trip."""

import dataclasses
import difflib
import functools
import typing
from collections.abc import Iterator
from typing import Any, ClassVar

import pydantic
from pydantic_core import CoreSchema, core_schema

from mamba_jax.errors import InputError

# Smaller numbers are 0 where they are computed with, and larger ones infinite.
_FLOAT32_TINY, _FLOAT32_MAX = 2.0**-126, (2 - 2.0**-23) * 2.0**127


def require(condition: bool, message: str) -> None:
    """Raises an `InputError` with the message unless the condition holds."""
    if not condition:
        raise InputError(message)


@functools.cache
def _field_types(cls: Any) -> type[pydantic.BaseModel]:
    """A model with the fields of a config class; it takes no text for a number, and no infinity."""
    hints = typing.get_type_hints(cls, include_extras=True)
    fields: dict[str, Any] = {field.name: (hints[field.name], ...) for field in dataclasses.fields(cls)}
    rules = pydantic.ConfigDict(strict=True, allow_inf_nan=False)
    return pydantic.create_model(cls.__name__, __config__=rules, **fields)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What every config class shares: checks of its fields, and that unknown JSON keys are refused."""

    __pydantic_config__: ClassVar[pydantic.ConfigDict] = pydantic.ConfigDict(extra="forbid")

    def __post_init__(self) -> None:
        try:
            checked = _field_types(type(self)).model_validate(vars(self))
        except pydantic.ValidationError as error:
            problems = (f"{type(self).__name__}.{_describe(detail)}" for detail in error.errors())
            raise InputError("; ".join(problems)) from None
        for name, value in checked:
            object.__setattr__(self, name, value)  # a scalar of numpy is a plain number from here on
        self._check()
        for name, value in vars(self).items():
            require(
                not isinstance(value, int) or abs(value) < 2**32,
                f"{type(self).__name__}.{name} must stay below 2**32, got more",
            )
            require(
                not isinstance(value, float) or value == 0 or _FLOAT32_TINY <= abs(value) <= _FLOAT32_MAX,
                f"{type(self).__name__}.{name} = {value} is beyond float32, which holds 0 and {_FLOAT32_TINY:.3g} to "
                f"{_FLOAT32_MAX:.3g}",
            )

    def _check(self) -> None:
        """Refuses values that no run can have; types are right by then, and numbers finite."""

    def _require_positive(self, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            require(value is None or value > 0, f"{type(self).__name__}.{name} must be positive, got {value}")

    def _require_fraction(self, *names: str, below_one: bool = False) -> None:
        for name in names:
            value, end = getattr(self, name), ")" if below_one else "]"
            # From there on float32 has only 1.
            fits = value is None or 0 <= value <= (1 - 2.0**-25 if below_one else 1)
            require(fits, f"{type(self).__name__}.{name} must lie in [0, 1{end}, got {value}")


class Kinds:
    """The config classes that a field may hold, told apart by their `kind`: `Annotated[Base, KINDS]`.

    A class that is registered later is known to every field of this kind from then on.

    Example:
        SOURCES = Kinds(ShardSource, TextFolderSource)

        class DataConfig(Config):
            train: Annotated[Source, SOURCES]

    Args:
        *choices: config classes with a default `kind`, and other `Kinds`, all of whose classes may stand there too.
    """

    def __init__(self, *choices: "type[Config] | Kinds") -> None:
        self._choices = list(choices)

    def register[T: Config](self, cls: type[T]) -> type[T]:
        """Adds a class, and returns it, so that this may stand above the class as a decorator.

        Raises:
            InputError: there is another class of this kind.
        """
        if self.get(kind := _kind(cls), cls) is not cls:
            raise InputError(f"there is a config of kind {kind!r} already, {self.get(kind)}: give {cls} another kind")
        if cls not in self:
            self._choices.append(cls)
            _field_types.cache_clear()
        return cls

    def get(self, kind: str, default: Any = None) -> Any:
        """The class of a kind."""
        return next((cls for cls in self if _kind(cls) == kind), default)

    def __iter__(self) -> Iterator[Any]:
        for choice in self._choices:
            yield from choice if isinstance(choice, Kinds) else (choice,)

    def __get_pydantic_core_schema__(self, source: Any, handler: pydantic.GetCoreSchemaHandler) -> CoreSchema:
        choices = {_kind(cls): handler.generate_schema(cls) for cls in self}
        schema: CoreSchema = core_schema.tagged_union_schema(choices, discriminator="kind")
        return core_schema.nullable_schema(schema) if type(None) in typing.get_args(source) else schema


def _kind(cls: type[Config]) -> str:
    return str(cls.__dataclass_fields__["kind"].default)


def to_json(config: Config, *, indent: int | None = 2) -> str:
    """The config as JSON text that `from_json` reads back to an equal value."""
    return pydantic.TypeAdapter(type(config)).dump_json(config, indent=indent).decode()


def from_json[T: Config](cls: type[T], text: str, *, origin: str) -> T:
    """Reads a config strictly.

    Args:
        cls: class of the result.
        text: JSON.
        origin: file name for error messages.

    Returns:
        The validated config.

    Raises:
        InputError: one line that lists every unknown key (with the closest known one), missing key and bad value.
    """
    try:
        return pydantic.TypeAdapter(cls).validate_json(text, strict=True)
    except pydantic.ValidationError as error:
        problems = "; ".join(_describe(detail) for detail in error.errors())
        raise InputError(f"{origin}: {problems}") from None


def nested_fields(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """The fields of a tree of dictionaries, as `dataclasses.asdict` makes of a config, by their dotted names.

    Those of dictionaries in a sequence are numbered: "mixer.units.0.repeats".

    Args:
        value: the tree.
        name: what stands before the names.
    """
    if isinstance(value, dict):
        parts = value.items()
    elif isinstance(value, tuple | list) and any(isinstance(part, dict | tuple | list) for part in value):
        parts = enumerate(value)
    else:
        yield name, value
        return
    for own, part in parts:
        yield from nested_fields(part, f"{name}.{own}" if name else str(own))


def _describe(detail: Any) -> str:
    """Turns one error of pydantic's `errors()` into a short text; for an unknown key it suggests a similar one."""
    path = ".".join(str(part) for part in detail["loc"] if part != "")
    if detail["type"] == "unexpected_keyword_argument":
        close = difflib.get_close_matches(str(detail["loc"][-1]), _field_names(), n=1)
        return f"unknown key {path!r}" + (f", did you mean {close[0]!r}?" if close else "")
    if detail["type"] == "missing":
        return f"missing key {path!r}"
    if detail["type"] == "value_error":
        return str(detail["ctx"]["error"])
    value = (
        f", got {detail['input']!r}" if isinstance(detail["input"], str | int | float | list | None) and path else ""
    )
    return f"{path}: {detail['msg']}{value}" if path else detail["msg"]


def _field_names() -> list[str]:
    """Names of all fields of all config classes; a suggestion need not know where in the tree a key belongs."""
    return sorted({field.name for config in _subclasses(Config) for field in dataclasses.fields(config)})


def _subclasses(cls: type) -> Iterator[type]:
    for subclass in cls.__subclasses__():
        yield subclass
        yield from _subclasses(subclass)
