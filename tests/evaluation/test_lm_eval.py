"""`lm_eval` on local tasks through the adapter, without a network: the figures of our own evaluation."""

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mamba_jax.errors import InputError
from mamba_jax.evaluation import lm_eval as command
from mamba_jax.evaluation.scoring import Scorer
from mamba_jax.evaluation.task_files import read_task
from mamba_jax.evaluation.tasks import encode_pairs, measure_task
from mamba_jax.generation.sampling import SamplingConfig
from mamba_jax.generator import Generator
from mamba_jax.loaded import Model, load
from tests.evaluation.test_tasks import WORDS, published, written

__all__ = ["published"]
EXTRA = "the extra lm-eval is not installed"
QUESTIONS = [
    {"context": "the state of the", "choices": ["union", "other thing"], "answer": 0},
    {"context": "the other", "choices": ["is strong", "times", "state"], "answer": 2},
    {"context": "the union is", "choices": ["is", "strong"], "answer": 0},
]
TASKS = {
    "words": {
        "output_type": "loglikelihood",
        "doc_to_text": "{{text.split(' ')[:-1]|join(' ')}}",
        "doc_to_target": "{{' ' + text.split(' ')[-1]}}",
        "metric_list": [{"metric": "perplexity", "aggregation": "perplexity"}, {"metric": "acc"}],
    },
    "questions": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{context}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "texts": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    },
    "answers": {
        "output_type": "generate_until",
        "doc_to_text": "{{text}}",
        "doc_to_target": "{{text}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4},
        "metric_list": [{"metric": "exact_match"}],
    },
}


@pytest.fixture(scope="module")
def adapter(monkeypatch_of_module: pytest.MonkeyPatch) -> Any:
    """The module of the adapter, where lm_eval is installed."""
    pytest.importorskip("lm_eval", reason=EXTRA)
    return importlib.import_module("mamba_jax.evaluation.harness")


@pytest.fixture(scope="module")
def monkeypatch_of_module(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as monkeypatch:
        for name in ("HF_DATASETS_OFFLINE", "HF_HUB_OFFLINE", "DISABLE_MULTIPROC"):
            monkeypatch.setenv(name, "1")
        monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
        yield monkeypatch


@pytest.fixture(scope="module")
def model(published: Path) -> Model:
    return load(published, compute_dtype="float32")


@pytest.fixture(scope="module")
def lm(adapter: Any, model: Model) -> Any:
    return adapter.MambaJaxLM(model, batch_size=4)


def requests(kind: str, *arguments: tuple[Any, ...]) -> list[Any]:
    instance = importlib.import_module("lm_eval.api.instance").Instance
    return [instance(request_type=kind, doc={}, arguments=own, idx=0) for own in arguments]


def local_tasks(folder: Path) -> None:
    """Descriptions of tasks for lm_eval, on files beside them."""
    written(folder, [*WORDS, {"text": "the other state state"}])
    written(folder, QUESTIONS, "questions")
    for name, fields in TASKS.items():
        file = folder / ("questions.jsonl" if name == "questions" else "words.jsonl")
        source = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(file)}}, "test_split": "test"}
        # JSON is YAML.
        (folder / f"{name}.yaml").write_text(json.dumps({"task": name, **source, **fields}))


def test_lm_eval_gives_the_figures_of_our_own_evaluation(lm: Any, model: Model, tmp_path: Path) -> None:
    local_tasks(tmp_path)
    manager = importlib.import_module("lm_eval.tasks").TaskManager(include_path=str(tmp_path), include_defaults=False)
    evaluate = importlib.import_module("lm_eval").simple_evaluate
    found = evaluate(model=lm, tasks=list(TASKS), task_manager=manager, bootstrap_iters=10)["results"]
    scorer = Scorer(model.definition, model.params, batch_size=4)
    words = measure_task(read_task("words", tmp_path), model.tokenizer, scorer)
    assert 0 < words.accuracy < 1
    assert found["words"]["acc,none"] == words.accuracy
    assert found["words"]["acc_stderr,none"] == pytest.approx(words.accuracy_error, rel=1e-12)
    assert found["words"]["perplexity,none"] == pytest.approx(words.perplexity, rel=1e-12)
    questions = measure_task(read_task("questions", tmp_path), model.tokenizer, scorer)
    assert 0 < questions.accuracy < 1
    assert found["questions"]["acc,none"] == questions.accuracy
    assert found["questions"]["acc_norm,none"] == questions.normalised_accuracy
    texts = [record["text"] for record in [*WORDS, {"text": "the other state state"}]]
    scores = scorer.score(encode_pairs(model.tokenizer, [("", text) for text in texts]))
    bits = -sum(score.log_probability for score in scores) / np.log(2) / sum(len(text.encode()) for text in texts)
    assert found["texts"]["bits_per_byte,none"] == pytest.approx(bits, rel=1e-12)
    assert found["answers"]["exact_match,none"] == 0


def test_splits_texts_where_our_own_evaluation_does(lm: Any, model: Model) -> None:
    pairs = [("the union", " of"), ("the union  ", "of"), ("", "the union"), (" \n", "the union")]
    own = Scorer(model.definition, model.params, batch_size=4).score(encode_pairs(model.tokenizer, pairs))
    found = lm.loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True)
    assert found == [(score.log_probability, score.is_greedy) for score in own]


def test_windows_predict_every_token_once(lm: Any, adapter: Any, model: Model) -> None:
    """With a length that the text fits into they change nothing; with a shorter one tokens see less."""
    text = "the state of the union is strong"
    (whole,) = lm.loglikelihood_rolling(requests("loglikelihood_rolling", (text,)), disable_tqdm=True)
    ids = [model.tokenizer.end_of_document, *model.tokenizer.encode(text).tolist()]
    for length, same in ((len(ids) - 1, True), (4, False)):
        windows = adapter.MambaJaxLM(model, max_length=length)
        (found,) = windows.loglikelihood_rolling(requests("loglikelihood_rolling", (text,)), disable_tqdm=True)
        assert (found == pytest.approx(whole, rel=1e-5)) is same
        expected = 0.0
        for start in range(0, len(ids) - 1, length):
            stop = min(start + length, len(ids) - 1)
            begin = max(stop - length, 0)
            pair = (ids[begin : start + 1], ids[start + 1 : stop + 1])
            expected += Scorer(model.definition, model.params).score([pair])[0].log_probability
        assert found == pytest.approx(expected, rel=1e-5)
    assert lm.loglikelihood_rolling(requests("loglikelihood_rolling", ("",)), disable_tqdm=True) == [0.0]


def test_answers_are_those_of_a_generator(lm: Any, adapter: Any, model: Model) -> None:
    """Greedy or drawn, without a context, and cut from the left."""
    drawn = {"do_sample": True, "temperature": 0.7, "top_k": 5, "until": [], "max_gen_toks": 6}
    given = [
        ("the state", {"until": ["\n"], "max_gen_toks": 6}),
        ("the union", drawn),
        ("", {"until": "\n", "max_gen_toks": 3, "num_beams": 1}),
        ("the union", drawn),
        ("the other", {"until": ["er"], "max_gen_toks": 6}),
    ]
    found = lm.generate_until(requests("generate_until", *given), disable_tqdm=True)
    generator = Generator(model)
    greedy, sampling = SamplingConfig(temperature=0.0), SamplingConfig(temperature=0.7, top_k=5)
    start = generator.extended(None, [model.tokenizer.end_of_document])
    assert found == [
        generator.generate(["the state"], num_tokens=6, sampling=greedy, stop=["\n"])[0].text,
        generator.generate(["the union"], num_tokens=6, sampling=sampling, seeds=[1])[0].text,
        generator.generate([""], num_tokens=3, sampling=greedy, stop=["\n"], context=start)[0].text,
        generator.generate(["the union"], num_tokens=6, sampling=sampling, seeds=[3])[0].text,
        generator.generate(["the other"], num_tokens=6, sampling=greedy, stop=["er"])[0].text,
    ]
    text = "the state of the union is strong"
    short = adapter.MambaJaxLM(model, max_length=10)
    (cut,) = short.generate_until(requests("generate_until", (text, given[0][1])), disable_tqdm=True)
    context = generator.extended(None, model.tokenizer.encode(text)[-4:].tolist())
    assert cut == generator.generate([""], num_tokens=6, sampling=greedy, context=context)[0].text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batchsize": 4}, "model arguments: unknown key 'batchsize', did you mean 'batch_size'?"),
        ({"batch_size": "many"}, "batch_size must be a positive number or auto, got 'many'"),
        ({"batch_size": 0}, "batch_size must be a positive number or auto, got '0'"),
        ({"max_length": -1}, "max_length must be positive, got -1"),
        ({"dtype": "int4"}, "dtype: Input should be 'auto', 'float32', 'bfloat16' or 'float16', got 'int4'"),
        ({"step": "last"}, "step: Input should be a valid integer, got 'last'"),
    ],
)
def test_bad_model_arguments_are_one_line(adapter: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as error:
        adapter.MambaJaxLM("nowhere", **options)
    assert message in str(error.value)


def test_arguments_as_lm_eval_gives_them(adapter: Any, published: Path) -> None:
    given = f"pretrained={published},dtype=float32,max_length=64"
    made = adapter.MambaJaxLM.create_from_arg_string(given, {"batch_size": "auto:4", "device": "cuda:0"})
    assert (made.max_length, made.eot_token_id, made.tokenizer_name) == (64, 3, made._tokenizer.fingerprint)
    bare = published.with_name("bare")
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).symlink_to(published / name)
    with pytest.raises(InputError, match="this checkpoint has no tokenizer"):
        adapter.MambaJaxLM(str(bare))
    own = adapter.MambaJaxLM(str(bare), tokenizer=str(published / "tokenizer.json"))
    assert own.tok_encode("the union") == made.tok_encode("the union")
    with pytest.raises(InputError, match="give --model_args pretrained=FOLDER"):
        adapter.MambaJaxLM.create_from_arg_string("dtype=float32")
    with pytest.raises(InputError, match="no checkpoint folder nowhere"):
        adapter.MambaJaxLM.create_from_arg_string("pretrained=nowhere")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_beams": 4}, "does no beam search: leave num_beams out"),
        ({"length_penalty": 2}, "generation settings .*length_penalty.* are not all offered"),
        ({"max_gen_toks": 64}, "an answer may have 64 tokens, but max_length is 64"),
    ],
)
def test_bad_generation_settings_are_one_line(adapter: Any, model: Model, settings: dict, message: str) -> None:
    short = adapter.MambaJaxLM(model, max_length=64)
    with pytest.raises(InputError, match=message):
        short.generate_until(requests("generate_until", ("the", settings)), disable_tqdm=True)


def test_questions_that_cannot_be_asked_are_one_line(lm: Any) -> None:
    with pytest.raises(InputError, match="no chat template: leave --apply_chat_template out"):
        lm.apply_chat_template([{"role": "user", "content": "the"}])
    with pytest.raises(InputError, match="the tokenizer has no ids for the continuation ''"):
        lm.loglikelihood(requests("loglikelihood", ("the", "")), disable_tqdm=True)


@pytest.mark.slow
def test_command_line(adapter: Any, published: Path, tmp_path: Path) -> None:
    local_tasks(tmp_path)
    arguments = ["--model_args", f"pretrained={published}", "--tasks", "words", "--include_path", str(tmp_path)]
    program = [sys.executable, "-m", "mamba_jax.evaluation.lm_eval"]
    done = subprocess.run([*program, *arguments], capture_output=True, text=True, check=True)
    assert "mamba_jax ({'pretrained'" in done.stdout
    assert "|acc       |" in done.stdout
    done = subprocess.run([*program, *arguments, "--model_args", "pretrained=nowhere"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: no checkpoint folder nowhere")


@pytest.mark.parametrize(
    ("arguments", "added"),
    [
        (["--tasks", "words"], ["--model", "mamba_jax", "--batch_size", "auto"]),
        (["run", "--tasks", "words", "-b", "4"], ["--model", "mamba_jax"]),
        (["--model=dummy", "--tasks", "words"], ["--batch_size", "auto"]),
        (["--config", "words.yaml"], []),
        (["ls", "tasks"], []),
        (["run", "--help"], []),
        ([], []),
    ],
)
def test_defaults_of_the_command_line(arguments: list[str], added: list[str]) -> None:
    assert command.with_defaults(arguments) == [*arguments, *added]


def test_what_lm_eval_refuses_is_one_line(
    adapter: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its own refusals keep no traceback; a defect of ours does."""
    program = importlib.import_module("lm_eval.__main__")
    monkeypatch.setattr(sys, "argv", ["lm_eval", "--tasks", "hellasvag"])

    def refuse() -> None:
        raise ValueError("Tasks not found: hellasvag")

    monkeypatch.setattr(program, "cli_evaluate", refuse)
    with pytest.raises(SystemExit) as stop:
        command.main()
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: lm_eval: Tasks not found: hellasvag\n"
    own = str(Path(command.__file__).with_name("harness.py"))
    defect = compile("raise ValueError('a defect')", own, "exec")
    monkeypatch.setattr(program, "cli_evaluate", lambda: exec(defect))
    with pytest.raises(ValueError, match="a defect"):
        command.main()


def test_a_missing_extra_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stop:
        command.main()
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: lm_eval is not installed: pip install 'mamba-jax[lm-eval]'\n"
