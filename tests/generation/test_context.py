"""A context that was kept goes on as if it had never been put away, with its own model and no other."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from mamba_jax.config import AttentionConfig, Mamba1Config, Mamba2Config, ModelConfig
from mamba_jax.errors import InputError
from mamba_jax.export import huggingface
from mamba_jax.generation.context import Context, fingerprint_of, load_context, save_context
from mamba_jax.generation.decoder import Decoder, Prefilled
from mamba_jax.generation.engine import Engine, Request
from mamba_jax.generation.sampling import Sampling, SamplingConfig
from mamba_jax.models import parameters
from mamba_jax.models.config import Hybrid
from mamba_jax.models.state import taken_rows

BASE = ModelConfig(
    vocab_size=29, d_model=16, num_layers=2, mixer=Mamba1Config(state_dim=4), embedding_std=1.0, compute_dtype="float32"
)
MIXERS = {
    "mamba1": BASE.mixer,
    "hybrid": Hybrid.of_pattern("AM", A=AttentionConfig(num_heads=2), M=Mamba2Config(state_dim=4, head_dim=8)),
}
RING = Mamba2Config(state_dim=4, head_dim=8, step_implementation="xla", step_ring=4)
PROMPT = np.arange(3, 12, dtype=np.int32)
NEXT = np.asarray([[5], [7]], np.int32)


def _decoder(kind: str, **options: Any) -> Decoder:
    config = dataclasses.replace(BASE, mixer=MIXERS[kind])
    params = jax.jit(parameters.init, static_argnums=0)(config, jax.random.key(0))
    return Decoder(parameters.define(config), params, max_length=options.pop("max_length", 16), **options)


@pytest.fixture(scope="module", params=list(MIXERS))
def kept(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Decoder, Context, Path]:
    """A model, what it knows after a prompt, and the file where this is kept."""
    decoder = _decoder(request.param)
    read = decoder.prefill(PROMPT[None])
    context = Context(tokens=PROMPT, logits=read.logits[0], state=read.state)
    path = tmp_path_factory.mktemp("kept") / "context.safetensors"
    save_context(path, context, decoder.definition, fingerprint_of(decoder.definition, decoder.params))
    return decoder, context, path


def _loaded(decoder: Decoder, path: Path, **options: Any) -> Context:
    weights = fingerprint_of(decoder.definition, decoder.params)
    options.setdefault("max_length", decoder.max_length)
    return load_context(path, decoder.definition, weights, **options)


def test_what_was_kept_goes_on_as_if_never_put_away(kept: tuple[Decoder, Context, Path]) -> None:
    decoder, context, path = kept
    again = Decoder(decoder.definition, decoder.params, max_length=decoder.max_length)
    found = _loaded(again, path)
    np.testing.assert_array_equal(found.tokens, PROMPT)
    jax.tree.map(np.testing.assert_array_equal, (found.logits, found.state), (context.logits, context.state))
    ours, expected = found.state, context.state
    for token in NEXT[:, :1]:
        went_on, never_stopped = again.extend(ours, token[None]), decoder.extend(expected, token[None])
        jax.tree.map(np.testing.assert_array_equal, went_on, never_stopped)
        assert np.isfinite(went_on.logits).all()
        ours, expected = went_on.state, never_stopped.state


GOLDEN = Path("tests/golden")


@pytest.mark.parametrize("name", ["mamba1_tiny", "bamba_tiny"])
def test_what_was_kept_on_another_machine_goes_on(name: str) -> None:
    """The files were written once, on an AMD EPYC; the text that follows is that of an independent implementation."""
    loaded = huggingface.load(GOLDEN / name)
    definition = parameters.define(dataclasses.replace(loaded.config, compute_dtype="float32"))
    decoder = Decoder(definition, loaded.params, max_length=64)
    found = _loaded(decoder, GOLDEN / "contexts" / f"{name}.safetensors")
    expected = safetensors.numpy.load_file(GOLDEN / name / "expected.safetensors")["greedy_from_13"][0]
    np.testing.assert_array_equal(found.tokens, expected[:13])
    begin, going_on = Prefilled(logits=found.logits[None], state=found.state), SamplingConfig(temperature=0.0)
    request = Request(tokens=[], num_tokens=8, sampling=going_on, start=begin, history=found.tokens.tolist())
    tokens = [token for progress in Engine(decoder, rows=1).run([request]) for token in progress.tokens]
    np.testing.assert_array_equal(tokens, expected[13:21])


def test_a_field_that_came_later_has_its_default(kept: tuple[Decoder, Context, Path], tmp_path: Path) -> None:
    decoder, _, path = kept
    with safetensors.safe_open(path, framework="np") as file:
        model = json.loads(file.metadata()["model"])
    del model["logit_cap"]
    found = _loaded(decoder, _changed(path, tmp_path / "older", header={"model": json.dumps(model)}))
    np.testing.assert_array_equal(found.tokens, PROMPT)
    model["of_tomorrow"] = 1
    with pytest.raises(InputError, match=r"which model it is of \(.*unknown key 'of_tomorrow'"):
        _loaded(decoder, _changed(path, tmp_path / "newer", header={"model": json.dumps(model)}))


def test_forks_do_not_disturb_each_other(kept: tuple[Decoder, Context, Path]) -> None:
    decoder, context, path = kept
    config, before = decoder.definition.config, jax.tree.map(np.array, context.state)
    apart = [decoder.extend(context.state, token[None]) for token in NEXT]
    jax.tree.map(np.testing.assert_array_equal, context.state, before)
    together = decoder.extend(taken_rows(config, _loaded(decoder, path).state, jnp.zeros(2, jnp.int32)), NEXT)
    for row, alone in enumerate(apart):
        # The order of sums may depend on the number of rows: some ten roundings of numbers of order 1.
        np.testing.assert_allclose(together.logits[row], alone.logits[0], rtol=2.0**-20, atol=2.0**-20)
    assert np.abs(apart[0].logits - apart[1].logits).max() > 0.01


def test_room_and_dtype_are_those_of_the_decoder_that_goes_on(kept: tuple[Decoder, Context, Path]) -> None:
    decoder, context, path = kept
    larger = _loaded(decoder, path, max_length=40)
    expected = decoder.extend(context.state, NEXT[:1]).logits
    np.testing.assert_allclose(decoder.extend(larger.state, NEXT[:1]).logits, expected, rtol=2.0**-20, atol=2.0**-20)
    rounded = _loaded(decoder, path, state_dtype="bfloat16")

    def check(ours: jax.Array, theirs: jax.Array) -> None:
        assert ours.dtype == (jnp.bfloat16 if theirs.dtype == jnp.float32 else theirs.dtype)
        np.testing.assert_array_equal(ours, theirs.astype(ours.dtype))

    jax.tree.map(check, rounded.state, context.state)
    other = path.with_name("rounded.safetensors")
    save_context(other, rounded, decoder.definition, fingerprint_of(decoder.definition, decoder.params))
    exact = _loaded(decoder, other)
    jax.tree.map(
        lambda ours, theirs: np.testing.assert_array_equal(ours, theirs.astype(ours.dtype)), exact.state, rounded.state
    )
    assert {leaf.dtype.name for leaf in jax.tree.leaves(exact.state)} <= {"float32", "int32"}


def test_a_fingerprint_tells_values_and_nothing_else() -> None:
    definition = parameters.define(dataclasses.replace(BASE, mixer=MIXERS["hybrid"]))
    params = jax.jit(parameters.init, static_argnums=0)(definition.config, jax.random.key(0))
    rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    widened = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), rounded)
    found = fingerprint_of(definition, params)
    assert found == fingerprint_of(definition, definition.unstacked(params)) != fingerprint_of(definition, rounded)
    assert fingerprint_of(definition, rounded) == fingerprint_of(definition, widened)
    table = params["embedding"]["table"]
    changed = {**params, "embedding": {"table": table.at[3, 4].set(jnp.nextafter(table[3, 4], 9.0))}}
    assert fingerprint_of(definition, changed) != found


def _changed(path: Path, target: Path, *, header: dict[str, str] | None = None, **arrays: np.ndarray) -> Path:
    """A copy of a file with other entries in the header, and other arrays."""
    with safetensors.safe_open(path, framework="np") as file:
        metadata = {**file.metadata(), **(header or {})}
    safetensors.numpy.save_file({**safetensors.numpy.load_file(path), **arrays}, target, metadata=metadata)
    return target


def test_damage_is_told_in_a_line(kept: tuple[Decoder, Context, Path], tmp_path: Path) -> None:
    decoder, _, path = kept
    arrays, other = safetensors.numpy.load_file(path), tmp_path / "other"
    name = max(name for name in arrays if name.startswith("state/") and arrays[name].dtype == np.float32)
    bad = arrays[name].copy()
    bad[(0,) * bad.ndim] = np.nan
    cases: dict[str, bytes | Path] = {
        r"no file .*nowhere": tmp_path / "nowhere",
        r"other is damaged or not a safetensors file": path.read_bytes()[:-5],
        r"other is damaged or not a safetensors file \(": b"",
        r"holds no kept context": safetensors.numpy.save({"tokens": PROMPT}),
    }
    for message, content in cases.items():
        if isinstance(content, bytes):
            other.write_bytes(content)
        with pytest.raises(InputError, match=message):
            _loaded(decoder, other if isinstance(content, bytes) else content)
    changes: dict[str, dict[str, Any]] = {
        r"of version '2' of its format": {"header": {"version": "2"}},
        r"does not say which model": {"header": {"model": "[]"}},
        r"does not say which model it": {"header": {"model": "[" * 100_000}},
        r"does not say how its state": {"header": {"rings": '{"state/layers_0/keys": [0, 1e99]}'}},
        r"damaged \(it does not say how": {"header": {"rings": "[" * 100_000}},
        rf"{name} is not finite": {name: bad},
        r"differ from their checksum": {name: np.zeros_like(bad)},
        rf"{name} is float32\[1\], expected": {name: np.zeros(1, np.float32)},
        r"'state/odd' is one too many": {"state/odd": bad},
        r"tokens is float32\[9\], expected int32": {"tokens": PROMPT.astype(np.float32)},
        r"logits is float32\[3\], expected float32\[32\]": {"logits": np.zeros(3, np.float32)},
    }
    for message, change in changes.items():
        with pytest.raises(InputError, match=message):
            _loaded(decoder, _changed(path, other, **change))


def test_another_model_is_refused(kept: tuple[Decoder, Context, Path]) -> None:
    decoder, _, path = kept
    config, weights = decoder.definition.config, fingerprint_of(decoder.definition, decoder.params)
    other = parameters.define(dataclasses.replace(config, norm_eps=1e-3))
    with pytest.raises(InputError, match=r"another model: model.norm_eps was 1e-05, here 0.001; use"):
        load_context(path, other, weights, max_length=16)
    with pytest.raises(InputError, match=rf"other weights .*\(fingerprint '{weights}', here 'abc'\)"):
        load_context(path, decoder.definition, "abc", max_length=16)
    same = parameters.define(dataclasses.replace(config, remat="none", compute_dtype="bfloat16"))
    load_context(path, same, weights, max_length=16)


def test_too_little_room_is_refused(kept: tuple[Decoder, Context, Path]) -> None:
    decoder, _, path = kept
    with pytest.raises(InputError, match=r"has 9 tokens, but max_length is 8"):
        _loaded(decoder, path, max_length=8)
    if decoder.definition.config.mixer == MIXERS["hybrid"]:
        with pytest.raises(InputError, match=r"has room for 16 tokens, but max_length is 10: load it with at least 16"):
            _loaded(decoder, path, max_length=10)


def test_what_cannot_be_written_leaves_the_old_file(kept: tuple[Decoder, Context, Path], tmp_path: Path) -> None:
    decoder, context, path = kept
    before = path.read_bytes()
    save = {"definition": decoder.definition, "weights_fingerprint": "abc"}
    with pytest.raises(InputError, match=r"cannot write .*nowhere"):
        save_context(tmp_path / "nowhere" / "file", context, **save)
    with pytest.raises(InputError, match=r"cannot write"):
        save_context(tmp_path, context, **save)
    with pytest.raises(InputError, match=r"the context: logits is not finite"):
        save_context(path, dataclasses.replace(context, logits=context.logits * np.nan), **save)
    two = taken_rows(decoder.definition.config, context.state, jnp.zeros(2, jnp.int32))
    with pytest.raises(InputError, match=r"a context is of one row, but state/.* has 2"):
        save_context(path, dataclasses.replace(context, state=two), **save)
    assert path.read_bytes() == before
    assert {file.name for file in path.parent.iterdir()} <= {path.name, "rounded.safetensors"}


def test_slots_that_were_not_written_are_not_stored(kept: tuple[Decoder, Context, Path]) -> None:
    decoder, _, path = kept
    if decoder.definition.config.mixer == MIXERS["hybrid"]:
        assert safetensors.numpy.load_file(path)["state/layers_0/keys"].shape == (1, len(PROMPT), 2, 8)


def test_names_can_be_read(kept: tuple[Decoder, Context, Path]) -> None:
    decoder, _, path = kept
    names = safetensors.numpy.load_file(path).keys()
    expected = "state/layers/ssm" if decoder.definition.config.mixer == MIXERS["mamba1"] else "state/layers_0/keys"
    assert {"tokens", "logits", expected} <= names
    with safetensors.safe_open(path, framework="np") as file:
        assert json.loads(file.metadata()["model"])["d_model"] == 16


def test_a_ring_of_inputs_is_settled_before_it_is_kept(tmp_path: Path) -> None:
    config = dataclasses.replace(BASE, mixer=RING)
    params = jax.jit(parameters.init, static_argnums=0)(config, jax.random.key(0))
    ring = Decoder(parameters.define(config), params)
    plain = Decoder(
        parameters.define(dataclasses.replace(config, mixer=dataclasses.replace(RING, step_ring=0))), params
    )
    read = ring.prefill(PROMPT[None])
    step = ring.step(read.state, NEXT[0, :1], Sampling.of([SamplingConfig()]), jax.random.key(0))
    path, weights = tmp_path / "context.safetensors", fingerprint_of(ring.definition, ring.params)
    context = Context(tokens=PROMPT, logits=read.logits[0], state=step.state)
    with pytest.raises(InputError, match="one between single tokens: read its last token with `extend`"):
        save_context(path, context, ring.definition, weights)
    extended = ring.extend(step.state, NEXT[1:])
    save_context(path, dataclasses.replace(context, state=extended.state), ring.definition, weights)
    expected = plain.extend(plain.prefill(np.append(PROMPT, NEXT[:, 0])[None]).state, PROMPT[None, :1])
    for decoder in (ring, plain):
        found = decoder.extend(_loaded(decoder, path).state, PROMPT[None, :1])
        np.testing.assert_allclose(found.logits, expected.logits, rtol=0, atol=1e-5)
