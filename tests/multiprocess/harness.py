"""Starts a run as operating system processes that form one JAX program of eight CPU devices, and collects the ends."""

import dataclasses
import os
import re
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Sequence
from pathlib import Path

from mamba_jax.config import ExperimentConfig, to_json
from mamba_jax.telemetry.metrics import read_metrics

ROOT = Path(__file__).parents[2]
WORKER = Path(__file__).with_name("worker.py")
DEVICES = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ended:
    """How the processes of a job ended.

    Attributes:
        statuses: exit status of each, minus the number of the signal that ended it.
        logs: standard output and error of each.
        seconds: from the start to the end of the last one.
        end: when that was, in seconds since 1970.
    """

    statuses: tuple[int, ...]
    logs: tuple[str, ...]
    seconds: float
    end: float

    def fault_time(self, process: int) -> float:
        """When the fault of a process struck, in seconds since 1970."""
        match = re.search(r"^fault at ([0-9.]+)$", self.logs[process], re.MULTILINE)
        assert match is not None, f"no fault in process {process}:\n{self.logs[process][-3000:]}"
        return float(match[1])


class Launcher:
    """Runs jobs in a folder, also at the same time; their programs are compiled once."""

    def __init__(self, folder: Path, programs: Path) -> None:
        """Takes the folder for logs and that of the compilation cache."""
        self._folder, self._programs = folder, programs

    def train(
        self,
        config: ExperimentConfig,
        faults: Sequence[str] = ("none",),
        *,
        flags: Sequence[str] = (),
        timeout: float = 120,
    ) -> Ended:
        """Runs train.py in as many processes as there are faults.

        Args:
            config: of the run.
            faults: what goes wrong in each process; see worker.py.
            flags: of train.py, beside the config.
            timeout: seconds until all are killed, which fails the test.
        """
        path = self._folder / f"config_{uuid.uuid4().hex}.py"
        path.write_text(
            "from mamba_jax.config import ExperimentConfig, from_json\n\n\n"
            f"def get_config():\n    return from_json(ExperimentConfig, {to_json(config)!r}, origin='test')\n"
        )
        program = [str(ROOT / "train.py"), str(path), *flags]
        return self.run([[str(WORKER), fault, *program] for fault in faults], timeout=timeout)

    def run(self, commands: Sequence[Sequence[str]], *, timeout: float = 60) -> Ended:
        """Runs a Python command line for each process; with several they find each other by environment variables."""
        job = uuid.uuid4().hex
        common = self._environment(len(commands))
        start = time.monotonic()
        logs = [self._folder / f"job_{job}_process_{index}.log" for index in range(len(commands))]
        processes: list[subprocess.Popen[bytes]] = []
        try:
            for index, (command, log) in enumerate(zip(commands, logs, strict=True)):
                own = {"JAX_PROCESS_ID": str(index)} if len(commands) > 1 else {}
                with log.open("wb") as file:
                    processes.append(
                        subprocess.Popen(
                            [sys.executable, *command],
                            stdin=subprocess.DEVNULL,
                            stdout=file,
                            stderr=subprocess.STDOUT,
                            cwd=self._folder,
                            env=common | own,
                            start_new_session=True,
                        )
                    )
            statuses = self._wait(processes, logs, start + timeout)
        finally:
            for process in processes:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        return Ended(
            statuses=statuses,
            logs=tuple(_text(log) for log in logs),
            seconds=time.monotonic() - start,
            end=time.time(),
        )

    def _environment(self, processes: int) -> dict[str, str]:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
        together = {
            "JAX_COORDINATOR_ADDRESS": f"localhost:{_free_port()}",
            "JAX_NUM_PROCESSES": str(processes),
        }
        return {
            **inherited,
            **(together if processes > 1 else {}),
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(self._programs),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "TPU_SKIP_MDS_QUERY": "1",
            "PYTHONPATH": str(ROOT),
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={DEVICES // processes} "
            "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
        }

    def _wait(
        self, processes: Sequence[subprocess.Popen[bytes]], logs: Sequence[Path], deadline: float
    ) -> tuple[int, ...]:
        try:
            return tuple(process.wait(max(deadline - time.monotonic(), 0)) for process in processes)
        except subprocess.TimeoutExpired:
            tails = "\n".join(f"--- process {index}\n{_text(log)[-3000:]}" for index, log in enumerate(logs))
            raise AssertionError(f"a process is still there at the deadline\n{tails}") from None


def exact_losses(run_dir: str | Path) -> dict[int, str]:
    """Training loss by step, as hexadecimal floats, checking that no step is there twice."""
    found = [record for record in read_metrics(Path(run_dir)) if record["kind"] == "train"]
    losses = {record["step"]: float(record["cross_entropy"]).hex() for record in found}
    assert len(losses) == len(found)
    return losses


def saved_steps(run_dir: str | Path) -> list[int]:
    """Steps with a complete checkpoint, oldest first."""
    folder = Path(run_dir) / "checkpoints"
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal())


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def _text(log: Path) -> str:
    return log.read_text(errors="replace")
