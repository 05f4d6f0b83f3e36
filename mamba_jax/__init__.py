"""Mamba language models in JAX.

    import mamba_jax

    model = mamba_jax.load("runs/quickstart")  # a training run, or a folder with safetensors
    logits = model(tokens).logits
    print(model.complete("The President"))

Everything here is imported when it is first used, so that `import mamba_jax` costs nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

from mamba_jax import renamed

if TYPE_CHECKING:
    from mamba_jax.evaluation.checkpoints import evaluate_checkpoint as evaluate
    from mamba_jax.experiment import ExperimentConfig as ExperimentConfig
    from mamba_jax.export.huggingface import save as save
    from mamba_jax.generation.decoder import Decoder as Decoder
    from mamba_jax.generation.generate import generate as generate
    from mamba_jax.generation.sampling import SamplingConfig as SamplingConfig
    from mamba_jax.generator import Generator as Generator
    from mamba_jax.loaded import Model as Model
    from mamba_jax.loaded import load as load
    from mamba_jax.models.config import ModelConfig as ModelConfig
    from mamba_jax.models.language_model import LanguageModel as LanguageModel
    from mamba_jax.run.loop import train as train

__version__ = "0.1.0"
__all__ = [
    "Decoder",
    "ExperimentConfig",
    "Generator",
    "LanguageModel",
    "Model",
    "ModelConfig",
    "SamplingConfig",
    "evaluate",
    "generate",
    "load",
    "save",
    "train",
]
_PLACES = {
    "Decoder": "mamba_jax.generation.decoder.Decoder",
    "ExperimentConfig": "mamba_jax.experiment.ExperimentConfig",
    "Generator": "mamba_jax.generator.Generator",
    "LanguageModel": "mamba_jax.models.language_model.LanguageModel",
    "Model": "mamba_jax.loaded.Model",
    "ModelConfig": "mamba_jax.models.config.ModelConfig",
    "SamplingConfig": "mamba_jax.generation.sampling.SamplingConfig",
    "evaluate": "mamba_jax.evaluation.checkpoints.evaluate_checkpoint",
    "generate": "mamba_jax.generation.generate.generate",
    "load": "mamba_jax.loaded.load",
    "save": "mamba_jax.export.huggingface.save",
    "train": "mamba_jax.run.loop.train",
}
renamed.install()


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'mamba_jax' has no attribute {name!r}; it has {', '.join(__all__)}")
    module, _, attribute = _PLACES[name].rpartition(".")
    return getattr(importlib.import_module(module), attribute)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
