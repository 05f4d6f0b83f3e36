"""Chat templates: jinja2 texts that say how the messages of a dialogue are written for a model."""

import dataclasses
import functools
import hashlib
import importlib
import json
import re
import uuid
from collections.abc import Mapping, Sequence
from os.path import lexists
from pathlib import Path
from typing import Any

from mamba_jax.errors import InputError, brief

_ASSISTANT = "assistant"
# Its file beside a tokenizer.
CHAT_TEMPLATE = "chat_template.jinja"
# What stands around a text that the model is to generate. No message can hold it: it is drawn anew in every process.
_NONCE = uuid.uuid4().hex
_BEGIN, _END = f"\ue000begin {_NONCE}\ue001", f"\ue000end {_NONCE}\ue001"


class Unrendered(ValueError):
    """Messages cannot be written with the template; the message says why, in words that follow their place."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Span:
    """A part of a text.

    Attributes:
        text: the part.
        counts: whether the model is to learn to write it.
    """

    text: str
    counts: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatTemplate:
    """A chat template, with the special tokens that it names.

    Attributes:
        text: the template.
        special_tokens: tokens by their names in the template, such as `bos_token`.
        origin: where it is from, for messages.
    """

    text: str
    special_tokens: Mapping[str, str]
    origin: str

    @property
    def fingerprint(self) -> str:
        """Sha256 of the template and its tokens; equal ones write equal texts."""
        return hashlib.sha256(json.dumps([self.text, self.special_tokens], sort_keys=True).encode()).hexdigest()

    def spans(self, messages: Sequence[Mapping[str, Any]]) -> list[Span]:
        """Writes a dialogue; what the assistant says counts.

        If the template marks that by `{% generation %}`, it says where it is. Otherwise the text of an assistant's
        message is what writing the dialogue up to it adds to the dialogue before it with the prompt to answer.

        Args:
            messages: each with `role` and `content`.

        Raises:
            Unrendered: the template refuses the messages, leaves one out, or does not write the start of a dialogue as
                the start of its text.
            InputError: the template is no jinja2 template, or jinja2 is not installed.
        """
        written = self._render(messages)
        if _BEGIN in written:
            parts = re.split(f"({_BEGIN}|{_END})", written)
            spans = [
                Span(text=text, counts=before == _BEGIN)
                for before, text in zip(["", *parts[1::2]], parts[::2], strict=True)
                if text
            ]
        else:
            spans = self._by_prefixes(messages, written)
        self._check_complete(messages, spans)
        return spans

    def _by_prefixes(self, messages: Sequence[Mapping[str, Any]], written: str) -> list[Span]:
        """The spans of a dialogue whose template does not mark what is generated."""
        spans, position = [], 0
        for index, message in enumerate(messages):
            if message["role"] != _ASSISTANT:
                continue
            before = self._render(messages[:index], add_generation_prompt=True)
            after = self._render(messages[: index + 1])
            if not (after.startswith(before) and written.startswith(after) and len(before) >= position):
                raise Unrendered(
                    f"cannot be cut into turns: {self.origin} does not begin the whole dialogue as it writes "
                    f"the one up to message {index + 1}; mark the assistant's text in it by {{% generation %}}"
                )
            spans += [
                Span(text=written[position : len(before)], counts=False),
                Span(text=after[len(before) :], counts=True),
            ]
            position = len(after)
        return [span for span in (*spans, Span(text=written[position:], counts=False)) if span.text]

    def _check_complete(self, messages: Sequence[Mapping[str, Any]], spans: Sequence[Span]) -> None:
        """Raises `Unrendered` if the template has left a message out."""
        written = "".join(span.text for span in spans)
        for index, message in enumerate(messages, start=1):
            if message["role"] != _ASSISTANT and message["content"].strip() not in written:
                raise Unrendered(f"has message {index} of the role {message['role']!r}, which {self.origin} leaves out")
        if not any(span.counts for span in spans):
            raise Unrendered(f"has nothing to learn: {self.origin} leaves out what the assistant says")

    def _render(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = False) -> str:
        """What the template writes; with marks around what is generated if it has them."""
        template = _compiled(self.text, self.origin)
        try:
            return template.render(
                messages=list(messages),
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self.special_tokens,
            )
        # A template can do anything that an expression can: take what is missing, divide by zero.
        except Exception as error:
            raise Unrendered(f"is refused by {self.origin}: {brief(error)}") from None


@functools.lru_cache(maxsize=4)
def _compiled(text: str, origin: str) -> Any:
    """The template of jinja2, in a sandbox and with what templates of `transformers` may use."""
    try:
        names = ("jinja2", "jinja2.sandbox", "jinja2.ext")
        jinja2, sandbox, extensions = (importlib.import_module(name) for name in names)
    except ImportError:
        raise InputError(
            "chat templates need the package `jinja2`, which is not installed: pip install 'mamba-jax[chat]'"
        ) from None

    base: Any = extensions.Extension

    class Generation(base):
        """The block `{% generation %} ... {% endgeneration %}`, whose text the model generates."""

        tags = frozenset({"generation"})

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            call = self.call_method("_marked")
            return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

        def _marked(self, caller: Any) -> str:
            return f"{_BEGIN}{caller()}{_END}"

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    environment.globals["raise_exception"] = refuse
    try:
        return environment.from_string(text)
    except jinja2.TemplateError as error:
        raise InputError(f"{origin} is no jinja2 template: {brief(error)}") from None


def find_template(tokenizer: str | None, chosen: str | None, *, end_of_document: str) -> ChatTemplate | None:
    """The chat template of a tokenizer.

    Args:
        tokenizer: path of the tokenizer's file, beside which a model's folder has `chat_template.jinja`, or
            `tokenizer_config.json` with a field `chat_template`; None has nothing beside it.
        chosen: path of the template in place of that.
        end_of_document: the `eos_token` of templates whose folder names none.

    Raises:
        InputError: a file cannot be read, or holds no template.
    """
    folder = None if tokenizer is None else Path(tokenizer).parent
    settings: dict[str, Any] = {}
    if folder is not None and lexists(path := folder / "tokenizer_config.json"):
        settings = _settings(path)
    named = {name: value for name, value in settings.items() if name.endswith("_token")}
    texts = {name: value.get("content") if isinstance(value, dict) else value for name, value in named.items()}
    tokens = {"eos_token": end_of_document} | {name: text for name, text in texts.items() if isinstance(text, str)}
    if chosen is not None:
        found = Path(chosen)
    elif folder is not None and lexists(beside := folder / CHAT_TEMPLATE):
        found = beside
    elif (text := settings.get("chat_template")) is not None and folder is not None:
        if isinstance(text, list):
            text = next((each.get("template") for each in text if each.get("name") == "default"), None)
        origin = f"the chat_template of {folder / 'tokenizer_config.json'}"
        if not isinstance(text, str):
            raise InputError(f"{origin} is no text: name a file by tokenizer.chat_template")
        return ChatTemplate(text=text, special_tokens=tokens, origin=origin)
    else:
        return None
    return ChatTemplate(text=_read(found), special_tokens=tokens, origin=f"the chat template {found}")


def _settings(path: Path) -> dict[str, Any]:
    try:
        settings = json.loads(_read(path))
    except (ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} is not JSON: {brief(error)}") from None
    return settings if isinstance(settings, dict) else {}


def _read(path: Path) -> str:
    """The text of a file; an InputError if it is missing or none."""
    try:
        if not path.is_file():
            raise InputError(f"there is no file {path}: name a chat template by tokenizer.chat_template")
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from None
