"""An export is the same model, with the same tokenizer, to the program that most people will load it with.

`TORCH_PYTHON=/path/to/python` names the interpreter of an environment with torch and transformers; without it one is
made where that can be done.
"""

import dataclasses
import json
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mamba_jax.config import Hybrid, Mamba1Config, Mamba2Config, ModelConfig, TokenizerConfig
from mamba_jax.data.tokenizer import make_tokenizer
from mamba_jax.export import companions, huggingface
from mamba_jax.generation.generate import generate
from mamba_jax.generation.sampling import SamplingConfig
from mamba_jax.models import parameters
from mamba_jax.models.mixers import (
    AttentionConfig,
    MlpConfig,
    MoeConfig,
    RGLRUConfig,
    SharedBlockConfig,
    WithSharedConfig,
)
from tests.export.torch_environment import environment, torch_python

__all__ = ["torch_python"]

pytestmark = pytest.mark.slow
TEXTS = [
    "plain text",
    " lead and  two ",
    "naïve Füße, 漢字, 🐍\r\n\t\0",
    "<|endoftext|> is only text [SEP] <s>",
    "don't walk .  They , run ?",
    "a" * 300,
]
PROMPTS = ["A prompt", "a longer prompt, of other length"]


def export(folder: Path, config: ModelConfig, params: parameters.Params, tokenizer: TokenizerConfig) -> None:
    huggingface.save(
        folder,
        config,
        params,
        layout="hf",
        extra=companions.special_tokens(tokenizer),
        companions=companions.written(tokenizer, config, layout="hf"),
    )


ATTENTION = AttentionConfig(num_heads=4, num_kv_heads=2)
JAMBA_MAMBA = Mamba1Config(selection_norm_eps=1e-5, selection_norm_weights=True)
ZAMBA_MAMBA = Mamba2Config(dt_lower_limit=0.001)


def _with_shared(name: str) -> WithSharedConfig:
    attention = dataclasses.replace(ATTENTION, head_dim=32, softmax_scale=0.25)
    shared = SharedBlockConfig(name=name, attention=attention, mlp=MlpConfig(activation="gelu"))
    return WithSharedConfig(inner=ZAMBA_MAMBA, shared=shared, adapter_rank=4)


MODELS = {
    "mamba": {"mixer": Mamba1Config()},
    "falcon_mamba": {"mixer": Mamba1Config(selection_norm_eps=1e-6)},
    "mamba2": {"mixer": Mamba2Config()},
    "llama": {"num_layers": 6, "mixer": Hybrid.of_pattern("(AF)*3", A=ATTENTION, F=MlpConfig())},
    "bamba": {
        "num_layers": 6,
        "mixer": Hybrid.of_pattern(
            "MFAFMF", M=Mamba2Config(), A=dataclasses.replace(ATTENTION, rotary_dims=8), F=MlpConfig()
        ),
    },
    "bamba with wide heads": {
        "num_layers": 4,
        "mixer": Hybrid.of_pattern(
            "MFAF", M=Mamba2Config(num_groups=2), A=dataclasses.replace(ATTENTION, head_dim=32), F=MlpConfig()
        ),
    },
    "jamba": {
        "num_layers": 8,
        "mixer": Hybrid.of_pattern(
            "MFMEAFME",
            M=JAMBA_MAMBA,
            A=dataclasses.replace(ATTENTION, rotary_dims=0),
            F=MlpConfig(),
            E=MoeConfig(num_experts=4),
        ),
    },
    # Two shared blocks, in turn.
    "zamba2": {
        "num_layers": 6,
        "mixer": Hybrid.of_pattern("MSMTMS", M=ZAMBA_MAMBA, S=_with_shared("block_0"), T=_with_shared("block_1")),
    },
    "nemotron_h": {
        "mixer": Hybrid.of_pattern(
            "MFMAF",
            M=Mamba2Config(inner_dim=192, num_groups=3),
            A=AttentionConfig(rotary_dims=0),
            F=MlpConfig(activation="relu_squared", gated=False),
        )
    },
    "recurrent_gemma": {
        "num_layers": 6,
        "mixer": Hybrid.of_pattern(
            "RFRFAF",
            R=RGLRUConfig(num_heads=8),
            A=AttentionConfig(num_kv_heads=1, window=16, rotary_dims=4, use_output_bias=True),
            F=MlpConfig(activation="gelu_tanh", use_bias=True),
        ),
        "norm_offset": 1.0,
        "embedding_scale": 8.0,
        "logit_cap": 30.0,
    },
}


@pytest.fixture(scope="module", params=MODELS)
def theirs(
    request: pytest.FixtureRequest,
    torch_python: str,
    tokenizer_configs: dict[str, TokenizerConfig],
    tmp_path_factory: pytest.TempPathFactory,
) -> SimpleNamespace:
    """A model of the default config, trained as far as random numbers are, and what `transformers` makes of it."""
    folder = tmp_path_factory.mktemp("exports")
    fields: dict[str, Any] = {"vocab_size": 257, "d_model": 64, "num_layers": 5} | MODELS[request.param]
    config = ModelConfig(**fields)
    params = parameters.init(config, jax.random.key(0))
    for stack in config.stacks:
        for projection in params[stack.name]["mixer"].keys() & {"out_proj", "down_proj"}:
            params[stack.name]["mixer"][projection]["kernel"] *= 5.0
        if "adapter_up" in params[stack.name]["mixer"]:
            # A fresh one is zero.
            kernel = params[stack.name]["mixer"]["adapter_up"]["kernel"]
            params[stack.name]["mixer"]["adapter_up"]["kernel"] = jax.random.normal(jax.random.key(1), kernel.shape)
    export(folder / "model", config, params, TokenizerConfig())
    tokenizers = {}
    for name, tokenizer in tokenizer_configs.items():
        tiny = ModelConfig(vocab_size=make_tokenizer(tokenizer).vocab_size, d_model=8, num_layers=1)
        tokenizers[name] = str(folder / name)
        export(folder / name, tiny, parameters.init(tiny, jax.random.key(0)), tokenizer)
    ids = np.random.default_rng(0).integers(0, 257, (2, 50))
    job = {
        "model": str(folder / "model"),
        "ids": ids.tolist(),
        "prompts": PROMPTS,
        "tokenizers": tokenizers,
        "texts": TEXTS,
    }
    (folder / "job.json").write_text(json.dumps(job))
    worker = Path(__file__).with_name("transformers_worker.py")
    subprocess.run([torch_python, str(worker), str(folder / "job.json")], env=environment(), check=True)
    answers = json.loads((folder / "answers.json").read_text())
    return SimpleNamespace(folder=folder, params=params, ids=ids, logits=np.load(folder / "logits.npy"), **answers)


def test_logits(theirs: SimpleNamespace) -> None:
    loaded = huggingface.load(theirs.folder / "model")
    assert loaded.config.compute_dtype == "float32"
    definition = parameters.define(loaded.config)
    ours = jax.jit(lambda params: definition.merge(params)(jnp.asarray(theirs.ids)).logits)(theirs.params)
    # Both are float32: five layers of some twenty roundings of 6e-8 each, on logits that reach ten.
    np.testing.assert_allclose(theirs.logits, ours, rtol=0, atol=1e-4 * np.abs(ours).max())


def test_greedy_continuation_of_a_padded_batch(theirs: SimpleNamespace) -> None:
    config = dataclasses.replace(huggingface.load(theirs.folder / "model").config, vocab_size=257, vocab_multiple=8)
    for prompt, tokens in zip(PROMPTS, theirs.tokens, strict=True):
        ours = generate(
            parameters.define(config),
            theirs.params,
            jnp.asarray([list(prompt.encode())], jnp.int32),
            num_tokens=12,
            key=jax.random.key(0),
            sampling=SamplingConfig(temperature=0.0),
        )
        ended = np.flatnonzero(np.asarray(ours)[0] == 256)
        count = ended[0] + 1 if ended.size else 12
        assert tokens[:count] == ours[0, :count].tolist()


def test_ids_and_texts(theirs: SimpleNamespace, tokenizer_configs: dict[str, TokenizerConfig]) -> None:
    for name, config in tokenizer_configs.items():
        ours, answer = make_tokenizer(config), theirs.tokenizers[name]
        expected = ours.encode_batch(TEXTS)
        assert answer["ids"] == [ids.tolist() for ids in expected], name
        assert answer["texts"] == [ours.decode(ids) for ids in expected], name
        assert answer["special"] == [ours.end_of_document] * 3, name
        assert answer["size"] == ours.vocab_size, name
