"""Learning rates of groups of parameters: factors scale updates, and what is frozen stays, without moments."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
import pytest
from flax import traverse_util

from mamba_jax.config import ExperimentConfig, Hybrid, Mamba1Config, MeshConfig, MlpConfig
from mamba_jax.errors import InputError
from mamba_jax.models.parameters import size
from mamba_jax.training.program import TrainProgram
from tests.training.test_step import make_batch, program_of, set_up

MakeConfig = Callable[..., ExperimentConfig]


def program(config: ExperimentConfig) -> TrainProgram:
    return program_of(config.program, MeshConfig(data=1))


def changes(config: ExperimentConfig) -> dict[str, Any]:
    """What the first step adds to every parameter."""
    mesh, state, step = set_up(config)
    before = jax.device_get(state.params)
    with jax.set_mesh(mesh):
        state, _ = step(state, make_batch(config))
    return traverse_util.flatten_dict(jax.tree.map(lambda a, b: np.asarray(a) - b, state.params, before), sep="/")


@pytest.mark.parametrize("algorithm", ["adamw", pytest.param("muon", marks=pytest.mark.slow)])
def test_factors_scale_the_update_and_zero_freezes(make_config: MakeConfig, algorithm: str) -> None:
    plain = make_config(algorithm=algorithm, accumulation_steps=2)
    multipliers = (("embedding|norm", 0.0), ("layers/mixer/in_proj", 0.5), ("in_proj|out_proj", 2.0))
    config = make_config(algorithm=algorithm, accumulation_steps=2, lr_multipliers=multipliers)
    expected, found = changes(plain), changes(config)
    for name, change in expected.items():
        if name.startswith("embedding") or "norm" in name:
            np.testing.assert_array_equal(found[name], 0)
            continue
        factor = 0.5 if "in_proj" in name else 2.0 if "out_proj" in name else 1.0
        # Changes of 1e-2 and less, in weights below 1 with a rounding of 6e-8. Either norm of the gradient clips it to
        # another size, of which the first update is independent but for Adam's epsilon.
        np.testing.assert_allclose(found[name], factor * change, rtol=1e-3, atol=1e-6, err_msg=name)


def test_what_is_frozen_has_no_moments_and_no_gradient(make_config: MakeConfig) -> None:
    config = make_config(lr_multipliers=(("^layers", 0.0),), ema_decay=None)
    found = program(config)
    trained = size(found.state.params["embedding"]) + size(found.state.params["norm_f"])
    assert found.definition.num_trained == trained
    assert size(optax.tree.get(found.state.opt_state, "mu")) == trained
    whole = program(make_config(ema_decay=None))
    assert whole.definition.num_trained == size(whole.state.params) == size(optax.tree.get(whole.state.opt_state, "mu"))


def test_layers_of_a_stack_are_frozen_by_their_number(make_config: MakeConfig) -> None:
    """The second of two layers is left: it has moments and changes as it would, and the first is as it was."""
    plain = make_config()
    config = make_config(lr_multipliers=(("layers/0/", 0.0), ("layers/.*in_proj", 0.5)))
    expected, found = changes(plain), changes(config)
    for name, change in expected.items():
        if name.startswith("layers"):
            np.testing.assert_array_equal(found[name][0], 0)
            factor = 0.5 if "in_proj" in name else 1.0
            np.testing.assert_allclose(found[name][1], factor * change[1], rtol=1e-3, atol=1e-6, err_msg=name)
        else:
            np.testing.assert_allclose(found[name], change, rtol=1e-3, atol=1e-6, err_msg=name)
    made = program(config)
    of_a_layer = size(made.state.params["layers"]) // 2
    rest = size(made.state.params["embedding"]) + size(made.state.params["norm_f"])
    assert made.definition.num_trained == of_a_layer + rest == size(optax.tree.get(made.state.opt_state, "mu"))
    assert size(optax.tree.get(made.state.opt_state, "nu")["layers"]) == of_a_layer


def test_layers_of_a_hybrid_are_counted_over_the_model(make_config: MakeConfig) -> None:
    mixer = Hybrid.of_pattern("(MF)*2", M=Mamba1Config(state_dim=4, dt_rank=2), F=MlpConfig(hidden_dim=16))
    made = program(make_config(mixer=mixer, num_layers=4, lr_multipliers=(("layers_./[12]/|embedding", 0.0),)))
    trained = made.definition.trained
    np.testing.assert_array_equal(trained["layers_0"]["mixer"]["A_log"], [True, False])
    np.testing.assert_array_equal(trained["layers_1"]["norm"]["scale"], [False, True])
    assert trained["embedding"]["table"] is False
    assert trained["norm_f"]["scale"] is True


def test_patterns_that_match_nothing_or_everything_are_refused(make_config: MakeConfig) -> None:
    def refusal(*multipliers: tuple[str, float]) -> str:
        with pytest.raises(InputError) as error:
            program(make_config(lr_multipliers=multipliers))
        return str(error.value)

    message = refusal(("attention", 0.0))
    assert message.startswith(
        "optimizer.lr_multipliers: 'attention' is found in no path that the patterns before it leave; what is trained "
        "is embedding/table, layers/mixer/A_log, "
    )
    assert "'layers'" in refusal(("layers|norm", 0.5), ("layers", 0.0))
    assert refusal(("layers", 0.0), ("embed|norm", 0.0)) == (
        "optimizer.lr_multipliers: 'layers' and 'embed|norm' freeze everything: leave something to train"
    )
    with pytest.raises(InputError, match=r"freeze some layers of a stack, which optimizer.algorithm='muon' takes toge"):
        program(make_config(algorithm="muon", lr_multipliers=(("layers/0/", 0.0),)))
    assert "'layers/2/' is found in no path" in refusal(("layers/2/", 0.0))
    with pytest.raises(InputError, match=r"^OptimizerConfig.lr_multipliers: 'x' has the factor -1.0, below 0$"):
        make_config(lr_multipliers=(("x", -1.0),))
    with pytest.raises(InputError, match=r"^OptimizerConfig.lr_multipliers: '\(' is not a regular expression"):
        make_config(lr_multipliers=(("(", 1.0),))
    with pytest.raises(InputError, match=r"peak_lr \* weight_decay = 1e\+29 must not exceed 1"):
        make_config(lr_multipliers=(("x", 1e32),))
