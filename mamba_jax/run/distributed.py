"""Connects the processes of a run, one per host, into one JAX program, and lets them exchange short texts."""

import os
import re
from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import multihost_utils

from mamba_jax.errors import InputError

# How long a process that has crashed waits for the others to shut down too; when it gives up, JAX ends them. Processes
# that finish normally do so within seconds of each other, so a minute never cuts off a healthy one.
_SHUTDOWN_SECONDS = 60

# Length of every text that processes exchange (collectives need equal shapes); a longer error message is cut.
_TEXT_BYTES = 16384
_TEXT, _PROBLEM = "=", "!"

_ADDRESS, _COUNT, _INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"

# By launcher: a variable that it sets in each process it starts, the variable that holds their number or names, and the
# values of that variable which mean more than one process.
_SIGNS = {
    "SLURM": ("SLURM_STEP_NODELIST", "SLURM_NTASKS", r"0*([2-9]|[1-9]\d+)"),
    "Open MPI": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", r"0*([2-9]|[1-9]\d+)"),
    "Kubernetes with TPUs": ("TPU_WORKER_ID", "TPU_WORKER_HOSTNAMES", r".+,.+"),
    "several TPU slices": ("MEGASCALE_SLICE_ID", "MEGASCALE_NUM_SLICES", r"0*([2-9]|[1-9]\d+)"),
}


def initialize(*, detect: bool = False) -> None:
    """Connects this process with the others of the run, if there are any; call it before anything asks for devices.

    Without a launcher, three environment variables describe the group: JAX_COORDINATOR_ADDRESS, host and port where
    process 0 listens; JAX_NUM_PROCESSES; JAX_PROCESS_ID, counted from 0. With `detect`, variables that are not set are
    taken from the launcher; JAX knows TPU pods, SLURM and Open MPI. If no variable is set and `detect` is False, the
    process runs alone and nothing touches the network.

    Args:
        detect: ask the launcher; the flag --distributed of the command-line programs.

    Raises:
        InputError: the variables are incomplete or wrong, no launcher is found, or the launcher started several
            processes and `detect` is not set: each would train a run of its own in the same directory.
    """
    address, count, index = _address(), _number(_COUNT, least=1), _number(_INDEX, least=0)
    if count is not None and index is not None and index >= count:
        raise InputError(f"{_INDEX}={index} but {_COUNT}={count}: processes are counted from 0 to {count - 1}")
    given = {_ADDRESS: address, _COUNT: count, _INDEX: index}
    missing = [name for name, value in given.items() if value is None]
    if not detect:
        if len(missing) == len(given):
            _check_alone()
            return
        if missing:
            raise InputError(
                f"{' and '.join(missing)} not set, but other variables of {', '.join(given)} are: "
                "set all three, or none, or pass --distributed to take the rest from the launcher"
            )
    try:
        jax.distributed.initialize(
            address,
            count,
            index,
            cluster_detection_method=None if missing else "deactivate",
            shutdown_timeout_seconds=_SHUTDOWN_SECONDS,
        )
    except ValueError as error:
        raise InputError(
            f"--distributed found no launcher that JAX knows (TPU pod, SLURM, Open MPI): set {', '.join(given)}, "
            f"or leave the flag out for a single process; JAX says: {error}"
        ) from error


def from_first(make: Callable[[], object]) -> str:
    """Calls a function in the first process and returns its result, as text, in all processes.

    Files may look different to each process for a moment on shared storage, so decisions that depend on them are made
    once. Every process must call this at the same point.

    Args:
        make: called in the first process only. Its result is converted with `str`, None to an empty text; at most
            16 KiB are kept.

    Raises:
        InputError: `make` raised it; all processes raise the same.
    """

    def text() -> str:
        result = make()
        return "" if result is None else str(result)

    if jax.process_count() == 1:
        return text()
    told = ""
    if jax.process_index() == 0:
        try:
            told = _TEXT + text()
        except InputError as error:
            told = _PROBLEM + str(error)
    told = _decoded(multihost_utils.broadcast_one_to_all(_encoded(told)))
    if told.startswith(_PROBLEM):
        raise InputError(told.removeprefix(_PROBLEM))
    return told.removeprefix(_TEXT)


def raise_in_all(problem: str) -> None:
    """Raises an error in all processes if any of them has a problem, so that none waits for one that has stopped.

    Every process must call this at the same point.

    Args:
        problem: one line about what is wrong in this process; empty if nothing is.

    Raises:
        InputError: the problem of the lowest-numbered process that has one.
    """
    if jax.process_count() > 1:
        everyone = [_decoded(row) for row in multihost_utils.process_allgather(_encoded(problem))]
        problem = next(filter(None, everyone), "")
    if problem:
        raise InputError(problem)


def _encoded(text: str) -> np.ndarray:
    return np.frombuffer(text.encode(errors="backslashreplace")[:_TEXT_BYTES].ljust(_TEXT_BYTES, b"\0"), np.uint8)


def _decoded(row: np.ndarray) -> str:
    return np.asarray(row).tobytes().rstrip(b"\0").decode(errors="ignore")


def _address() -> str | None:
    text = os.environ.get(_ADDRESS)
    if text is None:
        return None
    host, _, port = text.rpartition(":")
    if not re.fullmatch(r"\[[0-9a-fA-F:.%\w]+\]|[^\s:]+", host) or not port.isdecimal() or not 0 < int(port) < 65536:
        raise InputError(f"{_ADDRESS}={text!r} is not host:port with a port from 1 to 65535, such as 10.0.0.1:1234")
    return text


def _number(name: str, *, least: int) -> int | None:
    text = os.environ.get(name)
    if text is None:
        return None
    if not (text.isascii() and text.isdecimal()) or int(text) < least:
        raise InputError(f"{name}={text!r} is not a whole number from {least} on")
    return int(text)


def _check_alone() -> None:
    for launcher, (marker, name, several) in _SIGNS.items():
        value = os.environ.get(name, "")
        if marker in os.environ and re.fullmatch(several, value):
            raise InputError(
                f"{launcher} started several processes ({name}={value}), but --distributed is missing: "
                f"pass it, or unset {marker} if each is meant to run on its own"
            )
