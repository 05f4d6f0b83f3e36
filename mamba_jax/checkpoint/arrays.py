"""The arrays of a checkpoint: read into shardings, and listed after they were written."""

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
    """Some items of a checkpoint, compared with its record; all processes return, or all raise the same.

    Args:
        folder: of the step.
        items: trees of `jax.ShapeDtypeStruct` with shardings, by name.
        identity: of the run that it must belong to; None takes any.

    Raises:
        DamagedCheckpoint, CheckpointGone: see `judged`.
        InputError: it cannot be read now, or is of another step, another run or another model.
    """
    with same_for_all():
        record = records.read(folder)
        records.check_step(record, folder)
        records.check_identity(record, identity, folder)
        records.check_arrays(record, items, folder)
        restored = {name: _read_item(folder, name, tree) for name, tree in items.items()}
    # All processes take part in these sums, so all must have got here.
    found = fingerprints(restored)
    with same_for_all():
        if differing := [name for name, value in found.items() if record.fingerprints.get(name) != value]:
            reason = f"the array {differing[0]} is not what was saved: its fingerprint differs"
            raise DamagedCheckpoint(f"checkpoint {folder} is damaged ({reason})")
    return restored


def check_written(folder: Path, record: Record) -> None:
    """Makes sure that a folder that was just written holds everything that its step should have.

    Orbax does not miss what it does not find: an array that was lost shows only when someone reads it.

    Args:
        folder: still under the name that says it is unfinished.
        record: of what was to be saved.

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
    """An array is cut into parts on a grid, each under its own key."""
    path = name.partition("/")[2].replace("/", ".")
    grid = json.loads(store.read(f"{path}/.zarray").result().value)
    counts = [math.ceil(size / part) for size, part in zip(grid["shape"], grid["chunks"], strict=True)]
    parts = [".".join(map(str, index)) or "0" for index in itertools.product(*map(range, counts))]
    if missing := [part for part in parts if f"{path}/{part}".encode() not in keys]:
        raise ValueError(f"{len(missing)} of {len(parts)} parts of the array {name} are missing")


def _read_item(folder: Path, name: str, tree: Any) -> Any:
    quiet()
    own = jax.process_index()
    # This process alone: others may be at another place, where a barrier would wait for them for ever.
    options = ocp.options.MultiprocessingOptions(primary_host=own, active_processes={own})
    with judged(folder, name):
        return ocp.StandardCheckpointHandler(multiprocessing_options=options).restore(
            LiteralPath(folder.absolute() / name), args=ocp.args.StandardRestore(tree)
        )
