"""The mixers that a model can be made of, a folder and a line here each; `docs/add_a_mixer.md` says how to add one."""

from mamba_jax.models.mixers.attention.config import AttentionConfig as AttentionConfig
from mamba_jax.models.mixers.declaration import MIXERS
from mamba_jax.models.mixers.mamba1.config import Mamba1Config as Mamba1Config
from mamba_jax.models.mixers.mamba2.config import Mamba2Config as Mamba2Config
from mamba_jax.models.mixers.mlp.config import MlpConfig as MlpConfig
from mamba_jax.models.mixers.moe.config import MoeConfig as MoeConfig
from mamba_jax.models.mixers.rg_lru.config import RGLRUConfig as RGLRUConfig
from mamba_jax.models.mixers.with_shared.config import SharedBlockConfig as SharedBlockConfig
from mamba_jax.models.mixers.with_shared.config import WithSharedConfig as WithSharedConfig

# What a model is made of unless its config says otherwise.
DEFAULT_MIXER = MIXERS.get("mamba1")()
