"""The text of a continuation, as far as it is certain, while its tokens are drawn."""

import codecs
from collections.abc import Sequence

from mamba_jax.data.tokenizer import Tokenizer


class TextStream:
    """Turns the tokens behind a prompt into text, piece by piece.

    All pieces together are the same text however the tokens are dealt out, and a token takes the same time however many
    came before: it adds bytes to the text that depend on the token in front of it at most, see `Tokenizer.token_bytes`.
    So the space of a word is there if another word stands in front, be it the prompt's. A character of which bytes are
    missing is held back. Tokenizers whose text is not certain before the last token show all of it at the end.

    Example:
        stream = TextStream(tokenizer, prompt, tokenizer.encode(prompt).tolist())
        for token in tokens:
            print(stream.add([token]), end="")
        print(stream.finish())

    Args:
        tokenizer: the one that made the prompt's ids.
        prompt_text: the text in front, as it was given.
        prompt_ids: its token ids; none, or an end-of-document id, start a new document.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_text: str, prompt_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._prompt_ids = tokenizer.standing(prompt_ids).tolist()
        self._before = self._prompt_ids[-1] if self._prompt_ids else None
        self._undecoded: list[int] = []
        self._characters = codecs.getincrementaldecoder("utf-8")(errors="replace")
        bare = prompt_text.rstrip()
        # A tokenizer of whole words ignores a space at the end of the prompt, and puts its own in front of the next.
        self._drops_space = bare != prompt_text and tokenizer.encode(bare).tolist() == list(prompt_ids)

    def add(self, ids: Sequence[int]) -> str:
        """The text that more tokens make certain; end-of-document ids and ids without a token add none.

        Raises:
            InputError: an id lies outside the vocabulary.
        """
        standing = self._tokenizer.standing(ids).tolist()
        if (token_bytes := self._tokenizer.token_bytes) is None:
            self._undecoded += standing
            return ""
        text = ""
        for token in standing:
            text += self._characters.decode(token_bytes(token, self._before))
            self._before = token
        return self._shown(text)

    def finish(self) -> str:
        """The text that was held back; a character that is not whole is U+FFFD. Nothing may be added afterwards."""
        return self._shown(self._characters.decode(b"", final=True) + self._text_of_all())

    def _text_of_all(self) -> str:
        """The text of the ids that no text was certain of, as the difference that they make behind the prompt."""
        if not self._undecoded:
            return ""
        prompt = self._tokenizer.decode(self._prompt_ids) if self._prompt_ids else ""
        text = self._tokenizer.decode(self._prompt_ids + self._undecoded)
        return text[len(prompt) :] if text.startswith(prompt) else self._tokenizer.decode(self._undecoded)

    def _shown(self, text: str) -> str:
        if text and self._drops_space:
            self._drops_space = False
            return text.removeprefix(" ")
        return text
