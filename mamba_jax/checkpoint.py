"""Checkpoints of training, on Orbax.

A checkpoint holds one item for each part of the state, such as `params` and `rest`, the resolved experiment as JSON
(`config`), and a fingerprint of every array (`fingerprints`): Orbax itself reads flipped bits without complaint.
Saving is asynchronous; a step directory appears under its final name only when it is complete.
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
_ARRAYS, _TEXTS = ("params", "rest", "ema"), ("config", "fingerprints", "identity")
_ITEM = {"weights": "params", "average": "ema"}
_MESSAGE_BYTES = 1000
# Statuses of a store that cannot be read now; they say nothing about what is in it.
_NOT_DAMAGE = ("PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "UNAVAILABLE", "DEADLINE_EXCEEDED", "UNAUTHENTICATED")


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoredRun:
    """What a checkpoint says of its run.

    Attributes:
        config: the experiment that made it.
        identity: of the run; None if it was not recorded.
    """

    config: ExperimentConfig
    identity: Mapping[str, Any] | None


class Checkpointer:
    """Saves and restores the training state of one run directory.

    With several processes, each makes the same calls, on storage that all of them see. Reading waits for no other
    process: each reads its part, then all take the same decision, on the worst that any of them found. Only the first
    moves and removes folders. A background save that fails in one process fails in all, in the others once Orbax's
    deadline of 20 minutes has passed. A failure before that, in starting to save or to move a folder, ends the job.
    """

    def __init__(
        self,
        run_dir: str | Path,
        config: CheckpointConfig,
        *,
        identity: Mapping[str, Any] | None = None,
        on_event: Callable[..., None] = lambda *_, **__: None,
    ) -> None:
        """Removes what saves that did not finish have left.

        Args:
            run_dir: of the run.
            config: how many checkpoints are kept.
            identity: of the run; stored with every checkpoint and compared.
            on_event: told of "quarantined" and "save_failed" with fields `step` and `reason`.
        """
        self._run_dir, self._config, self._on_event = Path(run_dir), config, on_event
        self._identity = identity
        self._saving: int | None = None
        self._open()

    @property
    def latest_step(self) -> int | None:
        """Step of the newest complete checkpoint; None if there is none."""
        return max(self._steps(), default=None)

    def save(self, step: int, items: Mapping[str, Any], config: ExperimentConfig) -> None:
        """Starts to save; a save before this one that failed in the background is reported to `on_event`.

        Args:
            step: updates done; a step that is already saved is left alone.
            items: trees of arrays by name: "params", "rest", "ema"; they may be donated as soon as this returns.
            config: the resolved experiment.

        Raises:
            SaveFailed: this save could not even be started. Later ones may succeed.
        """
        before = self._saving
        try:
            self.wait()
        except SaveFailed as error:
            self._on_event("save_failed", step=before, reason=str(error))
        if _from_first(int(step in self._steps())):
            return
        args: dict[str, Any] = {name: ocp.args.StandardSave(tree) for name, tree in items.items()}
        args["config"] = ocp.args.JsonSave(json.loads(to_json(config)))
        if self._identity is not None:
            args["identity"] = ocp.args.JsonSave(dict(self._identity))
        args["fingerprints"] = ocp.args.JsonSave(fingerprints(dict(items)))
        with self._failure_in_one_line():
            self._manager.save(step, args=ocp.args.Composite(**args))
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
        moved = 0
        while (step := _from_first(max(self._steps(), default=-1))) >= 0:
            try:
                return Restored(step=step, items=self.restore(step, abstract))
            except DamagedCheckpoint as error:
                self._quarantine(step, str(error))
                moved += 1
        if moved:
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
        with _reader(self._run_dir) as manager:
            self._check_identity(manager, step)
            return _read_arrays(manager, step, abstract)

    def close(self) -> None:
        """Waits for what is being saved, and stops; unlike `wait`, this process alone, which may be on its way out."""
        with contextlib.suppress(Exception):
            self._manager.close()

    def _check_identity(self, manager: ocp.CheckpointManager, step: int) -> None:
        stored = _read_identity(manager, step)
        if self._identity is not None and stored is not None and stored != self._identity:
            raise InputError(f"checkpoint {manager.directory / str(step)} belongs to another run: move it away")

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
        problem, cause, severity = "", None, 0
        try:
            yield
        except Exception as error:
            # After a failure Orbax waits for the other processes; that it did so in vain says less than the failure.
            root: BaseException = error
            while inner := root.__cause__ or root.__context__:
                root = inner
            problem, cause = f"{type(root).__name__}: {_one_line(root)}", error
            severity = 1 if "DEADLINE_EXCEEDED" in problem else 2
        severity, problem = _worst(severity, problem)
        if severity:
            self._saving = None
            with contextlib.suppress(Exception):
                self._manager.close()
            self._open()
            raise SaveFailed(problem) from cause

    def _quarantine(self, step: int, reason: str) -> None:
        self._manager.close()
        if jax.process_index() == 0:
            target = self._run_dir / _DAMAGED / str(step)
            target.parent.mkdir(exist_ok=True)
            taken = sum(1 for path in target.parent.iterdir() if path.name.split("-")[0] == str(step))
            (self._run_dir / _FOLDER / str(step)).rename(target.with_name(f"{step}-{taken}") if taken else target)
        multihost_utils.sync_global_devices(f"moved checkpoint {step}")
        self._on_event("quarantined", step=step, reason=reason)
        self._open()


def stored_run(run_dir: str | Path) -> StoredRun | None:
    """What the newest checkpoint that can be read says of its run; None if there is none."""
    if not (Path(run_dir) / _FOLDER).is_dir():
        return None
    with _reader(run_dir) as manager:
        for step in sorted(manager.all_steps(), reverse=True):
            origin = f"checkpoint {manager.directory / str(step)}"
            with contextlib.suppress(InputError):
                config = from_json(ExperimentConfig, json.dumps(_read_json(manager, step, "config")), origin=origin)
                return StoredRun(config=config, identity=_read_identity(manager, step))
    return None


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
    with _reader(run_dir) as manager:
        steps = sorted(manager.all_steps())
        if not steps:
            raise InputError(f"{run_dir} has no complete checkpoint yet")
        step = steps[-1] if step is None else step
        if step not in steps:
            raise InputError(f"{run_dir} has no checkpoint of step {step}; there are {', '.join(map(str, steps))}")
        origin, item = f"checkpoint {manager.directory / str(step)}", _ITEM[weights]
        try:
            stored = _read_json(manager, step, "config")
            config = from_json(ExperimentConfig, json.dumps(stored), origin=origin)
            if weights == "average" and config.optimizer.ema_decay is None:
                raise InputError(f"{run_dir} keeps no average of the weights: optimizer.ema_decay was not set")
            params = _read_arrays(manager, step, {item: _on_first_device(define(config.model).params)})[item]
        except DamagedCheckpoint as error:
            raise InputError(f"{error}: move that folder away to use the one before it") from error
    return LoadedParams(config=config, params=params, step=step)


def _on_first_device(abstract: Params) -> Params:
    device = SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), abstract)


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
    """Some items of a checkpoint, compared with their fingerprints; all processes return, or all raise the same."""
    origin = f"checkpoint {manager.directory / str(step)}"
    with _same_for_all():
        # A state without the experiment that made it is of no use to evaluation.
        _read_json(manager, step, "config")
        expected = _read_json(manager, step, "fingerprints")
        for name, tree in abstract.items():
            with _damage_in_one_line(origin, part=name):
                # Orbax does not say which file it could not parse, and takes an item without this one for absent.
                json.loads((manager.directory / str(step) / name / "_METADATA").read_text())
                stored = manager.item_metadata(step)[name]
            _check_same(stored, tree, origin=f"{origin}, item {name!r},")
        args = {name: ocp.args.StandardRestore(tree) for name, tree in abstract.items()}
        with _damage_in_one_line(origin):
            items = dict(manager.restore(step, args=ocp.args.Composite(**args)))
    # All processes take part in these sums, so all must have got here.
    found = fingerprints(items)
    with _same_for_all():
        if differing := [name for name, value in found.items() if expected.get(name) != value]:
            reason = f"the array {differing[0]} is not what was saved: its fingerprint differs"
            raise DamagedCheckpoint(f"{origin} is damaged ({reason})")
    return items


def _read_json(manager: ocp.CheckpointManager, step: int, item: str) -> dict[str, Any]:
    with _damage_in_one_line(f"checkpoint {manager.directory / str(step)}", part=item):
        value = manager.restore(step, args=ocp.args.Composite(**{item: ocp.args.JsonRestore()}))[item]
        if not isinstance(value, dict):
            raise ValueError("not a JSON object")
        return value


def _read_identity(manager: ocp.CheckpointManager, step: int) -> dict[str, Any] | None:
    has_it = (manager.directory / str(step) / "identity").is_dir()
    return _read_json(manager, step, "identity") if has_it else None


def _reader(run_dir: str | Path) -> ocp.CheckpointManager:
    """A manager of this process alone: it changes nothing and has no barriers, where others would wait for ever."""
    own = jax.process_index()
    options = ocp.options.MultiprocessingOptions(primary_host=own, active_processes={own})
    return _manager(run_dir, read_only=True, create=False, multiprocessing_options=options)


def _worst(severity: int, message: str) -> tuple[int, str]:
    """Severity and message of the process whose severity is highest, the lowest such process; 0 is none."""
    if jax.process_count() == 1:
        return severity, message
    own = bytes([severity]) + message.encode()[:_MESSAGE_BYTES].ljust(_MESSAGE_BYTES, b"\0")
    everyone = multihost_utils.process_allgather(np.frombuffer(own, np.uint8))
    worst = everyone[np.argmax(everyone[:, 0])].tobytes()
    return worst[0], worst[1:].rstrip(b"\0").decode(errors="ignore")


@contextlib.contextmanager
def _same_for_all() -> Iterator[None]:
    """Raises in every process what one of them raised, damage first; nothing inside may wait for another process."""
    own: InputError | None = None
    try:
        yield
    except InputError as error:
        own = error
    severity = 0 if own is None else 2 if isinstance(own, DamagedCheckpoint) else 1
    worst, message = _worst(severity, str(own or ""))
    if worst:
        raise (InputError, DamagedCheckpoint)[worst - 1](message) from own


def _from_first(value: int) -> int:
    """The value of the first process: listings of shared storage may be of different age."""
    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


class _Manager(ocp.CheckpointManager):
    def reached_preemption(self, step: int) -> bool:
        """Orbax would ask JAX's preemption service by step, which `StopRequests` asks by call: processes disagree."""
        return False


def _manager(run_dir: str | Path, **options: Any) -> ocp.CheckpointManager:
    # Orbax reports every option that it derives from another, and every step of every save.
    logging.getLogger("absl").setLevel(logging.ERROR)
    handlers = ocp.DefaultCheckpointHandlerRegistry()
    args = ocp.args
    for item in _ARRAYS + _TEXTS:
        kinds = (args.StandardSave, args.StandardRestore) if item in _ARRAYS else (args.JsonSave, args.JsonRestore)
        handler = ocp.StandardCheckpointHandler() if item in _ARRAYS else ocp.JsonCheckpointHandler()
        for kind in kinds:
            handlers.add(item, kind, handler)
    return _Manager(
        (Path(run_dir) / _FOLDER).absolute(),
        options=ocp.CheckpointManagerOptions(**options),
        handler_registry=handlers,
    )


@contextlib.contextmanager
def _damage_in_one_line(origin: str, part: str = "") -> Iterator[None]:
    try:
        yield
    except Exception as error:
        # The outer exceptions of Orbax print its options; the innermost names the array and the file.
        root: BaseException = error
        while inner := root.__cause__:
            root = inner
        text = f"{part and part + ': '}{type(root).__name__}: {_one_line(root)}"
        if isinstance(root, PermissionError | MemoryError) or str(root).startswith(_NOT_DAMAGE):
            raise InputError(f"{origin} cannot be read now ({text}): see to that and start again") from error
        raise DamagedCheckpoint(f"{origin} is damaged ({text})") from error


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    # What was done stands at the start, with long paths after it; why it failed, such as a full disk, at the end.
    return text if len(text) <= 400 else f"{text[:200]} ... {text[-195:]}"


def _check_same(stored: Any, expected: Any, *, origin: str) -> None:
    """Orbax would cast another dtype silently; shapes and names it reports one at a time and at length."""

    def leaves(tree: Any) -> dict[str, str]:
        flat = jax.tree.leaves_with_path(tree, is_leaf=lambda node: hasattr(node, "shape"))
        return {
            jax.tree_util.keystr(path, simple=True, separator="/"): f"{leaf.dtype}{list(leaf.shape)}"
            for path, leaf in flat
        }

    found, wanted = leaves(stored), leaves(expected)
    problems = [f"missing {name}" for name in wanted if name not in found]
    problems += [f"unexpected {name}" for name in found if name not in wanted]
    differing = [name for name in wanted.keys() & found.keys() if found[name] != wanted[name]]
    problems += [f"{name} is {found[name]}, expected {wanted[name]}" for name in differing]
    if problems:
        raise InputError(f"{origin} does not fit the model: {'; '.join(sorted(problems))}")
