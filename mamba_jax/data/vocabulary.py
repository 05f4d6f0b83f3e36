"""What shards and batches need to know about token ids, whatever made them: text, DNA, audio."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """The ids of a token stream.

    Attributes:
        size: V; ids are 0 .. V - 1.
        end_of_document: id that follows every document in the stream.
        fingerprint: sha256 of whatever maps data to ids, such as the tokenizer; equal fingerprints mean equal ids.
    """

    size: int
    end_of_document: int
    fingerprint: str
