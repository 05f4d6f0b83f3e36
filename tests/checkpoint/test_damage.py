"""Files of a checkpoint damaged at random: right arrays come back, of this step or of the one before."""

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from mamba_jax.checkpoint import Checkpointer, load_params
from mamba_jax.config import MeshConfig
from mamba_jax.errors import InputError
from tests.checkpoint.test_checkpointer import CONFIG, abstract, mesh_of, random_state, save


def save_twice(run_dir: Path, mesh: MeshConfig) -> Path:
    """A run directory with checkpoints of steps 3 and 7."""
    for step in (3, 7):
        save(run_dir, random_state(mesh_of(mesh), step=step))
    return run_dir


@pytest.fixture(scope="module")
def expected() -> dict[int, dict[str, Any]]:
    return {step: random_state(mesh_of(MeshConfig(data=1)), step=step).items() for step in (3, 7)}


def flip_bits(path: Path, draw: random.Random) -> None:
    content = bytearray(path.read_bytes())
    for _ in range(draw.choice([1, 1, 1, 8])):
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def cut(path: Path, draw: random.Random) -> None:
    path.write_bytes(path.read_bytes()[: draw.randrange(path.stat().st_size)])


def scramble(path: Path, draw: random.Random) -> None:
    path.write_bytes(draw.randbytes(draw.choice([0, 1, 100, path.stat().st_size])))


def append(path: Path, draw: random.Random) -> None:
    path.write_bytes(path.read_bytes() + draw.randbytes(10))


def write_json(path: Path, draw: random.Random) -> None:
    texts = [
        "[" * 100_000,
        '{"a":' * 100_000,
        "{}",
        "[]",
        "null",
        '"text"',
        "9" * 10_000,
        "[1e999]",
        "{}" * 2,
        "\ud800",
    ]
    path.write_text(draw.choice(texts), errors="surrogatepass")


def change_json(path: Path, draw: random.Random) -> None:
    """Gives one value of a JSON file, at any depth, another type."""
    try:
        content = node = json.loads(path.read_text())
    except ValueError:
        return
    while isinstance(node, dict) and node:
        key = draw.choice(list(node))
        if not isinstance(node[key], dict) or not node[key] or draw.random() < 0.2:
            node[key] = draw.choice([None, -1, 10**400, 0.5, "x", [], {}, [[1]]])
            break
        node = node[key]
    path.write_text(json.dumps(content))


def swap(path: Path, draw: random.Random) -> None:
    """The content of another file of this step or of the other."""
    files = [other for other in path.parents[0].parent.rglob("*") if other.is_file()]
    path.write_bytes(draw.choice(files).read_bytes())


def replace(path: Path, draw: random.Random) -> None:
    """Something that is not a file, and that reading must not wait for."""
    path.unlink()
    kind = draw.choice(["nothing", "pipe", "folder", "link to nothing", "link to itself", "link to a folder", "device"])
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind != "nothing":
        targets = {"link to nothing": "nowhere", "link to itself": path, "link to a folder": "/", "device": "/dev/zero"}
        path.symlink_to(targets[kind])


def lose_folder(path: Path, draw: random.Random) -> None:
    shutil.rmtree(path.parent)
    if draw.random() < 0.5:
        path.parent.mkdir()


DAMAGES: list[Callable[[Path, random.Random], None]] = [
    *(flip_bits, flip_bits, flip_bits, cut, scramble, append),
    *(write_json, change_json, change_json, swap, replace, replace, lose_folder),
]


def check_damage(seed: int, twice: Path, run_dir: Path, expected: dict[int, dict[str, Any]]) -> str:
    """Damages step 7 as the seed says, and reads it as a start and as an evaluation do."""
    draw = random.Random(seed)
    shutil.copytree(twice / "checkpoints", run_dir / "checkpoints")
    files = sorted(path for path in (run_dir / "checkpoints" / "7").rglob("*") if path.is_file())
    damage, path = draw.choice(DAMAGES), draw.choice(files)
    told = f"seed {seed}: {damage.__name__} of {path.relative_to(run_dir)}"
    damage(path, draw)
    loaded, refusal = None, ""
    try:
        loaded = load_params(run_dir)
    except InputError as error:
        refusal = str(error)
    assert "\n" not in refusal, told
    if loaded is not None:
        assert loaded.step == 7, told
        assert loaded.config == CONFIG, told
        jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b, told), loaded.params, expected[7]["params"])
    events: list[tuple[str, dict[str, Any]]] = []
    checkpointer = Checkpointer(run_dir, CONFIG.checkpoint, on_event=lambda name, **rest: events.append((name, rest)))
    found = checkpointer.restore_newest(abstract(mesh_of(MeshConfig(data=1))).items())
    checkpointer.close()
    assert found is not None, told
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b, told), found.items, expected[found.step])
    if found.step == 7:
        assert not events, told
        return f"{told}: read"
    ((name, fields),) = events
    assert (found.step, name, fields["step"]) == (3, "quarantined", 7), told
    assert "checkpoints/7 is damaged (" in fields["reason"], told
    assert "\n" not in fields["reason"], told
    return f"{told}: {fields['reason'].partition('damaged (')[2]}"


def run_damages(seeds: range, twice: Path, folder: Path, expected: dict[int, dict[str, Any]]) -> None:
    for seed in seeds:
        (folder / str(seed)).mkdir()
        print(check_damage(seed, twice, folder / str(seed), expected))
        shutil.rmtree(folder / str(seed))


def test_random_damage(tmp_path: Path, expected: dict[int, dict[str, Any]]) -> None:
    run_damages(range(12), save_twice(tmp_path / "twice", MeshConfig(data=1)), tmp_path, expected)


@pytest.mark.slow
def test_much_random_damage(tmp_path: Path, expected: dict[int, dict[str, Any]]) -> None:
    """Arrays cut into parts, as several devices write them."""
    twice = save_twice(tmp_path / "twice", MeshConfig(data=2, fsdp=2, tensor=2))
    run_damages(range(12, 412), twice, tmp_path, expected)
