"""`eval.py` on both kinds of checkpoint, and its refusals."""

import dataclasses
import json
import runpy
from pathlib import Path

import jax
import numpy as np
import pytest
import tokenizers

from mamba_jax.checkpoint import Checkpointer
from mamba_jax.config import MeshConfig, ModelConfig, TfdsSource, TokenizerConfig
from mamba_jax.errors import InputError
from mamba_jax.evaluation import checkpoints as report
from mamba_jax.evaluation.checkpoints import EvaluationRequest, evaluate_checkpoint
from mamba_jax.export import companions, huggingface
from mamba_jax.export.load import load_model
from mamba_jax.generation.sampling import SamplingConfig
from mamba_jax.models.parameters import define
from tests.evaluation.conftest import SavedRun

EVAL = Path(__file__).parents[2] / "eval.py"


@pytest.fixture(scope="module")
def exported(saved_run: SavedRun) -> Path:
    folder = saved_run.folder.with_name("exported")
    huggingface.save(folder, saved_run.config.model, saved_run.params, layout="original")
    return folder


def evaluate_on_command_line(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr("sys.argv", ["eval.py", *arguments])
    runpy.run_path(str(EVAL), run_name="__main__")


def test_run_directory(saved_run: SavedRun) -> None:
    held_out = evaluate_checkpoint(str(saved_run.folder), EvaluationRequest()).perplexity
    training = evaluate_checkpoint(str(saved_run.folder), EvaluationRequest(split="train")).perplexity
    assert held_out is not None
    assert training is not None
    assert held_out.num_tokens != training.num_tokens


def test_safetensors_folder(saved_run: SavedRun, exported: Path, tmp_path: Path) -> None:
    expected = evaluate_checkpoint(str(saved_run.folder), EvaluationRequest(batch_size=8)).perplexity
    text = saved_run.validation.path
    request = EvaluationRequest(text=text, seq_len=12, batch_size=8)
    result = evaluate_checkpoint(str(exported), request).perplexity
    assert expected is not None
    assert result is not None
    # The run lets the state cross the two boundaries between its three documents. The folder, which says nothing about
    # it, starts each document anew and does not predict its first token.
    assert result.num_tokens == expected.num_tokens - 2
    assert result.loss == pytest.approx(expected.loss, rel=0.05)
    lines = (json.dumps({"text": path.read_text()}) + "\n" for path in sorted(Path(text).iterdir()))
    (tmp_path / "a.jsonl").write_text("".join(lines))
    of_file = evaluate_checkpoint(str(exported), dataclasses.replace(request, text=str(tmp_path / "a.jsonl")))
    assert of_file.perplexity == result


def test_sample_is_reproducible_and_continues_the_prompt(saved_run: SavedRun, exported: Path) -> None:
    request = EvaluationRequest(prompt="aé", num_tokens=8, max_batches=1, sampling=SamplingConfig(top_k=20))
    sample = evaluate_checkpoint(str(saved_run.folder), request).sample
    assert sample is not None
    assert sample.startswith("aé")
    assert evaluate_checkpoint(str(exported), request).sample == sample
    assert evaluate_checkpoint(str(exported), request).perplexity is None
    other_seed = dataclasses.replace(request, seed=1)
    assert evaluate_checkpoint(str(exported), other_seed).sample != sample


def test_command_line(saved_run: SavedRun, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    evaluate_on_command_line(monkeypatch, str(saved_run.folder), "--prompt", "a", "--num-tokens", "4")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines[:4]] == ["tokens", "loss", "perplexity", "bits per byte"]
    assert lines[4].startswith("a")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "no checkpoint folder nowhere"),
        ([], "missing an argument"),
        (["{run}", "--step", "9"], "no checkpoint of step 9; there are 3"),
        (["{run}", "--promt", "a"], "--prompt"),
        (["{run}", "--split", "test"], "split"),
        (["{run}", "--text", "nowhere"], "nowhere"),
        (["{run}", "--prompt", "a", "--max-batches", "1", "--sampling.temperature", "-1"], "temperature"),
        (["{exported}"], "give --text FOLDER, or --prompt"),
        (["{exported}", "--step", "3"], "no step 3"),
        (["{exported}", "--prompt", "a", "--num-tokens", "0"], "must be positive, got 0"),
        (["{run}", "--batch-size", "0"], "must be positive, got 0"),
        (["{run}", "--seq-len", "0"], "must be positive, got 0"),
        (["{run}", "--max-batches", "0"], "must be positive, got 0"),
        (["{run}", "--seq-len", "12.5"], "--seq-len"),
        (["{run}", "--seed", "-1"], "--seed must lie in 0 .. 2**32 - 1, got -1"),
        (["{run}", "--seed", "99999999999999999999"], "--seed must lie in 0 .. 2**32 - 1"),
        (["{run}", "--prompt", "a\udcff"], "lone surrogate at character 1"),
        (["{run}", "--weights", "average"], "keeps no average of the weights"),
        (["{run}/checkpoints"], "neither a training run (no folder 'checkpoints') nor a model (no 'config.json')"),
        (["{run}/checkpoints/3/config/metadata"], "no checkpoint folder"),
        (["{empty}"], "neither a training run"),
        (["{unfinished}"], "has no complete checkpoint yet"),
        (["{run}", "--text", "{empty}"], "no file in {empty} matches"),
        (["{exported}", "--prompt", "a", "--tokenizer.kind", "hf_json"], "'hf_json' needs a path"),
    ],
)
def test_bad_input_is_one_line(
    saved_run: SavedRun,
    exported: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.setattr(report, "evaluate", lambda *args, **kwargs: pytest.fail("the text was read"))
    places = {"run": saved_run.folder, "exported": exported, "empty": tmp_path, "unfinished": tmp_path / "unfinished"}
    (tmp_path / "unfinished" / "checkpoints").mkdir(parents=True)
    with pytest.raises(SystemExit) as stop:
        evaluate_on_command_line(monkeypatch, *(argument.format(**places) for argument in arguments))
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message.format(**places) in error


@pytest.fixture(scope="module")
def with_tokenizer(saved_run: SavedRun, exported: Path) -> Path:
    """The same weights as float32 in the other layout, with bytes as a tokenizer file."""
    folder, model = exported.with_name("with_tokenizer"), saved_run.config.model
    files = companions.written(TokenizerConfig(), model, layout="hf")
    huggingface.save(folder, model, saved_run.params, layout="hf", companions=files)
    return folder


def test_tokenizer_and_dtype_are_those_of_the_folder(
    saved_run: SavedRun, exported: Path, with_tokenizer: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    """Unless a flag says otherwise; which they are is printed."""
    text = saved_run.validation.path
    request = EvaluationRequest(text=text, seq_len=12, batch_size=8)
    expected = evaluate_checkpoint(str(exported), request)
    assert expected.tokenizer == "bytes"
    result = evaluate_checkpoint(str(with_tokenizer), request)
    assert result.perplexity == expected.perplexity
    assert (result.tokenizer, result.compute_dtype) == (str(with_tokenizer / "tokenizer.json"), "float32")
    coarse = dataclasses.replace(request, compute_dtype="bfloat16", tokenizer=TokenizerConfig())
    result = evaluate_checkpoint(str(with_tokenizer), coarse)
    assert (result.tokenizer, result.compute_dtype) == ("bytes", "bfloat16")
    assert result.perplexity is not None
    assert expected.perplexity is not None
    # Eight bits in each of some ten roundings on the way.
    assert 0 < abs(result.perplexity.loss - expected.perplexity.loss) < 0.05 * expected.perplexity.loss
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "?": 1}, unk_token="?"))
    words.add_special_tokens(["[END]"])
    words.save(str(tmp_path / "words.json"))
    flags = ["--tokenizer.path", str(tmp_path / "words.json"), "--tokenizer.end-of-document", "[END]"]
    evaluate_on_command_line(monkeypatch, str(with_tokenizer), "--text", text, "--seq-len", "12", *flags)
    printed = capsys.readouterr()
    assert f"tokenizer {tmp_path / 'words.json'}, computed in float32, text {text}\n" in printed.err
    # One unknown word and an end for each of three documents, whose first tokens are not predicted.
    assert "tokens         3\n" in printed.out


def test_a_checkpoint_does_not_say_where_to_write(saved_run: SavedRun, tmp_path: Path) -> None:
    """Whoever made it may have named any folder for a cache."""
    foreign = tmp_path / "foreign"
    config = dataclasses.replace(
        saved_run.config, data=dataclasses.replace(saved_run.config.data, cache_dir=str(foreign))
    )
    checkpointer = Checkpointer(tmp_path / "run", config.checkpoint)
    checkpointer.save(3, {"params": saved_run.params, "rest": {"step": jax.numpy.int32(3)}}, config)
    checkpointer.close()
    before = sorted(path for path in tmp_path.rglob("*"))
    result = evaluate_checkpoint(str(tmp_path / "run"), EvaluationRequest())
    assert sorted(path for path in tmp_path.rglob("*")) == before
    own = EvaluationRequest(cache_dir=str(tmp_path / "own"))
    assert evaluate_checkpoint(str(tmp_path / "run"), own) == result
    assert (tmp_path / "own").is_dir()
    assert not foreign.exists()


def test_a_set_is_not_downloaded(saved_run: SavedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = TfdsSource(name="lm1b", split="test", data_dir=str(tmp_path / "foreign"))
    experiment = dataclasses.replace(
        saved_run.config, data=dataclasses.replace(saved_run.config.data, validation=source)
    )
    loaded = dataclasses.replace(load_model(saved_run.folder), experiment=experiment)
    monkeypatch.setattr(report, "load_model", lambda *args, **kwargs: loaded)
    with pytest.raises(InputError, match=r"TFDS set 'lm1b' is not prepared in .*foreign"):
        evaluate_checkpoint("run", EvaluationRequest())
    assert not (tmp_path / "foreign").exists()


def test_more_ids_than_bytes_need_a_tokenizer(tmp_path: Path) -> None:
    model = ModelConfig(vocab_size=600, d_model=8, num_layers=1)
    params = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), define(model).params)
    huggingface.save(tmp_path / "model", model, params, layout="hf")
    with pytest.raises(InputError, match=r"holds no tokenizer\.json, and with 600 ids the model does not read bytes"):
        evaluate_checkpoint(str(tmp_path / "model"), EvaluationRequest(prompt="a"))


def test_length_need_not_divide_over_the_mesh_of_the_run(saved_run: SavedRun) -> None:
    """Evaluation splits the batch only: 13 tokens on eight devices, of a run that split 16 over them."""
    config = dataclasses.replace(
        saved_run.config,
        data=dataclasses.replace(saved_run.config.data, seq_len=16),
        mesh=MeshConfig(data=1, sequence=8),
    )
    folder = saved_run.folder.with_name("split")
    checkpointer = Checkpointer(folder, config.checkpoint)
    checkpointer.save(3, {"params": saved_run.params, "rest": {"step": jax.numpy.int32(3)}}, config)
    checkpointer.close()
    request = EvaluationRequest(seq_len=13, batch_size=3)
    result = evaluate_checkpoint(str(folder), request).perplexity
    assert result == evaluate_checkpoint(str(saved_run.folder), request).perplexity
    assert result is not None
    tokens = sum(len(path.read_bytes()) + 1 for path in saved_run.folder.parent.glob("validation/*.txt"))
    assert result.num_tokens == tokens - 1


def test_tokenizer_of_another_model_is_refused(exported: Path, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    vocabulary = {f"word{index}": index for index in range(999)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="word0"))
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(path))
    request = EvaluationRequest(prompt="word1", tokenizer=TokenizerConfig(kind="hf_json", path=str(path)))
    with pytest.raises(InputError, match=r"the tokenizer has 1000 ids but .* only 264"):
        evaluate_checkpoint(str(exported), request)
