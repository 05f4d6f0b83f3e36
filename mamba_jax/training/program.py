"""What a run compiles: checks that its batches can be split over the mesh."""

from jax.sharding import Mesh

from mamba_jax.errors import InputError
from mamba_jax.experiment import ExperimentConfig
from mamba_jax.sharding import RULES, Axis, batch_shards


def check_batches(config: ExperimentConfig, mesh: Mesh) -> None:
    """Checks that the batches of training and evaluation can be split over the mesh.

    Raises:
        InputError: a batch is not a multiple of the parts, a sequence is not, or its parts are shorter than a mixer
            can do with.
    """
    shards = batch_shards(mesh)
    for name, size in (
        ("data.global_batch / train.accumulation_steps", config.data.global_batch // config.train.accumulation_steps),
        ("evaluation.batch_size", config.evaluation_batch_size),
    ):
        if size % shards:
            raise InputError(
                f"{name} = {size} sequences cannot be split over {shards} batch shards (mesh data x fsdp): "
                "change the batch or the mesh"
            )
    # Evaluation takes the sequence whole, which divides where its windows do.
    columns, length = RULES.parts(mesh, Axis.LENGTH), config.data.seq_len // config.train.windows
    least = config.model.least_part
    if columns > 1 and (length % columns or length // columns < least):
        raise InputError(
            f"data.seq_len / train.windows = {length} tokens cannot be split over {columns} devices (mesh sequence) "
            f"into equal parts of at least {least} tokens: change the length or the mesh"
        )
