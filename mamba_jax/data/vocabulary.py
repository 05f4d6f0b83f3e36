"""What token ids are, apart from where they come from: text, DNA and audio share shards and batches by it."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """The ids of a token stream.

    Attributes:
        size: V, ids are 0 .. V - 1.
        end_of_document: id that follows every document in the stream.
        fingerprint: sha256 of what gives the ids their meaning, such as the tokenizer; equal fingerprints, equal ids.
    """

    size: int
    end_of_document: int
    fingerprint: str
