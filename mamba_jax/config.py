"""Every configuration class, by one import: `from mamba_jax.config import ...`.

A run is described by one `ExperimentConfig`. Files under `configs/` build one in `get_config()`; the command line
overrides single fields (`--train.num-steps 100`); the resolved result is stored with every checkpoint.

Each class stands beside what it configures. All are frozen and keyword-only. Derived quantities are properties, never
fields. Units: lengths and batch sizes are in tokens and sequences; learning rates are per optimizer step; fractions lie
in [0, 1].
"""

from mamba_jax.config_base import from_json as from_json
from mamba_jax.config_base import to_json as to_json
from mamba_jax.data.config import DataConfig as DataConfig
from mamba_jax.data.config import FilesSource as FilesSource
from mamba_jax.data.config import HuggingFaceSource as HuggingFaceSource
from mamba_jax.data.config import MixturePart as MixturePart
from mamba_jax.data.config import MixtureSource as MixtureSource
from mamba_jax.data.config import ShardSource as ShardSource
from mamba_jax.data.config import Source as Source
from mamba_jax.data.config import SyntheticSource as SyntheticSource
from mamba_jax.data.config import TextFolderSource as TextFolderSource
from mamba_jax.data.config import TfdsSource as TfdsSource
from mamba_jax.data.config import TokenizerConfig as TokenizerConfig
from mamba_jax.evaluation.config import EvaluationConfig as EvaluationConfig
from mamba_jax.experiment import FROM_CHECKPOINT as FROM_CHECKPOINT
from mamba_jax.experiment import ExperimentConfig as ExperimentConfig
from mamba_jax.models.config import DType as DType
from mamba_jax.models.config import Hybrid as Hybrid
from mamba_jax.models.config import LoraConfig as LoraConfig
from mamba_jax.models.config import ModelConfig as ModelConfig
from mamba_jax.models.config import Unit as Unit
from mamba_jax.models.mixers import *  # noqa: F403  the config of every mixer
from mamba_jax.sharding.config import MeshConfig as MeshConfig
from mamba_jax.training.config import CheckpointConfig as CheckpointConfig
from mamba_jax.training.config import CosineSchedule as CosineSchedule
from mamba_jax.training.config import FaultsConfig as FaultsConfig
from mamba_jax.training.config import OptimizerConfig as OptimizerConfig
from mamba_jax.training.config import Schedule as Schedule
from mamba_jax.training.config import TrainConfig as TrainConfig
from mamba_jax.training.config import WarmupStableDecaySchedule as WarmupStableDecaySchedule
