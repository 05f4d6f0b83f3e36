"""A model learns completions, and is measured on them alone."""

import json
from pathlib import Path

import numpy as np
import pytest

from mamba_jax.config import EvaluationConfig, FilesSource
from mamba_jax.data.pipeline import open_data
from mamba_jax.data.shards import COUNTS, TokenDataset
from mamba_jax.data.tokenizer import ByteTokenizer
from mamba_jax.evaluation.checkpoints import EvaluationRequest, evaluate_checkpoint
from tests.run.test_loop import records, run
from tests.runs import MakeConfig


def test_prompts_that_nobody_can_predict_cost_nothing(make_config: MakeConfig, tmp_path: Path) -> None:
    """Prompts are random letters, of log 26 = 3.3 nats each; what comes after the colon is always the same."""
    rng = np.random.default_rng(0)
    letters = [chr(ord("a") + number) for number in range(26)]
    lines = [{"prompt": "".join(rng.choice(letters, size=12)) + ":", "completion": "yes!"} for _ in range(200)]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    source = FilesSource(path=str(path), records="supervised")
    config = make_config(
        train=source,
        validation=source,
        num_steps=80,
        accumulation_steps=2,
        cache_dir=str(tmp_path / "cache"),
        evaluation=EvaluationConfig(every=40),
    )
    result = run(config)
    assert result.validation is not None
    assert result.validation.loss < 0.5
    dataset = open_data(source, config.data.cache_dir, ByteTokenizer())
    assert isinstance(dataset, TokenDataset)
    _, flags = dataset.read_flagged(np.array([0]), length=dataset.num_tokens)
    assert result.validation.num_tokens == np.sum(flags & COUNTS) == 200 * 5
    assert records(config.train.run_dir, "train")[80]["cross_entropy"] < 0.5
    again = evaluate_checkpoint(config.train.run_dir, EvaluationRequest())
    assert again.perplexity is not None
    assert again.perplexity.num_tokens == 1000
    assert again.perplexity.loss == pytest.approx(result.validation.loss, rel=1e-6)
