"""The tokenizer that lies beside exported weights gives the ids and the text of the one that the run used."""

import dataclasses
import json
from pathlib import Path

import pytest
import tokenizers

from mamba_jax.config import ModelConfig, TokenizerConfig
from mamba_jax.data.tokenizer import make_tokenizer
from mamba_jax.errors import InputError
from mamba_jax.export import companions
from mamba_jax.export.published_config import to_json
from tests.export.conftest import END, TOKENIZERS

TEXTS = [
    "",
    "plain text",
    " lead and  two ",
    "naïve Füße, 漢字, 🐍\r\n\t\0",
    f"{END} is only text [SEP] <s>",
    "a" * 300,
]
MODEL = ModelConfig(vocab_size=400, d_model=8, num_layers=1)


def write(folder: Path, config: TokenizerConfig) -> Path:
    folder.mkdir()
    for name, content in companions.written(config, MODEL, layout="hf").items():
        (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_written_files_give_the_same_ids_and_text(
    tokenizer_configs: dict[str, TokenizerConfig], tmp_path: Path, kind: str
) -> None:
    config = tokenizer_configs[kind]
    ours, folder = make_tokenizer(config), write(tmp_path / "out", config)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert settings["eos_token"] == settings["bos_token"] == settings["pad_token"]
    assert settings["clean_up_tokenization_spaces"] is False
    theirs = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    theirs.encode_special_tokens = settings["split_special_tokens"]
    assert theirs.token_to_id(settings["eos_token"]) == ours.end_of_document
    assert theirs.get_vocab_size() == ours.vocab_size
    for text in TEXTS:
        ids = ours.encode(text)
        assert theirs.encode(text).ids == ids.tolist()
        assert theirs.decode(ids.tolist(), skip_special_tokens=False) == ours.decode(ids)
    generation = json.loads((folder / "generation_config.json").read_text())
    assert {generation[f"{name}_token_id"] for name in ("bos", "eos", "pad")} == {ours.end_of_document}
    assert generation["suppress_tokens"] == list(range(ours.vocab_size, 400))
    read = companions.tokenizer_beside(folder)
    assert read is not None
    again = companions.open_tokenizer(read)
    assert again.end_of_document == ours.end_of_document
    assert [again.encode(text).tolist() for text in TEXTS] == [ours.encode(text).tolist() for text in TEXTS]


def test_a_file_that_says_what_the_run_did_is_copied(
    tokenizer_configs: dict[str, TokenizerConfig], tmp_path: Path
) -> None:
    """Others are written anew, without the markers, the length and the padding that they ask for."""
    for kind in ("byte-level", "wordpiece"):
        own = Path(tokenizer_configs[kind].path or "").read_bytes()
        folder = write(tmp_path / kind, tokenizer_configs[kind])
        assert ((folder / "tokenizer.json").read_bytes() == own) == (kind == "byte-level")


def test_original_layout_has_no_place_for_generation() -> None:
    assert companions.written(TokenizerConfig(), MODEL, layout="original").keys() == {
        "tokenizer.json",
        "tokenizer_config.json",
    }


@pytest.mark.parametrize(
    ("files", "end"),
    [
        ({"tokenizer_config.json": {"eos_token": "[SEP]"}}, "[SEP]"),
        ({"tokenizer_config.json": {"eos_token": {"content": "[SEP]", "special": True}}}, "[SEP]"),
        ({"tokenizer_config.json": {"eos_token": None}, "config.json": {"eos_token_id": 2}}, "[SEP]"),
        ({"config.json": {"eos_token_id": [1, 2]}}, "[CLS]"),
        ({"config.json": {"eos_token_id": 10**30}}, END),
        ({"config.json": {"eos_token_id": "two"}}, END),
        ({}, END),
    ],
)
def test_end_of_document_of_a_folder(
    tokenizer_configs: dict[str, TokenizerConfig], tmp_path: Path, files: dict[str, object], end: str
) -> None:
    (tmp_path / "tokenizer.json").symlink_to(tokenizer_configs["wordpiece"].path or "")
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    config = companions.tokenizer_beside(tmp_path)
    assert config == TokenizerConfig(kind="hf_json", path=str(tmp_path / "tokenizer.json"), end_of_document=end)


def test_folder_without_a_tokenizer(tmp_path: Path) -> None:
    assert companions.tokenizer_beside(tmp_path) is None
    assert companions.copied(tmp_path) == {}


def test_damaged_tokenizer_files_get_one_line(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.symlink_to(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"tokenizer\.json is a link to .*nowhere, which does not exist"):
        companions.tokenizer_beside(tmp_path)
    path.unlink()
    path.write_text("{}")
    (tmp_path / "config.json").write_text(json.dumps(to_json(MODEL, layout="hf", extra={"eos_token_id": 0})))
    with pytest.raises(InputError, match=r"tokenizer\.json is not a tokenizer of the `tokenizers` library"):
        companions.tokenizer_beside(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": 3}')
    with pytest.raises(InputError, match="eos_token=3 is not text"):
        companions.tokenizer_beside(tmp_path)
    for kind in ("missing", "folder"):
        if kind == "folder":
            (tmp_path / kind).mkdir()
        config = TokenizerConfig(kind="hf_json", path=str(tmp_path / kind))
        with pytest.raises(InputError, match=r"put it into the checkpoint's folder as tokenizer\.json"):
            companions.open_tokenizer(config)


def test_the_chat_template_lies_beside_exported_weights(
    tokenizer_configs: dict[str, TokenizerConfig], tmp_path: Path
) -> None:
    """With it special tokens in a text are those tokens, as in what it writes."""
    template = tmp_path / "own.jinja"
    template.write_text("{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}")
    config = dataclasses.replace(tokenizer_configs["byte-level"], chat_template=str(template))
    folder = write(tmp_path / "out", config)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    assert settings["split_special_tokens"] is False
    read = companions.tokenizer_beside(folder)
    assert read is not None
    found, ours = make_tokenizer(read).chat_template, make_tokenizer(config).chat_template
    assert found is not None
    assert ours is not None
    assert (found.text, found.special_tokens["eos_token"]) == (ours.text, ours.special_tokens["eos_token"])
    # A run's folder may hold it, where the config's path is one of another machine.
    run_folder = tmp_path / "run"
    run_folder.mkdir()
    (run_folder / "chat_template.jinja").write_text("of the run")
    kept = make_tokenizer(companions.tokenizer_of_run(run_folder, dataclasses.replace(config, chat_template="gone")))
    assert kept.chat_template is not None
    assert kept.chat_template.text == "of the run"
