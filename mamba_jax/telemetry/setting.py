"""Where, when and how results were taken."""

import dataclasses
import datetime
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path

import jax


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """Where, when and how results were taken.

    Attributes:
        hardware: as people and `compare.py` tell it apart from other hardware.
        versions: of Python and the libraries, by name.
        command: as typed.
        commit: of the code, short; "+" at its end says that files were changed.
        date: ISO 8601, in seconds.
    """

    hardware: str
    versions: dict[str, str]
    command: str
    commit: str
    date: str

    @classmethod
    def here(cls, hardware: str, *, command: str, libraries: Sequence[str] = ()) -> "Setting":
        """That of this process.

        Args:
            hardware: what the results are of.
            command: what a reader types to do the same.
            libraries: distributions whose versions matter, besides jax.
        """
        return cls(
            hardware=hardware,
            versions={"Python": platform.python_version()}
            | {name: importlib.metadata.version(name) for name in ("jax", *libraries)},
            command=command,
            commit=_commit(),
            date=datetime.datetime.now().isoformat(timespec="seconds"),
        )


def processor() -> str:
    """Name and cores of this machine's processor."""
    cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [line.split(":")[1].strip() for line in cpuinfo.splitlines() if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores"


def hardware() -> str:
    """What JAX runs on in this process."""
    device = jax.devices()[0]
    return processor() if device.platform == "cpu" else device.device_kind


def header(setting: Setting) -> list[str]:
    """Lines that say where and how results were taken."""
    return [
        f"Hardware: {setting.hardware}.",
        f"Software: {', '.join(f'{name} {version}' for name, version in setting.versions.items())}; commit "
        f"{setting.commit}.",
        f"Command: `{setting.command}`",
    ]


def _commit() -> str:
    """The short name of the checkout's commit, with "+" if files were changed; "unknown" outside of one."""
    root = Path(__file__).parents[2]

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
