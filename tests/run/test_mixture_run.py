"""A run on a mixture resumes exactly, and tells of every part: epochs, held-out loss, curves, the result of eval.py."""

from pathlib import Path

import numpy as np
import pytest

from mamba_jax.config import EvaluationConfig, ExperimentConfig, MixturePart, MixtureSource, TextFolderSource
from mamba_jax.evaluation.checkpoints import EvaluationRequest, evaluate_checkpoint
from mamba_jax.evaluation.printed import as_json, as_text
from mamba_jax.report.page import render
from mamba_jax.report.run import read_run
from mamba_jax.run.loop import TrainResult
from tests.run.test_loop import exact, records, run
from tests.runs import MakeConfig, Signal

pytestmark = pytest.mark.usefixtures("shared_step")

Texts = tuple[MixtureSource, MixtureSource]
Finished = tuple[ExperimentConfig, TrainResult]


@pytest.fixture(scope="module")
def texts(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Texts:
    """Words, and numbers whose share grows; held out with weights 3 and 1."""
    folder = tmp_path_factory.mktemp("numbers")
    rng = np.random.default_rng(1)
    for part in ("train", "validation"):
        (folder / part).mkdir()
        (folder / part / "1.txt").write_text(" ".join(map(str, rng.integers(0, 1000, size=400))))
    words = [TextFolderSource(path=str(corpus / part)) for part in ("train", "validation")]
    numbers = [TextFolderSource(path=str(folder / part)) for part in ("train", "validation")]
    mixed = (
        MixturePart(name="words", source=words[0], weight=3.0),
        MixturePart(name="numbers", source=numbers[0], schedule=((6, 3.0),)),
    )
    held_out = (
        MixturePart(name="words", source=words[1], weight=3.0),
        MixturePart(name="numbers", source=numbers[1]),
    )
    return MixtureSource(parts=mixed), MixtureSource(parts=held_out)


@pytest.fixture(scope="module")
def finished(make_config: MakeConfig, texts: Texts) -> Finished:
    config = make_config(
        train=texts[0], validation=texts[1], num_steps=6, ema_decay=0.5, evaluation=EvaluationConfig(every=3)
    )
    return config, run(config)


def test_every_part_has_its_epochs_and_its_held_out_loss(finished: Finished) -> None:
    config, result = finished
    trained = records(config.train.run_dir, "train")
    sizes = {"words": 0, "numbers": 0}
    for part in config.data.train.parts:  # pyrefly: ignore
        length = sum(len(path.read_bytes()) + 1 for path in Path(part.source.path).iterdir())
        sizes[part.name] = (length - 1) // 24
    windows = {name: [record[f"epochs/{name}"] * size for record in trained.values()] for name, size in sizes.items()}
    for step, counts in enumerate(zip(*windows.values(), strict=True), 1):
        assert sum(counts) == pytest.approx(8 * step)
    # 3 to 1 at step 0, and 1 to 1 at step 6: 8 * sum of (3/4 - t/24) over six steps is 31.
    assert windows["words"][-1] == pytest.approx(31, abs=1.5)
    for kind in ("validation", "validation_ema"):
        words, numbers = (records(config.train.run_dir, f"{kind}/{name}") for name in sizes)
        both = records(config.train.run_dir, kind)
        assert list(words) == list(numbers) == list(both) == [3, 6]
        for step, record in both.items():
            assert words[step]["loss"] != numbers[step]["loss"]
            assert record["loss"] == pytest.approx(0.75 * words[step]["loss"] + 0.25 * numbers[step]["loss"], rel=1e-12)
            assert record["num_tokens"] == words[step]["num_tokens"] + numbers[step]["num_tokens"]
    assert result.validation is not None
    assert result.validation.loss == records(config.train.run_dir, "validation")[6]["loss"]


def test_a_run_that_is_stopped_resumes_exactly(finished: Finished, make_config: MakeConfig, texts: Texts) -> None:
    config = make_config(
        train=texts[0], validation=texts[1], num_steps=6, ema_decay=0.5, evaluation=EvaluationConfig(every=3)
    )
    assert run(config, hooks=Signal(15, at=5)).step == 5
    assert run(config).is_complete
    for kind in ("train", "validation", "validation/words", "validation/numbers", "validation_ema/numbers"):
        assert exact(config.train.run_dir, kind) == exact(finished[0].train.run_dir, kind)


def test_report_and_eval_tell_of_every_part(finished: Finished) -> None:
    config, result = finished
    page = render([read_run(Path(config.train.run_dir))])
    for label in ("held-out, words", "held-out, numbers", "held-out, averaged weights, numbers", "epochs, words"):
        assert label in page, label
    found = evaluate_checkpoint(config.train.run_dir, EvaluationRequest())
    assert list(found.parts) == ["words", "numbers"]
    assert found.perplexity is not None
    assert result.validation is not None
    assert found.perplexity.loss == pytest.approx(result.validation.loss, rel=1e-6)
    assert [text.partition("\n")[0].split()[-1] for text in as_text(found)[:2]] == ["words", "numbers"]
    assert as_json(found)[0].startswith('{"part": "words", "loss": ')
