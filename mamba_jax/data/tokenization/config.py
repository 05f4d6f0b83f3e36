"""Config of the tokenizer."""

import dataclasses
import os
from typing import Literal

from mamba_jax.config_base import Config, require

TokenizerKind = Literal["byte", "ids", "hf_json", "sentencepiece", "tiktoken"]


def tokenizer_kind(path: str | None) -> TokenizerKind:
    """The kind of tokenizer that a file is by its suffix; bytes without a file."""
    kinds: dict[str, TokenizerKind] = {".model": "sentencepiece", ".tiktoken": "tiktoken"}
    return "byte" if path is None else kinds.get(os.path.splitext(path)[1], "hf_json")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerConfig(Config):
    """How text becomes token ids.

    Attributes:
        kind: "byte" is ids 0-255 for bytes and 256 for end-of-document; "ids" is ids written as numbers, for data that
            is no text; "hf_json" is a `tokenizers` JSON file, "sentencepiece" a SentencePiece model, "tiktoken" a
            vocabulary of tiktoken.
        path: the file, of all but "byte" and "ids".
        num_ids: of "ids" how many there are; one more id ends a document.
        end_of_document: the token that separates documents; it must be in the vocabulary of the file.
        encoding: of "tiktoken" the published encoding, such as "cl100k_base", or a regular expression that cuts words.
        chat_template: file with the jinja2 template of messages; None takes what lies beside `path`, if anything does.
    """

    kind: TokenizerKind = "byte"
    path: str | None = None
    num_ids: int | None = None
    end_of_document: str = "<|endoftext|>"
    encoding: str | None = None
    chat_template: str | None = None

    def _check(self) -> None:
        """Refuses kinds without their file or pattern, and files and patterns without their kind."""
        is_built_in = self.kind in ("byte", "ids")
        needs = f"{self.kind!r} {'takes none' if is_built_in else 'needs a path'}"
        require(
            is_built_in == (self.path is None),
            f"TokenizerConfig: kind={self.kind!r}, path={self.path!r}; {needs}",
        )
        self._require_positive("num_ids")
        require(
            (self.kind == "ids") == (self.num_ids is not None),
            f"TokenizerConfig: kind={self.kind!r}, num_ids={self.num_ids}; 'ids' needs their number, and no other kind "
            "has one",
        )
        require(
            (self.kind == "tiktoken") == (self.encoding is not None),
            f"TokenizerConfig: kind={self.kind!r}, encoding={self.encoding!r}; 'tiktoken' needs an encoding's name "
            "or a pattern, and no other kind has one",
        )
