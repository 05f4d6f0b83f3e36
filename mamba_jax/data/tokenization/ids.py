"""Token ids written as numbers: the tokenizer of data that is no text."""

import hashlib
from collections.abc import Sequence

import numpy as np
import tokenizers
from jaxtyping import Int
from tokenizers import models, pre_tokenizers

from mamba_jax.data.tokenizer import Tokenizer
from mamba_jax.errors import InputError, short


class IdTokenizer(Tokenizer):
    """Numbers between spaces, "3 0 15", as the ids 0 .. V - 2 that they are; V - 1 is end-of-document.

    Args:
        num_ids: V - 1, how many ids data can have.
    """

    lossy = None
    token_bytes = staticmethod(lambda token, before: (b"" if before is None else b" ") + str(token).encode())

    def __init__(self, num_ids: int) -> None:
        self.vocab_size, self.end_of_document = num_ids + 1, num_ids
        self.known = np.ones(num_ids + 1, bool)
        self.fingerprint = hashlib.sha256(f"ids below {num_ids}, end of document {num_ids}".encode()).hexdigest()

    def encode_batch(
        self, texts: Sequence[str], *, continues: Sequence[bool] | None = None
    ) -> list[Int[np.ndarray, " T"]]:
        """See `Tokenizer.encode_batch`."""
        return [np.array([self._id(word) for word in text.split()], np.int32) for text in texts]

    def _id(self, word: str) -> int:
        if not (word.isascii() and word.isdecimal() and int(word) < self.end_of_document):
            raise InputError(
                f"{short(word)} is no id: give numbers from 0 to {self.end_of_document - 1}, as in '3 0 1'"
            )
        return int(word)

    def _decode(self, ids: Int[np.ndarray, " T"]) -> str:
        return " ".join(map(str, ids.tolist()))

    def to_json(self) -> str:
        """See `Tokenizer.to_json`."""
        vocabulary = {str(index): index for index in range(self.end_of_document)}
        tokenizer = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="0"))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        tokenizer.add_special_tokens(["<|endoftext|>"])
        return tokenizer.to_str()
