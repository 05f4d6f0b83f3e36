"""Everything that is fixed before training: model, optimizer, layout of the state, and the compiled step.

A run, an estimate for a pod and a benchmark all start from the object that is defined here.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from mamba_jax.errors import InputError
from mamba_jax.models import parameters
from mamba_jax.models.parameters import ModelDefinition, Params
from mamba_jax.models.storage.low_rank import adapted, with_new_adapters, without_adapters
from mamba_jax.sharding import RULES, Axis, batch_shards
from mamba_jax.training.config import ProgramConfig
from mamba_jax.training.optimizer import make_optimizer, with_frozen
from mamba_jax.training.step import abstract_batch, make_train_step
from mamba_jax.training.train_state import TrainState, abstract_state, create


class TrainProgram:
    """The training step of a model on a mesh; nothing is allocated before `initialize`.

    Example:
        program = TrainProgram(config.program, make_mesh(config.mesh))
        state = program.initialize()
        with jax.set_mesh(program.mesh):
            state, metrics = program.step(state, batch)

    Attributes:
        config: everything that the compiled step depends on.
        mesh: the device mesh.
        definition: the model without its parameters, with adapters if there are any; it says which are trained.
        optimizer: the update rule.
        state: shapes, dtypes and shardings of the `TrainState`.
        batch: shapes, dtypes and shardings of an `LMBatch`.
        step: the jitted function from (state, batch) to (state, metrics). Call it under `jax.set_mesh`; it donates the
            state that it is given.
    """

    def __init__(self, config: ProgramConfig, mesh: Mesh) -> None:
        """Defines model, optimizer and step without allocating arrays or compiling.

        Args:
            config: everything that the compiled step depends on.
            mesh: the device mesh.

        Raises:
            InputError: the batch, the sequence or a parameter cannot be split over the mesh, or a target of `lora` or a
                pattern of `optimizer.lr_multipliers` matches nothing.
        """
        self.config, self.mesh = config, mesh
        self._check_batch()
        self.definition: ModelDefinition = with_frozen(
            adapted(parameters.define(config.model), config.lora), config.optimizer
        )
        self.optimizer = make_optimizer(config.optimizer, num_steps=config.num_steps, definition=self.definition)
        self.state: TrainState = abstract_state(config, self.definition, self.optimizer, mesh)
        self.batch = abstract_batch(config, mesh)
        self.step = make_train_step(config, self.definition, self.optimizer, self.state)

    def _check_batch(self) -> None:
        """Refuses a batch or a sequence that the devices of the mesh cannot share in equal parts."""
        rows = self.config.global_batch // self.config.accumulation_steps
        check_rows(self.mesh, "data.global_batch / train.accumulation_steps", rows)
        # Evaluation does not cut windows; if a window divides over the devices, so does the sequence.
        columns, length = RULES.parts(self.mesh, Axis.LENGTH), self.config.seq_len // self.config.windows
        least = self.config.model.least_part
        if columns > 1 and (length % columns or length // columns < least):
            raise InputError(
                f"data.seq_len / train.windows = {length} tokens cannot be split over {columns} devices (mesh "
                f"sequence) into equal parts of at least {least} tokens: change the length or the mesh"
            )

    def initialize(self, params: Params | None = None) -> TrainState:
        """The state before the first step; each device creates only its own part.

        Args:
            params: parameters to start from, without adapters, cast to the config's dtype; None draws random ones from
                `config.seed`, as adapters are in any case.
        """
        config = self.config
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.state)
        key = jax.random.key(config.seed)

        def build(params: Params) -> TrainState:
            whole = with_new_adapters(self.definition, params, config.lora, key)
            return create(config, whole, self.optimizer)

        if params is None:
            return jax.jit(lambda: build(parameters.init(config.model, key)), out_shardings=shardings)()
        params = jax.tree.map(
            lambda value, leaf: jax.device_put(jnp.asarray(value, leaf.dtype), leaf.sharding),
            params,
            without_adapters(self.state.params),
        )
        return jax.jit(build, out_shardings=shardings)(params)

    def lower(self, platforms: Sequence[str] | None = None) -> jax.stages.Lowered:
        """Lowers the step from shapes and shardings alone, without any arrays; `.compile()` gives the program.

        Args:
            platforms: platforms to lower for, such as ("tpu",); None takes that of the mesh's devices.
        """
        with jax.set_mesh(self.mesh):
            traced = self.step.trace(self.state, self.batch)
            return traced.lower(lowering_platforms=None if platforms is None else tuple(platforms))


def check_rows(mesh: Mesh, name: str, rows: int) -> None:
    """Checks that a batch can be split over the mesh.

    Args:
        mesh: the device mesh.
        name: how the config calls the number of rows, for the message.
        rows: number of rows of the batch.

    Raises:
        InputError: the number of rows is not a multiple of the number of batch shards.
    """
    shards = batch_shards(mesh)
    if rows % shards:
        raise InputError(
            f"{name} = {rows} sequences cannot be split over {shards} batch shards (mesh data x fsdp x expert): "
            "change the batch or the mesh"
        )
