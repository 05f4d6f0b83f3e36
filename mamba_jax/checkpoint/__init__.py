"""Checkpoints of training, on Orbax.

A checkpoint is a folder named by its step. It holds one item for each part of the state, such as `params` and `rest`;
the resolved experiment as JSON (`config`); and an item `fingerprints`, by which a damaged checkpoint, or one of another
step or run, is recognised: Orbax itself reads flipped bits without complaint.
"""

from mamba_jax.checkpoint.checkpointer import Checkpointer, Restored, SaveFailed
from mamba_jax.checkpoint.damage import CheckpointGone, DamagedCheckpoint
from mamba_jax.checkpoint.loading import LoadedParams, StoredRun, load_params, load_state, stored_run, stored_step
from mamba_jax.checkpoint.steps import FOLDER, check_path, newest_step, quarantined, steps_in

__all__ = [
    "FOLDER",
    "CheckpointGone",
    "Checkpointer",
    "DamagedCheckpoint",
    "LoadedParams",
    "Restored",
    "SaveFailed",
    "StoredRun",
    "check_path",
    "load_params",
    "load_state",
    "newest_step",
    "quarantined",
    "steps_in",
    "stored_run",
    "stored_step",
]
