"""Records of supervised fine-tuning: a prompt with its completion, or the messages of a chat."""

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mamba_jax.data.config import RecordSource
from mamba_jax.data.documents import Piece
from mamba_jax.data.sources.records import BadRecord, RecordText
from mamba_jax.data.sources.text_pieces import text_pieces, utf8_length
from mamba_jax.data.tokenization.chat import Span, Unrendered
from mamba_jax.data.tokenizer import Tokenizer
from mamba_jax.errors import InputError, short

_MESSAGES, _PROMPT, _COMPLETION = "messages", "prompt", "completion"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dialogue:
    """A document of which parts are learned.

    Attributes:
        spans: the parts, in order.
        has_markup: whether special tokens that it spells are those tokens.
    """

    spans: Sequence[Span]
    has_markup: bool

    def __str__(self) -> str:
        return "".join(span.text for span in self.spans)

    def pieces(self, *, amount: int) -> Iterator[Piece]:
        """A piece for each part; `amount` is `Piece.amount` of the first one."""
        for index, span in enumerate(self.spans):
            yield Piece(
                text=span.text,
                num_bytes=utf8_length(span.text),
                continues=index > 0,
                ends_document=index == len(self.spans) - 1,
                counts=span.counts,
                has_markup=self.has_markup,
                amount=0 if index else amount,
            )


class SupervisedRecord:
    """Makes the dialogue of a record.

    Attributes:
        tokenizer: its chat template writes messages, and no message may spell its special tokens.
    """

    tokenizer: Tokenizer | None = None

    @property
    def identity(self) -> str | None:
        """What the dialogues depend on besides the records: the chat template, if there is one."""
        template = None if self.tokenizer is None else self.tokenizer.chat_template
        return None if template is None else template.fingerprint

    def fields(self, names: Sequence[str]) -> list[str]:
        """The columns to read of a table with these; raises a BadRecord if it has not those of either kind."""
        return list(_fields(names))

    def __call__(self, record: Mapping[str, Any]) -> Dialogue:
        """The dialogue.

        Raises:
            BadRecord: a field is missing or empty, or the chat template refuses the messages.
            InputError: there are messages, and the tokenizer has no chat template.
        """
        if _MESSAGES in _fields(list(record)):
            return self._chat(record[_MESSAGES])
        prompt, completion = (_text(record, name) for name in (_PROMPT, _COMPLETION))
        if not completion.strip():
            raise BadRecord(f"has an empty completion, {completion!r}: there is nothing to learn")
        spans = [Span(text=prompt, counts=False), Span(text=completion, counts=True)]
        return Dialogue(spans=[span for span in spans if span.text], has_markup=False)

    def _chat(self, messages: Any) -> Dialogue:
        """The dialogue of messages, as the chat template writes it."""
        if not isinstance(messages, list) or not messages:
            raise BadRecord(f"has no list of messages in its field 'messages' but {short(messages)}")
        if self.tokenizer is None or self.tokenizer.chat_template is None:
            raise InputError(
                "messages are written by a chat template, and the tokenizer has none: put its tokenizer_config.json or "
                "chat_template.jinja beside it, or name a file by tokenizer.chat_template"
            )
        checked = [self._message(number, message) for number, message in enumerate(messages, start=1)]
        if not any(message["role"] == "assistant" for message in checked):
            raise BadRecord("has no message of the role 'assistant': there is nothing to learn")
        try:
            return Dialogue(spans=self.tokenizer.chat_template.spans(checked), has_markup=True)
        except Unrendered as error:
            raise BadRecord(str(error)) from None

    def _message(self, number: int, message: Any) -> dict[str, Any]:
        """A message without the fields that tables fill up with null; a BadRecord if it is none."""
        if not isinstance(message, Mapping):
            raise BadRecord(f"has a message {number} that is no object but {short(message)}")
        kept = {name: value for name, value in message.items() if value is not None}
        where = f"message {number}"
        role, content = (_text(kept, name, where=where) for name in ("role", "content"))
        if role == "assistant" and not content.strip():
            raise BadRecord(f"has an empty completion, {content!r}, in {where}: there is nothing to learn")
        assert self.tokenizer is not None
        if (found := _spelled(content, self.tokenizer.special_texts)) is not None:
            raise BadRecord(f"spells the special token {found!r} in {where}: remove it from the text")
        return kept


def record_reader(source: RecordSource) -> RecordText | SupervisedRecord:
    """What makes the documents of a source from its records."""
    return SupervisedRecord() if source.records == "supervised" else RecordText(source.text_field, source.template)


def document_pieces(document: str | Dialogue, *, amount: int) -> Iterator[Piece]:
    """The pieces of a document that is in memory whole; `amount` is `Piece.amount` of the first one."""
    return text_pieces(document, amount=amount) if isinstance(document, str) else document.pieces(amount=amount)


def _fields(names: Sequence[str]) -> tuple[str, ...]:
    """Those of either kind; a record with both is a chat."""
    if _MESSAGES in names:
        return (_MESSAGES,)
    if _PROMPT in names or _COMPLETION in names:
        return (_PROMPT, _COMPLETION)
    known = ", ".join(map(short, names[:8])) or "none at all"
    raise BadRecord(f"has neither the field 'messages' nor 'prompt' and 'completion', but {known}")


def _text(record: Mapping[str, Any], name: str, *, where: str = "") -> str:
    """The text of a field; a BadRecord, which says where, if it is missing or none."""
    value = record.get(name)
    if not isinstance(value, str):
        held = f"no field {name!r}" if value is None else f"no text but {type(value).__name__} in its field {name!r}"
        raise BadRecord(f"has {held}{where and f' in {where}'}")
    try:
        utf8_length(value)
    except UnicodeEncodeError as error:
        raise BadRecord(
            f"holds a lone surrogate at character {error.start} of {name!r}: it is not valid Unicode"
        ) from None
    return value


def _spelled(text: str, tokens: tuple[str, ...]) -> str | None:
    """The first of the tokens that stands in a text."""
    found = re.search("|".join(map(re.escape, tokens)), text) if tokens else None
    return None if found is None else found[0]
