"""The record of a checkpoint: step, identity of the run, config, and the types and fingerprints of its arrays."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from flax.traverse_util import flatten_dict

from mamba_jax.checkpoint.damage import DamagedCheckpoint, check_files, judged, read_object
from mamba_jax.checkpoint.fingerprints import fingerprints
from mamba_jax.config_base import to_json
from mamba_jax.errors import InputError
from mamba_jax.experiment import ExperimentConfig

# Orbax's name for the file of a JSON item.
_FILE = "metadata"
_CONFIG, _FINGERPRINTS = "config", "fingerprints"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
    """The two JSON items of a checkpoint.

    Attributes:
        step: updates done.
        identity: identity of the run, as given to `Checkpointer`; None if none was given.
        config: the resolved experiment as a JSON object.
        arrays: dtype and shape of each array, such as "float32[16]", by its path, such as "params/norm_f/scale".
        fingerprints: fingerprint of each array by its path; see `mamba_jax.checkpoint.fingerprints`.
    """

    step: int
    identity: dict[str, Any] | None
    config: dict[str, Any]
    arrays: dict[str, str]
    fingerprints: dict[str, int]

    def items(self) -> dict[str, dict[str, Any]]:
        """The JSON items as they are stored."""
        content = {
            "step": self.step,
            "identity": self.identity,
            "config_sha256": _checksum(self.config),
            "arrays": self.arrays,
            "fingerprints": self.fingerprints,
        }
        return {_CONFIG: self.config, _FINGERPRINTS: {**content, "sha256": _checksum(content)}}


def describe(step: int, identity: dict[str, Any] | None, config: ExperimentConfig, items: Mapping[str, Any]) -> Record:
    """The record of a checkpoint that is about to be saved; computes the fingerprints on the devices.

    Args:
        step: updates done.
        identity: identity of the run as a JSON object, or None.
        config: the resolved experiment.
        items: the trees of arrays that will be saved, by item name.
    """
    return Record(
        step=step,
        identity=identity,
        config=json.loads(to_json(config)),
        arrays=types_of(items),
        fingerprints=fingerprints(dict(items)),
    )


def types_of(items: Mapping[str, Any]) -> dict[str, str]:
    """Dtype and shape of every array, by its path."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): f"{leaf.dtype}{list(leaf.shape)}"
        for path, leaf in jax.tree.leaves_with_path(dict(items))
    }


def read(folder: Path) -> Record:
    """Reads the record of a checkpoint and compares it with its checksums; the arrays are not read.

    Args:
        folder: the checkpoint's folder, named by its step.

    Raises:
        InputError: it was saved by a version that did not record step and run, or cannot be read now.
        DamagedCheckpoint, CheckpointGone: see `judged`.
    """
    with judged(folder):
        check_files(folder)
    with judged(folder, _FINGERPRINTS):
        content = read_object(folder / _FINGERPRINTS / _FILE)
        # That version stored fingerprints of the arrays and nothing besides.
        if content and all(type(value) is int for value in content.values()):
            raise InputError(
                f"checkpoint {folder} is of an earlier version, which recorded neither step nor run: move that folder "
                "away"
            )
        checksum = content.pop("sha256")
        if checksum != _checksum(content):
            raise DamagedCheckpoint(f"checkpoint {folder} is damaged (its fingerprints differ from their checksum)")
    with judged(folder, _CONFIG):
        config = read_object(folder / _CONFIG / _FILE)
        if content["config_sha256"] != _checksum(config):
            raise DamagedCheckpoint(f"checkpoint {folder} is damaged (its config differs from its checksum)")
        return Record(
            step=content["step"],
            identity=content["identity"],
            config=config,
            arrays=content["arrays"],
            fingerprints=content["fingerprints"],
        )


def check_step(record: Record, folder: Path) -> None:
    """Makes sure that a folder holds the step in its name.

    Raises:
        InputError: it holds another step, as a renamed or copied folder does.
    """
    if record.step != int(folder.name):
        raise InputError(
            f"checkpoint {folder} holds step {record.step}, not {folder.name}: move that folder away, or give it the "
            "name of its step"
        )


def check_identity(record: Record, identity: Mapping[str, Any] | None, folder: Path) -> None:
    """Makes sure that a checkpoint belongs to a run.

    Args:
        record: the checkpoint's record.
        identity: the run's identity; None accepts any checkpoint.
        folder: the checkpoint's folder, for the message.

    Raises:
        InputError: it belongs to another run; the message says how the identities differ.
    """
    if identity is None or record.identity == identity:
        return
    was, now = (
        flatten_dict(dict(value or {}), sep=".", keep_empty_nodes=True) for value in (record.identity, identity)
    )
    changes = [
        f"{name} was {_short(was.get(name))}, now {_short(now.get(name))}"
        for name in sorted(was.keys() | now.keys())
        if was.get(name) != now.get(name)
    ]
    raise InputError(
        f"checkpoint {folder} is of another run ({'; '.join(changes[:4])}): move that folder away, or choose another "
        "train.run_dir"
    )


def check_arrays(record: Record, items: Mapping[str, Any], folder: Path) -> None:
    """Makes sure that a checkpoint holds the arrays of the model; Orbax would silently cast arrays of another dtype.

    Args:
        record: the checkpoint's record.
        items: the expected arrays: by item name, a tree of `jax.ShapeDtypeStruct`. Other items are not compared.
        folder: the checkpoint's folder, for the message.

    Raises:
        InputError: an array is missing, unexpected or of another shape or dtype.
    """
    wanted = types_of(items)
    found = {name: kind for name, kind in record.arrays.items() if name.split("/")[0] in items}
    problems = [f"missing {name}" for name in wanted if name not in found]
    problems += [f"unexpected {name}" for name in found if name not in wanted]
    differing = [name for name in wanted.keys() & found.keys() if found[name] != wanted[name]]
    problems += [f"{name} is {found[name]}, expected {wanted[name]}" for name in differing]
    if problems:
        raise InputError(f"checkpoint {folder} does not fit the model: {'; '.join(sorted(problems))}")


def _checksum(value: dict[str, Any]) -> str:
    """Sha256 of a JSON object, independent of the order of its keys and of white space in the file."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:60]}...{text[-17:]}"
