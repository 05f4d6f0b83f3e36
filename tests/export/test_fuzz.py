"""Random damage to a model's files leaves the same weights, or is one short line, in little time and memory."""

import dataclasses
import json
import struct
import tempfile
import time
import tracemalloc
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save

from mamba_jax.errors import InputError
from mamba_jax.export import huggingface

GOLDEN = Path("tests/golden/mamba1_tiny").absolute()
CONFIG, INDEX, A, B = "config.json", "model.safetensors.index.json", "a.safetensors", "b.safetensors"
# What no name, shape or dtype of a tensor shows, so a changed number is another model; or the same, drawn differently.
UNSEEN = {"norm_eps", "embedding_std", "rescale_residual", "mixer"}
LIMITS: dict[str, Any] = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}

odd_values = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([0, -1, 1, 2**31, 2**63, 2**64, 10**30, 10**400]),
    st.floats(),
    st.text(max_size=20),
    st.sampled_from([A, B, "..", "/", "a\0", "\ud800", "float32", "9" * 5000, "auto", "mamba2"]),
    st.recursive(st.none(), lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(), inner, max_size=2)),
    st.just(json.loads("[" * 60 + "]" * 60)),
)


@pytest.fixture(scope="module")
def original() -> dict[str, bytes]:
    """The golden model in two files with an index."""
    tensors = load_file(GOLDEN / "model.safetensors")
    names = sorted(tensors)
    parts = {A: names[:9], B: names[9:]}
    index = {"metadata": {"total_size": 1}, "weight_map": {n: file for file, part in parts.items() for n in part}}
    files = {file: save({name: tensors[name] for name in part}, {"format": "pt"}) for file, part in parts.items()}
    return {CONFIG: (GOLDEN / CONFIG).read_bytes(), INDEX: json.dumps(index).encode(), **files}


@pytest.fixture(scope="module")
def expected() -> huggingface.LoadedModel:
    return huggingface.load(GOLDEN)


def load(files: dict[str, bytes]) -> huggingface.LoadedModel | None:
    """What the files are read as; None for one short line in little time and memory."""
    with tempfile.TemporaryDirectory() as folder:
        for name, content in files.items():
            (Path(folder) / name).write_bytes(content)
        start = time.process_time()
        tracemalloc.start()
        found, message = None, ""
        try:
            found = huggingface.load(folder)
        except InputError as error:
            message = str(error)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert message.isprintable()
        assert len(message) < 2500
        assert peak < 32 * 2**20
        assert time.process_time() - start < 5
        return found


def check(found: huggingface.LoadedModel | None, expected: huggingface.LoadedModel) -> None:
    """The weights are those of the files, and so is all of the config that they show."""
    if found is None:
        return
    jax.tree.map(np.testing.assert_array_equal, found.params, expected.params)
    for field in dataclasses.fields(expected.config):
        if field.name not in UNSEEN:
            assert getattr(found.config, field.name) == getattr(expected.config, field.name)
    for name in ("state_dim", "conv_width", "expand", "use_bias", "use_conv_bias", "use_gate", "discretization"):
        assert getattr(found.config.mixer, name) == getattr(expected.config.mixer, name)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, part in inner for place in places(part, (*path, key)))]


def put(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = put(copy[path[0]], path[1:], new)
    return copy


def header(data: bytes) -> tuple[Any, bytes]:
    (size,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def replace_values(data: st.DataObject, original: dict[str, bytes], expected: huggingface.LoadedModel) -> None:
    """Other values in a JSON object: a config, an index or the header of a tensor file."""
    name = data.draw(st.sampled_from([CONFIG, CONFIG, INDEX, A]))
    content, rest = header(original[A]) if name == A else (json.loads(original[name]), b"")
    for _ in range(data.draw(st.integers(1, 2))):
        content = put(content, data.draw(st.sampled_from(places(content))), data.draw(odd_values))
    text = json.dumps(content).encode()
    changed = struct.pack("<Q", len(text)) + text + rest if name == A else text
    found = load(original | {name: changed})
    # A header may say that a tensor lies where another of its size does: that is then what the file holds.
    if name != A:
        check(found, expected)


def damage_bytes(data: st.DataObject, original: dict[str, bytes], expected: huggingface.LoadedModel) -> None:
    """Bits that flip, and parts that are missing, doubled or foreign."""
    name = data.draw(st.sampled_from(sorted(original)))
    content = bytearray(original[name])
    # Nothing in a tensor file vouches for its values, so damage is done to what describes them.
    end = 8 + struct.unpack("<Q", content[:8])[0] if name in (A, B) else len(content)
    start = data.draw(st.integers(0, end - 1))
    stop = min(start + data.draw(st.integers(1, 40)), end)
    kind = data.draw(st.sampled_from(["flip", "cut", "remove", "double", "foreign"]))
    if kind == "flip":
        content[start] ^= 1 << data.draw(st.integers(0, 7))
    elif kind == "cut":
        del content[start:]
    elif kind == "remove":
        del content[start:stop]
    else:
        content[start:start] = content[start:stop] if kind == "double" else data.draw(st.binary(max_size=40))
    found = load(original | {name: bytes(content)})
    if name in (CONFIG, INDEX):
        check(found, expected)


@pytest.mark.parametrize("damage", [replace_values, damage_bytes])
@settings(max_examples=40, derandomize=True, **LIMITS)
@given(data=st.data())
def test_damage(data: st.DataObject, damage: Any, original: Any, expected: Any) -> None:
    damage(data, original, expected)


@pytest.mark.slow
@pytest.mark.parametrize("damage", [replace_values, damage_bytes])
@settings(max_examples=1000, **LIMITS)
@given(data=st.data())
def test_much_damage(data: st.DataObject, damage: Any, original: Any, expected: Any) -> None:
    damage(data, original, expected)


def test_the_files_themselves_are_the_model(original: dict[str, bytes], expected: huggingface.LoadedModel) -> None:
    found = load(original)
    assert found is not None
    check(found, expected)
