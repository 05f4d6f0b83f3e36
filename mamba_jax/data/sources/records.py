"""The text of a record: one of its fields, or a template with several."""

import re
import string
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mamba_jax.data.sources.text_pieces import utf8_length
from mamba_jax.errors import InputError, short

_ESCAPES = {r"\n": "\n", r"\t": "\t", r"\\": "\\"}


class BadRecord(ValueError):
    """A record has no text; the message says why, without its place."""


class RecordText:
    r"""Makes the text of a record.

    Args:
        field: the field that is the text.
        template: text with fields in braces, such as "{title}\n\n{body}", in place of `field`; `\n`, `\t` and `\\` may
            be spelt out, and `{{` and `}}` are braces. None takes `field`.

    Raises:
        InputError: the template has no field, an open brace, or more than names within braces.
    """

    def __init__(self, field: str, template: str | None) -> None:
        self._parts = [("", field)] if template is None else _parts(template)
        self._is_template = template is not None
        self._fields = list(dict.fromkeys(name for _, name in self._parts if name is not None))

    def fields(self, names: Sequence[str]) -> list[str]:
        """The columns to read of a table with these; raises a BadRecord if one is missing."""
        if missing := [field for field in self._fields if field not in names]:
            raise BadRecord(
                f"has no column {missing[0]!r}: set text_field or template to those it has, {', '.join(names[:12])}"
            )
        return self._fields

    def __call__(self, record: Mapping[str, Any]) -> str:
        """The text.

        Raises:
            BadRecord: a field is missing, null or no text, or text that is not valid Unicode; within a template numbers
                are text, too.
        """
        text = "".join(before + ("" if name is None else self._value(record, name)) for before, name in self._parts)
        try:
            utf8_length(text)
        except UnicodeEncodeError as error:
            raise BadRecord(f"holds a lone surrogate at character {error.start}: it is not valid Unicode") from None
        return text

    def _value(self, record: Mapping[str, Any], name: str) -> str:
        """The text of a field, or a BadRecord."""
        if name not in record:
            raise BadRecord(f"has no field {name!r}, but {', '.join(map(short, list(record)[:8])) or 'none at all'}")
        value = record[name]
        if isinstance(value, str):
            return value
        if self._is_template and isinstance(value, int | float) and not isinstance(value, bool):
            return str(value)
        held = "null" if value is None else f"no text but {type(value).__name__}"
        raise BadRecord(f"has {held} in its field {name!r}")


def _parts(template: str) -> list[tuple[str, str | None]]:
    """The text in front of each field of a template, and the field; None after the last text."""
    unescaped = re.sub(r"\\[nt\\]", lambda found: _ESCAPES[found[0]], template)
    try:
        parsed = list(string.Formatter().parse(unescaped))
    except ValueError as error:
        raise InputError(f"template {template!r} is no text with fields in braces: {error}") from None
    if any(spec or conversion or name == "" for _, name, spec, conversion in parsed):
        raise InputError(f"template {template!r} may have nothing but names of fields in its braces, as {{title}} has")
    if all(name is None for _, name, _, _ in parsed):
        raise InputError(f"template {template!r} names no field: write one in braces, such as {{text}}")
    return [(before, name) for before, name, _, _ in parsed]


# Is given what is wrong with a record, in words that begin with its place; raises an `InputError` or counts it.
OnBad = Callable[[str], None]
