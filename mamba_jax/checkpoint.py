"""Checkpoints of training, on Orbax.

A checkpoint holds three items: `params`, `rest` (step and optimizer state) and `config`, the resolved experiment as
JSON. Evaluation and export read `params` and `config` alone. Saving is asynchronous; a step directory appears under its
final name only when it is complete.
"""

import contextlib
import dataclasses
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.sharding import SingleDeviceSharding

from mamba_jax.config import CheckpointConfig, ExperimentConfig, from_json, to_json
from mamba_jax.errors import InputError
from mamba_jax.models.parameters import Params, define

_FOLDER = "checkpoints"


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


class Checkpointer:
    """Saves and restores the training state of one run directory."""

    def __init__(self, run_dir: str | Path, config: CheckpointConfig) -> None:
        self._manager = _manager(run_dir, max_to_keep=config.keep)

    @property
    def latest_step(self) -> int | None:
        """Step of the newest complete checkpoint; None if there is none."""
        return self._manager.latest_step()

    def save(self, step: int, *, params: Params, rest: Any, config: ExperimentConfig) -> None:
        """Starts to save; the arrays may be donated or changed as soon as this returns.

        Args:
            step: updates done; a step that is already saved is left alone.
            params: parameters.
            rest: all other arrays of the state.
            config: the resolved experiment.
        """
        if step in self._manager.all_steps():
            return
        self._manager.save(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardSave(params),
                rest=ocp.args.StandardSave(rest),
                config=ocp.args.JsonSave(json.loads(to_json(config))),
            ),
        )

    def restore(self, step: int, *, params: Params, rest: Any) -> tuple[Params, Any]:
        """Reads a step into the shardings of the abstract arrays `params` and `rest`.

        Raises:
            InputError: the checkpoint is damaged, or an array is missing, unexpected or of another shape or dtype.
        """
        origin = f"checkpoint {self._manager.directory / str(step)}"
        with _damage_in_one_line(origin):
            metadata = self._manager.item_metadata(step)
            _check_same({**metadata["params"], **metadata["rest"]}, {**params, **rest}, origin=origin)
            restored = self._manager.restore(
                step,
                args=ocp.args.Composite(params=ocp.args.StandardRestore(params), rest=ocp.args.StandardRestore(rest)),
            )
        return restored["params"], restored["rest"]

    def close(self) -> None:
        """Waits until everything is on disk."""
        self._manager.wait_until_finished()
        self._manager.close()


def load_params(run_dir: str | Path, step: int | None = None) -> LoadedParams:
    """Reads the parameters of a run onto one device.

    Args:
        run_dir: of the training run.
        step: which checkpoint; None is the newest.

    Raises:
        InputError: the run has no such checkpoint, or it is damaged or does not hold what its config says.
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
        origin = f"checkpoint {manager.directory / str(step)}"
        with _damage_in_one_line(origin):
            stored = manager.restore(step, args=ocp.args.Composite(config=ocp.args.JsonRestore()))["config"]
        config = from_json(ExperimentConfig, json.dumps(stored), origin=origin)
        sharding = SingleDeviceSharding(jax.local_devices()[0])
        abstract = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), define(config.model).params
        )
        with _damage_in_one_line(origin):
            _check_same(manager.item_metadata(step)["params"], abstract, origin=origin)
            params = manager.restore(step, args=ocp.args.Composite(params=ocp.args.StandardRestore(abstract)))["params"]
    return LoadedParams(config=config, params=params, step=step)


def _manager(run_dir: str | Path, **options: Any) -> ocp.CheckpointManager:
    # Orbax reports every option that it derives from another, and every step of every save.
    logging.getLogger("absl").setLevel(logging.ERROR)
    handlers = ocp.DefaultCheckpointHandlerRegistry()
    for item in ("params", "rest"):
        handler = ocp.StandardCheckpointHandler()
        handlers.add(item, ocp.args.StandardSave, handler)
        handlers.add(item, ocp.args.StandardRestore, handler)
    config_handler = ocp.JsonCheckpointHandler()
    handlers.add("config", ocp.args.JsonSave, config_handler)
    handlers.add("config", ocp.args.JsonRestore, config_handler)
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
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())[:160]
        raise InputError(
            f"{origin} is damaged ({type(error).__name__}: {reason}): move that folder away to use the one before it"
        ) from error


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
