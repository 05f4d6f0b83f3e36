"""Ids as numbers: text and back, the file for other programs, and what is refused."""

import numpy as np
import pytest
import tokenizers

from mamba_jax.config import TokenizerConfig
from mamba_jax.data.tokenizer import make_tokenizer
from mamba_jax.errors import InputError


def test_round_trip() -> None:
    tokenizer = make_tokenizer(TokenizerConfig(kind="ids", num_ids=16))
    assert (tokenizer.vocab_size, tokenizer.end_of_document, tokenizer.lossy) == (17, 16, None)
    ids = tokenizer.encode("3 0\n15")
    assert ids.tolist() == [3, 0, 15]
    assert tokenizer.decode([3, 0, 15, 16]) == "3 0 15"
    spelled = tokenizer.token_bytes
    assert spelled is not None
    assert b"".join(spelled(token, before) for token, before in ((3, None), (0, 3), (15, 0))) == b"3 0 15"
    library = tokenizers.Tokenizer.from_str(tokenizer.to_json())
    assert library.encode("3 0 15").ids == [3, 0, 15]
    assert library.get_vocab_size() == 17
    other = make_tokenizer(TokenizerConfig(kind="ids", num_ids=17))
    assert tokenizer.fingerprint != other.fingerprint
    assert np.array_equal(other.encode("16"), [16])


@pytest.mark.parametrize("text", ["16", "-1", "1.0", "one", "²", "3,4"])
def test_what_is_no_id_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="is no id: give numbers from 0 to 15"):
        make_tokenizer(TokenizerConfig(kind="ids", num_ids=16)).encode(text)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "ids"}, "'ids' needs their number"),
        ({"num_ids": 4}, "kind='byte', num_ids=4"),
        ({"kind": "ids", "num_ids": 0}, "num_ids must be positive, got 0"),
        ({"kind": "ids", "num_ids": 4, "path": "a.json"}, "'ids' takes none"),
    ],
)
def test_configs_that_contradict_themselves(fields: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        TokenizerConfig(**fields)
