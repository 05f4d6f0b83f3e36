"""Reads the arrays of a checkpoint into given shardings, and checks after a save that all of them were written."""

import itertools
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
import tensorstore

from mamba_jax.checkpoint import record as records
from mamba_jax.checkpoint.agreement import same_for_all
from mamba_jax.checkpoint.damage import DamagedCheckpoint, judged
from mamba_jax.checkpoint.fingerprints import fingerprints
from mamba_jax.checkpoint.quiet import quiet
from mamba_jax.checkpoint.record import Record
from mamba_jax.checkpoint.steps import LiteralPath


def read_arrays(folder: Path, items: Mapping[str, Any], *, identity: Mapping[str, Any] | None) -> dict[str, Any]:
    """Reads some items of a checkpoint and compares them with its record; all processes return, or all raise the same.

    Args:
        folder: the checkpoint's folder, named by its step.
        items: what to read: by item name, a tree of `jax.ShapeDtypeStruct` with shardings.
        identity: identity of the run that the checkpoint must belong to; None accepts any run.

    Returns:
        The arrays, in the same trees.

    Raises:
        DamagedCheckpoint, CheckpointGone: see `judged`.
        InputError: the checkpoint cannot be read now, or belongs to another step, run or model.
    """
    with same_for_all():
        record = records.read(folder)
        records.check_step(record, folder)
        records.check_identity(record, identity, folder)
        records.check_arrays(record, items, folder)
        restored = {name: _read_item(folder, name, tree) for name, tree in items.items()}
    # A collective computation, which would hang if a process had left above: hence the agreement before it.
    found = fingerprints(restored)
    with same_for_all():
        if differing := [name for name, value in found.items() if record.fingerprints.get(name) != value]:
            reason = f"the array {differing[0]} is not what was saved: its fingerprint differs"
            raise DamagedCheckpoint(f"checkpoint {folder} is damaged ({reason})")
    return restored


def check_written(folder: Path, record: Record) -> None:
    """Makes sure that a checkpoint that was just written holds every array and its record.

    Orbax does not check this: an array that was not written would be noticed only when it is restored.

    Args:
        folder: the folder, still under Orbax's temporary name.
        record: the record of what was to be saved.

    Raises:
        DamagedCheckpoint: something is missing, or cannot be read back.
    """
    with judged(folder):
        if records.read(folder) != record:
            raise ValueError("its config and fingerprints are not what was written")
        for item in {name.split("/")[0] for name in record.arrays}:
            store = tensorstore.KvStore.open(
                {"driver": "ocdbt", "base": {"driver": "file", "path": f"{folder.absolute() / item}/"}}
            ).result()
            keys = set(store.list().result())
            for name in record.arrays:
                if name.startswith(f"{item}/"):
                    _check_parts(store, keys, name)


def _check_parts(store: Any, keys: set[bytes], name: str) -> None:
    """Raises a ValueError unless every chunk of a Zarr array exists; each chunk has a key of its own in the store."""
    path = name.partition("/")[2].replace("/", ".")
    grid = json.loads(store.read(f"{path}/.zarray").result().value)
    counts = [math.ceil(size / part) for size, part in zip(grid["shape"], grid["chunks"], strict=True)]
    parts = [".".join(map(str, index)) or "0" for index in itertools.product(*map(range, counts))]
    if missing := [part for part in parts if f"{path}/{part}".encode() not in keys]:
        raise ValueError(f"{len(missing)} of {len(parts)} parts of the array {name} are missing")


def _read_item(folder: Path, name: str, tree: Any) -> Any:
    """Restores one item of a checkpoint, placed as the leaves of `tree` say, without waiting for other processes."""
    quiet()
    own = jax.process_index()
    # As if this process were alone: otherwise Orbax sets barriers, and a process that has failed never reaches them.
    options = ocp.options.MultiprocessingOptions(primary_host=own, active_processes={own})
    with judged(folder, name):
        return ocp.StandardCheckpointHandler(multiprocessing_options=options).restore(
            LiteralPath(folder.absolute() / name), args=ocp.args.StandardRestore(tree)
        )
