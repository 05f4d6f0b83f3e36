"""Folders that someone else wrote: one short line in little time and memory, whatever is in them."""

import json
import os
import shutil
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mamba_jax.errors import InputError
from mamba_jax.export import huggingface
from mamba_jax.export.load import load_model

GOLDEN = Path("tests/golden/mamba1_tiny")
D = "backbone.layers.0.mixer.D"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The golden model in two files with an index."""
    path = tmp_path / "model"
    path.mkdir()
    shutil.copy(GOLDEN / "config.json", path)
    tensors = load_file(GOLDEN / "model.safetensors")
    names = sorted(tensors)
    files = {"a.safetensors": names[:9], "b.safetensors": names[9:]}
    for file, members in files.items():
        save_file({name: tensors[name] for name in members}, path / file)
    set_index(path, {name: file for file, members in files.items() for name in members})
    return path


def set_index(folder: Path, weight_map: object) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def change_index(**changes: object) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
        set_index(folder, index | changes)

    return change


def change_config(**changes: object) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        content = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(content | changes))

    return change


def change_tensor(value: Callable[[np.ndarray], np.ndarray], name: str = D) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        for path in folder.glob("?.safetensors"):
            tensors = load_file(path)
            if name in tensors:
                save_file(tensors | {name: value(tensors[name])}, path)

    return change


def change_header(**entry: object) -> Callable[[Path], object]:
    """Changes what a file says about its first tensor, and leaves the rest of it alone."""

    def change(folder: Path) -> None:
        data = (folder / "a.safetensors").read_bytes()
        (size,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + size])
        header[D] |= entry
        text = json.dumps(header).encode()
        (folder / "a.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])

    return change


def write(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content)


def replace(name: str, make: Callable[[Path], object]) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return change


def spoiled(count: int, value: float) -> Callable[[np.ndarray], np.ndarray]:
    return lambda array: np.concatenate([np.full(count, value, array.dtype), array[count:]])


A, B, INDEX = "a.safetensors", "b.safetensors", "model.safetensors.index.json"
HOSTILE: dict[str, tuple[Callable[[Path], object], str]] = {
    "layers 1e9": (change_config(num_hidden_layers=10**9), "1000000000 layers, but only 22 tensors"),
    "layers 1e400": (
        change_config(num_hidden_layers=10**400),
        "ModelConfig.num_layers must stay below 2**32, got more",
    ),
    "rows 1e9": (change_config(vocab_size=10**9), "has shape (96, 32), expected (1000000000, 32)"),
    "rows 1e400": (change_config(vocab_size=10**400), "100000000000000"),
    "width 1e30": (change_config(hidden_size=10**30, intermediate_size=2 * 10**30), "d_model must stay below 2**32"),
    "states 1e12": (change_config(state_size=10**12), "state_dim must stay below 2**32, got more"),
    "taps 1e12": (change_config(conv_kernel=10**12), "conv_width must stay below 2**32, got more"),
    "rank 1e300": (change_config(time_step_rank=10**300), "dt_rank must stay below 2**32, got more"),
    "digits": (write("config.json", b'{"vocab_size": ' + b"9" * 5000 + b"}"), "config.json is not JSON"),
    "NaN for a number": (change_config(layer_norm_epsilon=float("nan")), "norm_eps: Input should be a finite number"),
    "deep config": (write("config.json", b"[" * 10**5), "config.json is not JSON that can be read: it is nested"),
    "deep value": (
        change_config(hidden_act=json.loads("[" * 300 + "]" * 300)),
        "hidden_act=[[[...]]] is not supported",
    ),
    "long value": (change_config(hidden_size="9" * 10**6), "d_model: Input should be a valid integer"),
    "empty config": (write("config.json", b""), "config.json is not JSON"),
    "binary config": (write("config.json", bytes(range(256))), "config.json is not JSON"),
    "huge config": (replace("config.json", lambda p: os.truncate(p.touch() or p, 2**40)), "expected at most 16777216"),
    "config is a folder": (replace("config.json", Path.mkdir), "config.json is a folder, expected a file"),
    "config is a pipe": (replace("config.json", os.mkfifo), "config.json is a pipe, expected a file"),
    "config is a device": (replace("config.json", lambda p: p.symlink_to("/dev/zero")), "is a device, expected a file"),
    "config is a dangling link": (
        replace("config.json", lambda p: p.symlink_to("/nowhere/x")),
        "config.json is a link to /nowhere/x, which does not exist",
    ),
    "config is a loop": (replace("config.json", lambda p: p.symlink_to(p)), "cannot read"),
    "weights are a pipe": (replace(A, os.mkfifo), "a.safetensors is a pipe, expected a file"),
    "weights are a folder": (replace(A, Path.mkdir), "a.safetensors is a folder, expected a file"),
    "weights are a dangling link": (replace(A, lambda p: p.symlink_to("b")), "a.safetensors is a link to b, which"),
    "weights are missing": (replace(A, lambda p: None), "a.safetensors is missing although the index names it"),
    "weights are empty": (write(A, b""), "a.safetensors is damaged"),
    "weights are text": (write(A, b"version https://git-lfs.github.com/spec/v1\n"), "a.safetensors is damaged"),
    "header of 2**63 bytes": (write(A, struct.pack("<Q", 2**63) + b"{}"), "a header of 9223372036854775808 bytes"),
    "header past the end": (write(A, struct.pack("<Q", 5000) + b"{}"), "a.safetensors is damaged"),
    "deep header": (write(A, struct.pack("<Q", 10**5) + b'{"a":' * 20000), "a.safetensors is damaged"),
    "offsets past the end": (change_header(data_offsets=[0, 2**40]), "a.safetensors is damaged"),
    "shape past the end": (change_header(shape=[2**62]), "a.safetensors is damaged"),
    "eight bits": (change_header(dtype="F8_E4M3", shape=[256]), f"{D} has shape (256,), expected (64,)"),
    "eight bits of the right shape": (
        change_tensor(lambda array: array.astype(np.int8)),
        f"{D} has dtype int8, expected float32 or bfloat16 or float16",
    ),
    "four bits": (change_header(dtype="F4", shape=[512]), f"{D} has shape (512,), expected (64,)"),
    "unknown dtype": (change_header(dtype="F3"), "a.safetensors is damaged"),
    "double precision": (change_tensor(lambda array: array.astype(np.float64)), f"{D} has dtype float64, expected"),
    "not a number": (change_tensor(spoiled(3, np.nan)), f"{D} has 3 values of 64 that are not finite"),
    "infinite": (change_tensor(spoiled(1, -np.inf)), f"{D} has 1 values of 64 that are not finite"),
    "index of a list": (lambda folder: set_index(folder, ["a.safetensors"]), "has no 'weight_map'"),
    "index with a list": (change_index(x=["a.safetensors"]), "has no 'weight_map'"),
    "index with a number": (change_index(x=10**400), "has no 'weight_map'"),
    "index with a folder": (change_index(x=".."), "has no 'weight_map'"),
    "index with nothing": (change_index(x=""), "has no 'weight_map'"),
    "index out of the folder": (change_index(x="/etc/passwd"), "has no 'weight_map'"),
    "index with a zero byte": (change_index(x="a\0b"), "has no 'weight_map'"),
    "index with half a character": (change_index(x="\ud800"), "has no 'weight_map'"),
    "index with a long name": (change_index(x="x" * 300), "has no 'weight_map'"),
    "index with a line break": (change_index(x="a\nb"), "a b is missing although the index names it"),
    "index of the wrong file": (change_index(**{D: B}), f"looks for '{D}' in b.safetensors, but a.safetensors holds"),
    "two files with a tensor": (lambda folder: shutil.copy(folder / A, folder / B), "two files of the index"),
    "index is a pipe": (replace(INDEX, os.mkfifo), "is a pipe, expected a file"),
    "index is deep": (write(INDEX, b'{"weight_map":' * 5000), "nested too deeply"),
}


def check_one_short_line(folder: Path, expected: str) -> None:
    """The folder is refused with this in the message, in little memory."""
    tracemalloc.start()
    with pytest.raises(InputError) as error:
        huggingface.load(folder)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert expected in str(error.value)
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 2500
    assert peak < 32 * 2**20


@pytest.mark.parametrize("kind", HOSTILE)
def test_one_short_line(folder: Path, kind: str) -> None:
    change, expected = HOSTILE[kind]
    change(folder)
    check_one_short_line(folder, expected)


HYBRIDS: list[tuple[str, dict[str, object], str]] = [
    ("jamba_tiny", {"num_hidden_layers": 300}, "600 layers, but only 56 tensors"),
    (
        "jamba_tiny",
        {"num_hidden_layers": 10**9},
        "num_hidden_layers=1000000000 is not a number of layers from 1 to 1000",
    ),
    ("jamba_tiny", {"num_experts": 10**9}, "1000000000 experts, but only 56 tensors"),
    ("jamba_tiny", {"num_experts": [4]}, "num_experts=[4] is not a number of experts"),
    ("jamba_tiny", {"attn_layer_period": 10**400}, "is not a number of layers from 1 to"),
    ("bamba_tiny", {"attn_layer_indices": list(range(10**5))}, "is not a list of layers from 0 to 2"),
    ("llama_tiny", {"num_hidden_layers": 300}, "600 layers, but only 20 tensors"),
]


@pytest.mark.parametrize(("name", "changes", "expected"), HYBRIDS, ids=lambda value: str(value)[:40])
def test_one_short_line_for_hybrids(tmp_path: Path, name: str, changes: dict[str, object], expected: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(GOLDEN.parent / name, folder)
    change_config(**changes)(folder)
    check_one_short_line(folder, expected)


def test_many_missing_and_unexpected_tensors_are_counted(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()
    shutil.copy(GOLDEN / "config.json", folder)
    names = ["line\nbreak", "long" * 1000, *(f"tensor{i}" for i in range(1000))]
    save_file({name: np.zeros(1, np.float32) for name in names}, folder / "model.safetensors")
    with pytest.raises(InputError, match=r"missing backbone\.layers\.1\.norm\.weight.*; and 1014 more$") as error:
        huggingface.load(folder)
    assert len(str(error.value)) < 1000


def test_links_and_odd_names_are_followed(folder: Path) -> None:
    expected = huggingface.load(GOLDEN).params
    for name in ("line\nbreak", os.fsdecode(b"not utf-8 \xff"), "spaces and 🐍"):
        target = folder.with_name(name)
        folder.rename(target)
        folder.symlink_to(target)
        for path in (target, folder):
            jax.tree.map(np.testing.assert_array_equal, load_model(path).params, expected)
        (target / B).rename(target / "blob")
        (target / B).symlink_to("blob")
        jax.tree.map(np.testing.assert_array_equal, load_model(folder).params, expected)
        (target / B).unlink()
        with pytest.raises(InputError, match="is missing although the index names it") as error:
            load_model(target)
        assert str(error.value).isprintable()
        (target / "blob").rename(target / B)
        folder.unlink()
        target.rename(folder)


def test_weights_larger_than_memory_are_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def empty(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(np, "empty", empty)
    with pytest.raises(InputError, match="does not fit the memory of this machine"):
        huggingface.load(folder)
