"""Checkpoints of training, on Orbax.

A checkpoint holds one item for each part of the state, such as `params` and `rest`, the resolved experiment as JSON
(`config`), and a fingerprint of every array (`fingerprints`): Orbax itself reads flipped bits without complaint.
Evaluation and export read `params`, or the average `ema`, and `config` alone. Saving is asynchronous; a step directory
appears under its final name only when it is complete.
"""

import contextlib
import dataclasses
import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jax.sharding import SingleDeviceSharding

from mamba_jax.config import CheckpointConfig, ExperimentConfig, from_json, to_json
from mamba_jax.errors import InputError
from mamba_jax.fingerprints import fingerprints
from mamba_jax.models.parameters import Params, define

_FOLDER, _DAMAGED = "checkpoints", "damaged"
_ARRAYS, _TEXTS = ("params", "rest", "ema"), ("config", "fingerprints")
_ITEM = {"weights": "params", "average": "ema"}


class SaveFailed(Exception):
    """A checkpoint could not be written, for a reason in one line; older ones are untouched."""


class DamagedCheckpoint(InputError):
    """A checkpoint that cannot be read, or whose arrays are not what was saved."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadedParams:
    """Parameters out of a training checkpoint.

    Attributes:
        config: the experiment that made them.
        params: on the first local device.
        step: updates done.
    """

    config: ExperimentConfig
    params: Params
    step: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Restored:
    """The state of a checkpoint.

    Attributes:
        step: updates done.
        items: by name, in the shardings that were asked for.
    """

    step: int
    items: dict[str, Any]


class Checkpointer:
    """Saves and restores the training state of one run directory.

    With several processes, each makes the same calls. They agree after every attempt to restore, and only the first
    touches folders. What damages a checkpoint for one process damages it for all, as they share the storage; should a
    single process fail inside Orbax, the others wait there until the watchdog ends them.
    """

    def __init__(
        self, run_dir: str | Path, config: CheckpointConfig, *, on_event: Callable[..., None] = lambda *_, **__: None
    ) -> None:
        """Removes what saves that did not finish have left.

        Args:
            run_dir: of the run.
            config: how many checkpoints are kept.
            on_event: told of "quarantined" and "save_failed" with fields `step` and `reason`.
        """
        self._run_dir, self._config, self._on_event = Path(run_dir), config, on_event
        self._saving: int | None = None
        self._open()

    @property
    def latest_step(self) -> int | None:
        """Step of the newest complete checkpoint; None if there is none."""
        return max(self._steps(), default=None)

    def save(self, step: int, items: Mapping[str, Any], config: ExperimentConfig) -> None:
        """Starts to save; the arrays may be donated or changed as soon as this returns.

        A save before this one that failed in the background is reported to `on_event`.

        Args:
            step: updates done; a step that is already saved is left alone.
            items: trees of arrays by name: "params", "rest", "ema".
            config: the resolved experiment.

        Raises:
            SaveFailed: this save could not even be started. Later ones may succeed.
        """
        before = self._saving
        try:
            self.wait()
        except SaveFailed as error:
            self._on_event("save_failed", step=before, reason=str(error))
        if step in self._steps():
            return
        prints = fingerprints(dict(items))
        arrays = {name: ocp.args.StandardSave(tree) for name, tree in items.items()}
        with self._failure_in_one_line():
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    **arrays,
                    config=ocp.args.JsonSave(json.loads(to_json(config))),
                    fingerprints=ocp.args.JsonSave(prints),
                ),
            )
            self._saving = step

    def wait(self) -> None:
        """Waits until everything is on disk.

        Raises:
            SaveFailed: the last save failed.
        """
        with self._failure_in_one_line():
            self._manager.wait_until_finished()
        self._saving = None

    def restore_newest(self, abstract: Mapping[str, Any]) -> Restored | None:
        """Reads the newest checkpoint that is not damaged; damaged ones are moved to the folder `damaged`.

        Args:
            abstract: trees of `jax.ShapeDtypeStruct` with shardings, by name of the item.

        Returns:
            None if the run has no checkpoint.

        Raises:
            InputError: a checkpoint is of another model, or all of them were damaged.
        """
        steps = sorted(self._steps(), reverse=True)
        for step in steps:
            items, problem = None, ""
            try:
                items = self.restore(step, abstract)
            except DamagedCheckpoint as error:
                problem = str(error)
            if jax.process_count() > 1:
                agreed = bool(np.all(multihost_utils.process_allgather(np.array(items is not None))))
                items, problem = (items, problem) if agreed else (None, problem or "another process could not read it")
            if items is not None:
                return Restored(step=step, items=items)
            self._quarantine(step, problem)
        if steps:
            raise InputError(
                f"all checkpoints of {self._run_dir} are damaged and were moved to {self._run_dir / _DAMAGED}: put a "
                "good copy back, or choose another train.run_dir to start again"
            )
        return None

    def restore(self, step: int, abstract: Mapping[str, Any]) -> dict[str, Any]:
        """Reads a step into the shardings of the abstract arrays, and compares the fingerprints.

        Raises:
            DamagedCheckpoint: it cannot be read, or an array is not what was saved.
            InputError: an array is missing, unexpected or of another shape or dtype.
        """
        _read_json(self._manager, step, "config")
        return _read_arrays(self._manager, step, abstract)

    def close(self) -> None:
        """Waits for what is being saved, and stops."""
        with contextlib.suppress(SaveFailed):
            self.wait()
        self._manager.close()

    def _open(self) -> None:
        if jax.process_index() == 0:
            _remove_leftovers(self._run_dir / _FOLDER)
        self._manager = _manager(self._run_dir, max_to_keep=self._config.keep)

    def _steps(self) -> list[int]:
        folder = self._run_dir / _FOLDER
        return [int(path.name) for path in folder.iterdir() if path.name.isdigit()] if folder.is_dir() else []

    @contextlib.contextmanager
    def _failure_in_one_line(self) -> Iterator[None]:
        """Whatever goes wrong while writing, the manager is replaced: its threads may hold on to what failed."""
        try:
            yield
        except Exception as error:
            self._saving = None
            with contextlib.suppress(Exception):
                self._manager.close()
            self._open()
            raise SaveFailed(f"{type(error).__name__}: {_one_line(error)}") from error

    def _quarantine(self, step: int, reason: str) -> None:
        self._manager.close()
        if jax.process_index() == 0:
            target = self._run_dir / _DAMAGED / str(step)
            target.parent.mkdir(exist_ok=True)
            taken = sum(1 for path in target.parent.iterdir() if path.name.split("-")[0] == str(step))
            (self._run_dir / _FOLDER / str(step)).rename(target.with_name(f"{step}-{taken}") if taken else target)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(f"moved checkpoint {step}")
        self._on_event("quarantined", step=step, reason=reason)
        self._open()


def load_params(
    run_dir: str | Path, step: int | None = None, *, weights: Literal["weights", "average"] = "weights"
) -> LoadedParams:
    """Reads the parameters of a run onto one device.

    Args:
        run_dir: of the training run.
        step: which checkpoint; None is the newest.
        weights: those of the last update, or their moving average.

    Raises:
        InputError: the run has no such checkpoint or keeps no average, or the checkpoint is damaged or does not hold
            what its config says.
    """
    if not (Path(run_dir) / _FOLDER).is_dir():
        raise InputError(f"{run_dir} is no run directory: it has no folder {_FOLDER!r}")
    with _manager(run_dir, read_only=True) as manager:
        steps = sorted(manager.all_steps())
        if not steps:
            raise InputError(f"{run_dir} has no complete checkpoint yet")
        step = steps[-1] if step is None else step
        if step not in steps:
            raise InputError(f"{run_dir} has no checkpoint of step {step}; there are {', '.join(map(str, steps))}")
        stored = _read_json(manager, step, "config")
        config = from_json(ExperimentConfig, json.dumps(stored), origin=f"checkpoint {manager.directory / str(step)}")
        if weights == "average" and config.optimizer.ema_decay is None:
            raise InputError(f"{run_dir} keeps no average of the weights: optimizer.ema_decay was not set")
        sharding = SingleDeviceSharding(jax.local_devices()[0])
        abstract = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), define(config.model).params
        )
        item = _ITEM[weights]
        params = _read_arrays(manager, step, {item: abstract})[item]
    return LoadedParams(config=config, params=params, step=step)


def _remove_leftovers(folder: Path) -> None:
    """Removes what saves that did not finish have left."""
    for _attempt in range(40):
        leftovers = list(folder.glob("*.orbax-checkpoint-tmp*"))
        if not leftovers:
            return
        for leftover in leftovers:
            shutil.rmtree(leftover, ignore_errors=True)
        # Where one array could not be written, threads of Orbax may still be writing others.
        time.sleep(0.25)


def _read_arrays(manager: ocp.CheckpointManager, step: int, abstract: Mapping[str, Any]) -> dict[str, Any]:
    """Some items of a checkpoint, compared with their fingerprints."""
    origin = f"checkpoint {manager.directory / str(step)}"
    expected = _read_json(manager, step, "fingerprints")
    with _damage_in_one_line(origin):
        metadata = manager.item_metadata(step)
        stored = {name: metadata[name] for name in abstract}
        if absent := [name for name, item in stored.items() if item is None]:
            raise ValueError(f"the item {absent[0]!r} is missing")
        for name, tree in abstract.items():
            _check_same(stored[name], tree, origin=f"{origin}, item {name!r},")
        args = {name: ocp.args.StandardRestore(tree) for name, tree in abstract.items()}
        restored = manager.restore(step, args=ocp.args.Composite(**args))
        items = {name: restored[name] for name in abstract}
        for name, value in fingerprints(items).items():
            if expected.get(name) != value:
                raise ValueError(f"the array {name} is not what was saved: its fingerprint differs")
    return items


def _read_json(manager: ocp.CheckpointManager, step: int, item: str) -> dict[str, Any]:
    with _damage_in_one_line(f"checkpoint {manager.directory / str(step)}"):
        value = manager.restore(step, args=ocp.args.Composite(**{item: ocp.args.JsonRestore()}))[item]
        if not isinstance(value, dict):
            raise ValueError(f"the item {item!r} is not a JSON object")
        return value


def _manager(run_dir: str | Path, **options: Any) -> ocp.CheckpointManager:
    # Orbax reports every option that it derives from another, and every step of every save.
    logging.getLogger("absl").setLevel(logging.ERROR)
    handlers = ocp.DefaultCheckpointHandlerRegistry()
    for item in _ARRAYS:
        handler = ocp.StandardCheckpointHandler()
        handlers.add(item, ocp.args.StandardSave, handler)
        handlers.add(item, ocp.args.StandardRestore, handler)
    for item in _TEXTS:
        text_handler = ocp.JsonCheckpointHandler()
        handlers.add(item, ocp.args.JsonSave, text_handler)
        handlers.add(item, ocp.args.JsonRestore, text_handler)
    return ocp.CheckpointManager(
        (Path(run_dir) / _FOLDER).absolute(),
        options=ocp.CheckpointManagerOptions(**options),
        handler_registry=handlers,
    )


@contextlib.contextmanager
def _damage_in_one_line(origin: str) -> Iterator[None]:
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise DamagedCheckpoint(
            f"{origin} is damaged ({type(error).__name__}: {_one_line(error)}): move that folder away to use the one "
            "before it"
        ) from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _check_same(stored: Any, expected: Any, *, origin: str) -> None:
    """Orbax would cast another dtype silently; shapes and names it reports one at a time and at length."""

    def leaves(tree: Any) -> dict[str, tuple[tuple[int, ...], str]]:
        flat = jax.tree.leaves_with_path(tree, is_leaf=lambda node: hasattr(node, "shape"))
        return {
            jax.tree_util.keystr(path, simple=True, separator="/"): (tuple(leaf.shape), str(leaf.dtype))
            for path, leaf in flat
        }

    stored_leaves, expected_leaves = leaves(stored), leaves(expected)
    problems = [f"missing {name}" for name in expected_leaves if name not in stored_leaves]
    problems += [f"unexpected {name}" for name in stored_leaves if name not in expected_leaves]
    for name in expected_leaves.keys() & stored_leaves.keys():
        if stored_leaves[name] != expected_leaves[name]:
            (shape, dtype), (expected_shape, expected_dtype) = stored_leaves[name], expected_leaves[name]
            problems.append(f"{name} is {dtype}{list(shape)}, expected {expected_dtype}{list(expected_shape)}")
    if problems:
        raise InputError(f"{origin} does not fit the model: {'; '.join(sorted(problems))}")
