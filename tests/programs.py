"""What a compiled program says about itself; every compiler that the tests use says it."""

import jax


def text_of(compiled: jax.stages.Compiled) -> str:
    """The program (HLO)."""
    text = compiled.as_text()
    assert text is not None
    return text


def temporary_bytes(compiled: jax.stages.Compiled) -> int:
    """The memory that a device needs besides arguments and results."""
    memory = compiled.memory_analysis()
    assert memory is not None
    return memory.temp_size_in_bytes
