"""Steps that train adapters, or some layers alone, are the same on any mesh, and hold as little as they should."""

import dataclasses
import re
from collections.abc import Callable

import jax
import numpy as np
import pytest

from mamba_jax.config import ExperimentConfig, LoraConfig, MeshConfig
from mamba_jax.training.config import ProgramConfig
from tests.training.test_step import ALL_AXES, make_batch, program_of

MakeConfig = Callable[..., ExperimentConfig]


def losses(config: ProgramConfig, mesh: MeshConfig) -> list[float]:
    program = program_of(config, mesh)
    state = program.initialize()
    found = []
    with jax.set_mesh(program.mesh):
        for number in range(3):
            state, metrics = program.step(state, make_batch(config, seed=number))
            found.append(float(metrics.loss))
    return found


@pytest.mark.parametrize("what", ["adapters", pytest.param("layers", marks=pytest.mark.slow)])
def test_losses_do_not_depend_on_the_mesh(make_config: MakeConfig, what: str) -> None:
    program = make_config(d_model=32).program
    if what == "adapters":
        program = dataclasses.replace(program, lora=LoraConfig(rank=3))
    else:
        frozen = dataclasses.replace(program.optimizer, lr_multipliers=(("layers/0/|embedding", 0.0),))
        program = dataclasses.replace(program, optimizer=frozen)
    alone, together = losses(program, MeshConfig(data=1)), losses(program, ALL_AXES)
    # Sums over devices in another order: roundings of 6e-8 in losses of 5.5, and in the updates between them.
    np.testing.assert_allclose(together, alone, rtol=1e-5)
    assert len(set(alone)) == 3


def test_a_step_of_adapters_has_no_gradient_of_the_weights(make_config: MakeConfig) -> None:
    """Their shape never comes up for all layers at once but where they are read and given back."""
    config = make_config(d_model=32, ema_decay=None).program
    text = {}
    for name, lora in (("whole", LoraConfig()), ("adapters", LoraConfig(rank=3))):
        program = program_of(dataclasses.replace(config, lora=lora), MeshConfig(data=1))
        text[name] = program.lower().as_text()
    # The input projection of both layers, (2, 32, 2, 64); its gradient begins as zeros of that shape.
    kernel = "broadcast_in_dim.*-> tensor<2x32x2x64xf32>"
    assert re.search(kernel, text["whole"])
    assert not re.search(kernel, text["adapters"])
