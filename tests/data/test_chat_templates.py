"""Chats are written by the tokenizer's template, and of them what the assistant says counts."""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from mamba_jax.config import DataConfig, TokenizerConfig
from mamba_jax.data.pipeline import TrainBatches, open_data
from mamba_jax.data.shards import COUNTS, ENDS
from mamba_jax.data.tokenization.tiktoken import ENCODINGS
from mamba_jax.data.tokenizer import ByteTokenizer, Tokenizer, make_tokenizer
from mamba_jax.errors import InputError
from tests.data.conftest import open_tokens
from tests.data.small_tokenizers import small
from tests.data.test_supervised import PAIRS, counted, read_all, supervised, write_lines

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "tokenizers"
CHAT = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "hello"},
    {"role": "user", "content": "bye"},
    {"role": "assistant", "content": "goodbye"},
]
# Turns as ChatML has them; the second template says where the assistant's text is.
PLAIN = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
MARKED = (
    "{% for m in messages %}<{{ m.role }}>"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}</s>{% endgeneration %}{% else %}{{ m.content }}</s>"
    "{% endif %}{{ '\n' }}{% endfor %}"
)


@pytest.fixture
def chat_tokenizer(tmp_path: Path) -> Callable[[str], Tokenizer]:
    """Bytes with a chat template."""
    pytest.importorskip("jinja2")

    def make(template: str) -> Tokenizer:
        (tmp_path / "template.jinja").write_text(template)
        return make_tokenizer(TokenizerConfig(chat_template=str(tmp_path / "template.jinja")))

    return make


@pytest.mark.parametrize("template", [PLAIN, MARKED], ids=["prefixes", "marked"])
def test_what_the_assistant_says_counts(
    tmp_path: Path, chat_tokenizer: Callable[[str], Tokenizer], template: str
) -> None:
    path = write_lines(tmp_path / "chat.jsonl", [{"messages": CHAT}, *PAIRS[:1]])
    dataset = open_tokens(supervised(path), str(tmp_path / "cache"), chat_tokenizer(template))
    after = b"\n" if template == PLAIN else b""
    end = b"\0" if template == PLAIN else b""
    assert counted(dataset) == [b"hello</s>" + after + b"goodbye</s>" + after + end, b"4\0"]
    ids, _ = read_all(dataset)
    written = "".join(f"<{message['role']}>{message['content']}</s>\n" for message in CHAT)
    assert bytes(ids[: len(written)]) == written.encode()


def test_a_table_of_chats_is_read_without_what_other_rows_fill_up(
    tmp_path: Path, chat_tokenizer: Callable[[str], Tokenizer]
) -> None:
    strict = "{% for m in messages %}{% if m.name is defined %}{{ raise_exception('a name') }}{% endif %}" + PLAIN[23:]
    table = pyarrow.Table.from_pylist([{"messages": CHAT}, {"messages": [*CHAT, {"role": "user", "content": "x"}]}])
    pyarrow.parquet.write_table(table, tmp_path / "chat.parquet")
    source = supervised(str(tmp_path / "chat.parquet"))
    dataset = open_tokens(source, str(tmp_path / "cache"), chat_tokenizer(strict))
    assert counted(dataset)[0] == b"hello</s>\ngoodbye</s>\n\0"
    assert counted(dataset)[1] == b"hello</s>\ngoodbye</s>\n"


def test_special_tokens_of_a_template_are_tokens_and_those_of_a_message_are_refused(tmp_path: Path) -> None:
    """`</s>` ends turns and documents: one at the end of the chat is its end, those before it end no document."""
    pytest.importorskip("jinja2")
    (tmp_path / "tokenizer.json").write_text(small("byte_level"))
    settings = {"chat_template": PLAIN.replace("</s>\n", "{{ eos_token }}"), "eos_token": {"content": "</s>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    config = TokenizerConfig(kind="hf_json", path=str(tmp_path / "tokenizer.json"), end_of_document="</s>")
    tokenizer = make_tokenizer(config)
    path = write_lines(tmp_path / "chat.jsonl", [{"messages": CHAT}, {"messages": CHAT}])
    ids, flags = read_all(open_tokens(supervised(path), str(tmp_path / "cache"), tokenizer))
    ends = np.array(ids) == tokenizer.end_of_document
    assert ends.sum() == 2 * len(CHAT)
    assert np.flatnonzero(np.array(flags) & ENDS).tolist() == [len(ids) // 2 - 1, len(ids) - 1]
    assert [bool(flag & COUNTS) for flag in np.array(flags)[ends]] == [False, False, True, False, True] * 2
    # Inputs of one dialogue are one segment, and the last target of it is the end of its last turn.
    config = DataConfig(train=supervised(path), seq_len=len(ids) - 1, global_batch=1)
    batch = TrainBatches(open_tokens(supervised(path), str(tmp_path / "cache"), tokenizer), config, seed=0).at(0)
    assert np.unique(np.asarray(batch.segment_ids), return_counts=True)[1].tolist() == [
        len(ids) // 2,
        len(ids) // 2 - 1,
    ]
    forged = [*CHAT[:1], {"role": "user", "content": "a</s>b"}, *CHAT[2:]]
    path = write_lines(tmp_path / "forged.jsonl", [{"messages": forged}])
    with pytest.raises(InputError, match="line 1 spells the special token '</s>' in message 2: remove it"):
        open_data(supervised(path), tmp_path / "cache", tokenizer)


def chat(*turns: tuple[str, Any]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


ASK, ANSWER = ("user", "why"), ("assistant", "so")


@pytest.mark.parametrize(
    ("record", "template", "message"),
    [
        (chat(ASK), PLAIN, "has no message of the role 'assistant': there is nothing to learn"),
        (chat(ASK, ("assistant", "")), PLAIN, "has an empty completion, '', in message 2"),
        (chat(ASK, ("assistant", None)), PLAIN, "has no field 'content' in message 2"),
        (chat(ASK, ("assistant", [1])), PLAIN, "has no text but list in its field 'content' in message 2"),
        ({"messages": ["hi"]}, PLAIN, "has a message 1 that is no object but 'hi'"),
        (
            chat(("tool", "42"), ANSWER),
            "{% for m in messages if m.role != 'tool' %}<{{ m.role }}>{{ m.content }}{% endfor %}",
            "has message 1 of the role 'tool', which the chat template .*jinja leaves out",
        ),
        (
            chat(ASK, ANSWER),
            "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}",
            "has nothing to learn: the chat template .*jinja leaves out what the assistant says",
        ),
        (
            chat(("tool", "42"), ANSWER),
            "{{ raise_exception('roles are user and assistant, not ' + messages[0].role) }}",
            "is refused by the chat template .*jinja: roles are user and assistant, not tool",
        ),
        (chat(ASK, ANSWER), "{{ messages[7].content }}", "is refused by the chat template .*jinja: .*no element 7"),
        (
            chat(ASK, ANSWER, ASK, ANSWER),
            "{{ messages | length }}" + PLAIN,
            "cannot be cut into turns: the chat template .* does not begin .* up to message 2; mark .*{% generation %}",
        ),
        (
            chat(ASK, ANSWER),
            "{{ ''.__class__.__mro__ }}",
            "is refused by the chat template .*jinja: access to attribute",
        ),
    ],
)
def test_chats_that_the_template_does_not_write_are_refused_in_one_line(
    tmp_path: Path, chat_tokenizer: Callable[[str], Tokenizer], record: dict[str, Any], template: str, message: str
) -> None:
    path = write_lines(tmp_path / "a.jsonl", [record])
    with pytest.raises(InputError, match=f"a.jsonl line 1 {message}") as caught:
        open_data(supervised(path), tmp_path / "cache", chat_tokenizer(template))
    assert "\n" not in str(caught.value)


def test_templates_that_are_none_are_refused(tmp_path: Path, chat_tokenizer: Callable[[str], Tokenizer]) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"messages": CHAT}])
    with pytest.raises(InputError, match="messages are written by a chat template, and the tokenizer has none: put"):
        open_data(supervised(path), tmp_path / "cache", ByteTokenizer())
    with pytest.raises(InputError, match=r"the chat template .*jinja is no jinja2 template: .*'endfor'"):
        open_data(supervised(path), tmp_path / "cache", chat_tokenizer("{% for m in messages %}"))
    with pytest.raises(InputError, match=r"there is no file .*none: name a chat template by tokenizer\.chat_template"):
        make_tokenizer(TokenizerConfig(chat_template=str(tmp_path / "none")))
    (tmp_path / "bad").write_bytes(b"\xff")
    with pytest.raises(InputError, match="bad is not UTF-8 text: invalid start byte at byte 0"):
        make_tokenizer(TokenizerConfig(chat_template=str(tmp_path / "bad")))
    (tmp_path / "tokenizer.json").write_text(small("byte_level"))
    beside = TokenizerConfig(kind="hf_json", path=str(tmp_path / "tokenizer.json"))
    assert make_tokenizer(beside).chat_template is None
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(InputError, match=r"tokenizer_config.json is not JSON: Expecting"):
        make_tokenizer(beside)
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": 4}')
    with pytest.raises(InputError, match=r"the chat_template of .*tokenizer_config.json is no text: name a file"):
        make_tokenizer(beside)
    named = [{"name": "tool_use", "template": "a"}, {"name": "default", "template": "b"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named, "bos_token": "<s>"}))
    found = make_tokenizer(beside).chat_template
    assert found is not None
    assert (found.text, dict(found.special_tokens)) == ("b", {"eos_token": "<|endoftext|>", "bos_token": "<s>"})


def test_without_jinja2_a_line_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    (tmp_path / "other.jinja").write_text("another template, so that none is compiled already")
    tokenizer = make_tokenizer(TokenizerConfig(chat_template=str(tmp_path / "other.jinja")))
    path = write_lines(tmp_path / "a.jsonl", [{"messages": CHAT}])
    with pytest.raises(InputError, match=re.escape("pip install 'mamba-jax[chat]'")):
        open_data(supervised(path), tmp_path / "cache", tokenizer)


def test_another_template_makes_another_cache(tmp_path: Path, chat_tokenizer: Callable[[str], Tokenizer]) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"messages": CHAT}])
    found = [
        counted(open_tokens(supervised(path), str(tmp_path / "cache"), chat_tokenizer(template)))
        for template in (PLAIN, MARKED, PLAIN)
    ]
    assert found[0] == found[2] != found[1]
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_ids_and_what_counts_are_those_of_transformers(tmp_path: Path) -> None:
    """`chats.json` holds what `apply_chat_template` of transformers 5 makes of chats with an exported tokenizer."""
    pytest.importorskip("jinja2")
    golden = json.loads((GOLDEN / "chats.json").read_text())
    (tmp_path / "template.jinja").write_text(golden["template"])
    config = TokenizerConfig(
        kind="tiktoken",
        path=str(GOLDEN / "small.tiktoken"),
        encoding=ENCODINGS["gpt2"].pattern,
        chat_template=str(tmp_path / "template.jinja"),
    )
    path = write_lines(tmp_path / "chats.jsonl", [{"messages": chat["messages"]} for chat in golden["chats"]])
    ids, flags = read_all(open_tokens(supervised(path), str(tmp_path / "cache"), make_tokenizer(config)))
    assert ids == [token for chat in golden["chats"] for token in chat["ids"]]
    assert [flag & COUNTS for flag in flags] == [count for chat in golden["chats"] for count in chat["counts"]]
