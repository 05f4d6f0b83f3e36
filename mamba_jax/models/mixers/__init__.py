"""The mixers that a model can be made of, a folder and a line here each; `docs/add_a_mixer.md` says how to add one."""

from mamba_jax.models.mixers.declaration import MIXERS
from mamba_jax.models.mixers.mamba1.config import Mamba1Config as Mamba1Config
from mamba_jax.models.mixers.mamba2.config import Mamba2Config as Mamba2Config

# What a model is made of unless its config says otherwise.
DEFAULT_MIXER = MIXERS.get("mamba1")()
