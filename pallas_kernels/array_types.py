"""Annotations of the arrays that the ops exchange. A name's suffix spells the shape, here and all over the code.

B batch, L length, E inner channels, N recurrent states per channel, G groups of channels that share B and C,
K convolution width, T tokens per chunk, C chunks of a sequence, F = E / G channels per group.
"""

from typing import TYPE_CHECKING, Any

from jaxtyping import Array, Float, Inexact, Int

# A field of an op's output. To type checkers it is an array; at run time it may hold whatever a tree transformation
# puts in an array's place (a shape, a sharding, an axis), so it is not checked.
if TYPE_CHECKING:
    Leaf = Array
else:
    Leaf = Any

SequenceBLE = Float[Array, "B L E"]
TokenBE = Float[Array, "B E"]
ChannelE = Float[Array, " E"]
MatrixEN = Inexact[Array, "E N"]
StateBEN = Inexact[Array, "B E N"]
SegmentsBL = Int[Array, "B L"]
WeightKE = Float[Array, "K E"]
WindowBKE = Float[Array, "B K-1 E"]

# The input and output matrices of the recurrence: shared by all channels, shared by each group, or constant over time.
SequenceMatrix = Inexact[Array, "B L N"] | Inexact[Array, "B L #G N"] | Inexact[Array, "E N"]
TokenMatrix = Inexact[Array, "B N"] | Inexact[Array, "B #G N"] | Inexact[Array, "E N"]
