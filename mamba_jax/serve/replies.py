"""Answers in the form that clients of OpenAI's completions expect."""

import codecs
import time
import uuid
from collections.abc import Sequence
from typing import Any

from mamba_jax.data.tokenizer import Tokenizer
from mamba_jax.generation.text_engine import Continuation, Generated, Piece
from mamba_jax.serve.job import Job

_REASONS = {"end": "stop", "stop": "stop", "length": "length"}


class Replies:
    """Writes the answer to one job, whole or in chunks.

    Args:
        job: the job.
        model: the name of the model.
        tokenizer: that of the model.
    """

    def __init__(self, job: Job, *, model: str, tokenizer: Tokenizer) -> None:
        self._job = job
        self._head = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": model,
        }
        echoed = [continuation.prompt if job.asked.echo else "" for continuation in job.continuations]
        self._echoed, self._num_tokens = echoed, [0] * len(echoed)
        self._logs = None
        if job.asked.logprobs is not None:
            self._logs = [TokenLog(tokenizer, continuation) for continuation in job.continuations]

    def whole(self, generated: Sequence[Generated]) -> dict[str, Any]:
        """The answer, from the continuations of all choices."""
        choices = []
        for index, found in enumerate(generated):
            self._num_tokens[index] = len(found.tokens)
            log = None if self._logs is None else self._logs[index].add(found.tokens, found.log_probabilities)
            choices.append(_choice(index, self._echoed[index] + found.text, log, _REASONS[found.finished]))
        return {**self._head, "choices": choices, "usage": self._usage()}

    def beginnings(self) -> list[dict[str, Any]]:
        """The chunks in front of the first piece: the prompts, if they are to be echoed."""
        return [self._chunk([_choice(index, text, None, None)]) for index, text in enumerate(self._echoed) if text]

    def chunks(self, piece: Piece) -> list[dict[str, Any]]:
        """The chunk of a piece; none if it has nothing to tell."""
        self._num_tokens[piece.prompt] = piece.num_tokens
        reason = None if piece.generated is None else _REASONS[piece.generated.finished]
        log = None
        if self._logs is not None:
            log = self._logs[piece.prompt].add(piece.tokens, piece.log_probabilities)
        if not piece.text and reason is None and log is None:
            return []
        return [self._chunk([_choice(piece.prompt, piece.text, log, reason)])]

    def endings(self) -> list[dict[str, Any]]:
        """The chunks behind the last piece: how many tokens there were, if that was asked for."""
        if not self._job.asked.includes_usage:
            return []
        return [{**self._head, "choices": [], "usage": self._usage()}]

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        usage = {"usage": None} if self._job.asked.includes_usage else {}
        return {**self._head, "choices": choices, **usage}

    def _usage(self) -> dict[str, int]:
        """Tokens of all prompts, each counted once, and of all continuations."""
        continuations = self._job.continuations[:: self._job.asked.n or 1]
        prompt = sum(len(continuation.request.tokens) for continuation in continuations)
        completion = sum(self._num_tokens)
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


class TokenLog:
    r"""The tokens of a continuation as texts, each with its log-probability and its place.

    A token that is no whole character is shown as `bytes:\xe2\x82`, and one without text, such as that which ends a
    document, as an empty text.

    Args:
        tokenizer: that of the model.
        continuation: whose tokens they are.
    """

    def __init__(self, tokenizer: Tokenizer, continuation: Continuation) -> None:
        self._tokenizer = tokenizer
        before = tokenizer.standing(continuation.request.tokens).tolist()
        self._before, self._place = before[-1] if before else None, 0
        self._characters = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def add(self, tokens: Sequence[int], log_probabilities: Sequence[float]) -> dict[str, Any]:
        """The `logprobs` of tokens behind those that were added before."""
        texts, places = [], []
        for token in tokens:
            added = b""
            if len(self._tokenizer.standing([token])):
                added = self._bytes(token)
            is_held, _ = self._characters.getstate()
            # A character that will not become whole is one place.
            begins_anew = bool(is_held) and added[:1] != b"" and added[0] & 0xC0 != 0x80
            places.append(self._place + begins_anew)
            self._place += len(self._characters.decode(added))
            texts.append(_shown(added))
        return {
            "tokens": texts,
            "token_logprobs": list(log_probabilities),
            "top_logprobs": None,
            "text_offset": places,
        }

    def _bytes(self, token: int) -> bytes:
        """The bytes that a token adds to the text."""
        if self._tokenizer.token_bytes is None:
            return self._tokenizer.decode([token]).encode()
        before, self._before = self._before, token
        return self._tokenizer.token_bytes(token, before)


def _shown(added: bytes) -> str:
    try:
        return added.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in added)


def _choice(index: int, text: str, log: dict[str, Any] | None, reason: str | None) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": log, "finish_reason": reason}
