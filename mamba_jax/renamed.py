"""Modules that have moved, under the names that programs written for earlier versions import them by."""

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

_HERE = "mamba_jax"
_MIXERS = Path(__file__).parent / "models" / "mixers"
_MOVED = {
    "data.text_files": "data.sources.text_files",
    "data.tfds_documents": "data.sources.tfds",
    "data.token_bytes": "data.tokenization.token_bytes",
    "data.tokenizer_file": "data.tokenization.file",
    "data.tokenizer_loss": "data.tokenization.loss",
    "distributed": "run.distributed",
    "evaluation.report": "evaluation.checkpoints",
    "export.configs": "export.published_config",
    "fingerprints": "checkpoint.fingerprints",
    "generate_command": "commands.generate",
    "models.recurrent_state": "models.state",
    "training.event_log": "telemetry.events",
    "training.flops": "models.flops",
    "training.goodput": "telemetry.goodput",
    "training.loop": "run.loop",
    "training.loss": "models.loss",
    "training.loss_curve": "telemetry.loss_curve",
    "training.metric_writer": "telemetry.metrics",
    "training.ownership": "run.ownership",
    "training.pod_compile": "pods.compile",
    "training.records": "telemetry.records",
    "training.reporter": "telemetry.run_log",
    "training.run_directory": "run.directory",
    "training.run_record": "run.record",
    "training.step_report": "pods.estimate",
    "training.stop_requests": "run.stop_requests",
    "training.watchdog": "run.watchdog",
}


def install() -> None:
    """Makes the old names importable; each is the very module that has moved."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())


def new_name(name: str) -> str | None:
    """Where a module is that was called `name`; None if it has not moved."""
    short = name.removeprefix(f"{_HERE}.")
    if short in _MOVED:
        return f"{_HERE}.{_MOVED[short]}"
    # A mixer was a module of `models` before it had a folder.
    kind = short.removeprefix("models.")
    is_mixer = kind != short and "." not in kind and (_MIXERS / kind / "mixer.py").is_file()
    return f"{_HERE}.models.mixers.{kind}.mixer" if is_mixer else None


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Asked last, for names that are nowhere else."""

    def find_spec(
        self, fullname: str, path: Any, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        is_old = fullname.startswith(f"{_HERE}.") and new_name(fullname) is not None
        return importlib.util.spec_from_loader(fullname, self) if is_old else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        name = new_name(spec.name)
        assert name is not None
        return importlib.import_module(name)

    def exec_module(self, module: types.ModuleType) -> None:
        """It has been executed under its own name."""
