"""How models of several kinds of blocks are published, a module and a line here each."""

from mamba_jax.models.layouts import bamba, jamba, llama, nemotron_h, original, recurrent_gemma, zamba2
from mamba_jax.models.published import Format

# In the order in which they are asked; of those that can express a model the first one writes it.
FORMATS: tuple[Format, ...] = (
    llama.FORMAT,
    bamba.FORMAT,
    jamba.FORMAT,
    original.FORMAT,
    zamba2.FORMAT,
    nemotron_h.FORMAT,
    recurrent_gemma.FORMAT,
)
