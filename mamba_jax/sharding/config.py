"""How devices are arranged."""

import dataclasses

from mamba_jax.config_base import Config, require


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig(Config):
    """Sizes of the device mesh axes; one of them may be -1, "all remaining devices".

    Attributes:
        data: replicas of the parameters, each with its part of the batch.
            Slices of a pod that only a data-centre network joins split this axis first.
        fsdp: the batch and the parameters are both split over this axis.
        expert: the batch and the experts of mixtures are both split over this axis; models without experts use it as
            they use `data`.
        sequence: the length of the sequences and the parameters are split over this axis.
        tensor: inner channels and the vocabulary are split over this axis.
    """

    data: int = -1
    fsdp: int = 1
    expert: int = 1
    sequence: int = 1
    tensor: int = 1

    def _check(self) -> None:
        sizes = dataclasses.astuple(self)
        names = ", ".join(field.name for field in dataclasses.fields(self))
        require(
            all(size == -1 or size > 0 for size in sizes) and sizes.count(-1) <= 1,
            f"MeshConfig: sizes must be positive with at most one -1, got ({names}) = {sizes}",
        )
