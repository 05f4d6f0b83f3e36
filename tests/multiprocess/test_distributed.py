"""How a process finds the others: by environment variables, or not at all."""

import signal

import jax
import pytest

from mamba_jax.errors import InputError
from mamba_jax.run import distributed
from tests.multiprocess.harness import Launcher

ADDRESS, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
COMPLETE = {ADDRESS: "10.0.0.1:1234", COUNT: "4", INDEX: "0"}
SLURM = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_NODELIST": "node[3-4]",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[object, ...]]:
    """Calls of `jax.distributed.initialize`, in an environment without a launcher."""
    for name in (*COMPLETE, *SLURM, "OMPI_COMM_WORLD_RANK", "TPU_WORKER_ID", "TPU_WORKER_HOSTNAMES"):
        monkeypatch.delenv(name, raising=False)
    found: list[tuple[object, ...]] = []

    def initialize(*given: object, cluster_detection_method: str | None, shutdown_timeout_seconds: int) -> None:
        del shutdown_timeout_seconds
        found.append((*given, cluster_detection_method))

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    return found


@pytest.mark.parametrize(
    ("variables", "detect", "message"),
    [
        ({ADDRESS: "10.0.0.1"}, False, "JAX_COORDINATOR_ADDRESS='10.0.0.1' is not host:port"),
        ({ADDRESS: "10.0.0.1:port"}, False, "is not host:port"),
        ({ADDRESS: "10.0.0.1:70000"}, False, "port from 1 to 65535"),
        ({ADDRESS: ":1234"}, False, "is not host:port"),
        ({ADDRESS: "fe80::1:1234"}, False, "is not host:port"),
        ({COUNT: "four"}, False, "JAX_NUM_PROCESSES='four' is not a whole number from 1 on"),
        ({COUNT: "0"}, False, "JAX_NUM_PROCESSES='0'"),
        ({INDEX: "-1"}, True, "JAX_PROCESS_ID='-1' is not a whole number from 0 on"),
        ({INDEX: ""}, False, "JAX_PROCESS_ID=''"),
        ({INDEX: "4"}, False, "JAX_PROCESS_ID=4 but JAX_NUM_PROCESSES=4: processes are counted from 0 to 3"),
        ({INDEX: None}, False, "JAX_PROCESS_ID not set"),
        ({ADDRESS: None, COUNT: None}, False, "JAX_COORDINATOR_ADDRESS and JAX_NUM_PROCESSES not set"),
        ({**dict.fromkeys(COMPLETE), **SLURM}, False, "SLURM started several processes (SLURM_NTASKS=2)"),
    ],
)
def test_mistakes(
    monkeypatch: pytest.MonkeyPatch,
    calls: list[tuple[object, ...]],
    variables: dict[str, str | None],
    detect: bool,
    message: str,
) -> None:
    for name, value in {**COMPLETE, **variables}.items():
        if value is not None:
            monkeypatch.setenv(name, value)
    with pytest.raises(InputError) as error:
        distributed.initialize(detect=detect)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert not calls


@pytest.mark.parametrize(
    ("variables", "detect", "expected"),
    [
        ({}, False, []),
        (SLURM | {"SLURM_NTASKS": "1"}, False, []),
        (COMPLETE, False, [("10.0.0.1:1234", 4, 0, "deactivate")]),
        (COMPLETE | SLURM, True, [("10.0.0.1:1234", 4, 0, "deactivate")]),
        (COMPLETE | {ADDRESS: "[fe80::1]:1234"}, False, [("[fe80::1]:1234", 4, 0, "deactivate")]),
        (SLURM, True, [(None, None, None, None)]),
        ({ADDRESS: "10.0.0.1:1234"}, True, [("10.0.0.1:1234", None, None, None)]),
    ],
)
def test_what_jax_is_told(
    monkeypatch: pytest.MonkeyPatch,
    calls: list[tuple[object, ...]],
    variables: dict[str, str],
    detect: bool,
    expected: list[tuple[object, ...]],
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    distributed.initialize(detect=detect)
    assert calls == expected


def test_flag_without_launcher(launcher: Launcher) -> None:
    program = "from mamba_jax import distributed; distributed.initialize(detect=True)"
    ended = launcher.run([["-c", program]])
    assert "InputError: --distributed found no launcher that JAX knows" in ended.logs[0]


STOPPING = """
import os, signal, sys, time
from mamba_jax import distributed
distributed.initialize()
import jax
from mamba_jax.run.stop_requests import StopRequests
calls = 0
with StopRequests() as stop:
    while True:
        calls += 1
        if stop.requested():
            break
        if calls == 10 and jax.process_index() == 1:
            os.kill(os.getpid(), signal.{name})
        time.sleep(0.01 if jax.process_index() else 0.03)
assert stop.requested()
print(jax.process_count(), len(jax.devices()), calls, stop.signal)
"""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_both_stop_at_the_same_call(launcher: Launcher, name: str) -> None:
    ended = launcher.run([["-c", STOPPING.format(name=name)]] * 2)
    assert ended.statuses == (0, 0), ended.logs
    (count, devices, calls, number), other = (log.splitlines()[-1].split() for log in ended.logs)
    assert (count, devices) == ("2", "8")
    assert int(calls) > 10
    assert number == str(int(signal.SIGTERM))
    # The one that got the signal knows which it was; the others learn of a preemption.
    assert other == ["2", "8", calls, str(int(signal.Signals[name]))]
