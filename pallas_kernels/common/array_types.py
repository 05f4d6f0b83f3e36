"""Annotations of the arrays that the ops exchange. A name's suffix spells the shape, here and all over the code.

B batch, L length, E inner channels, H heads, P channels of a head, N recurrent states per channel, G groups of channels
or heads that share B and C, K convolution width, T tokens per chunk, C chunks of a sequence, F = E / G channels, or
H / G heads, per group.
"""

from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Array, Float, Inexact, Int

# A field of an op's output. To type checkers it is an array; at run time it may hold whatever a tree transformation
# puts in an array's place (a shape, a sharding, an axis), so it is not checked.
if TYPE_CHECKING:
    Leaf = Array
else:
    Leaf = Any

# Arrays by name.
Arrays = dict[str, Array]

# A size is an int, or a symbol in an export for any size.
Size = Any

# What becomes an array: nested lists of numbers as well.
_Given = Array | np.ndarray
SequenceBLE = Float[_Given, "B L E"] | list[Any]
TokenBE = Float[_Given, "B E"] | list[Any]
ChannelE = Float[_Given, " E"] | list[Any]
MatrixEN = Inexact[_Given, "E N"] | list[Any]
StateBEN = Inexact[_Given, "B E N"] | list[Any]
SegmentsBL = Int[_Given, "B L"] | list[Any]
SequenceBLHP = Float[_Given, "B L H P"] | list[Any]
SequenceBLH = Float[_Given, "B L H"] | list[Any]
SequenceBLGN = Float[_Given, "B L G N"] | list[Any]
TokenBHP = Float[_Given, "B H P"] | list[Any]
TokenBH = Float[_Given, "B H"] | list[Any]
TokenBGN = Float[_Given, "B G N"] | list[Any]
HeadH = Float[_Given, " H"] | list[Any]
HeadSkip = Float[_Given, " H"] | Float[_Given, "H P"] | list[Any]
HeadStateBHPN = Float[_Given, "B H P N"] | list[Any]
WeightKE = Float[_Given, "K E"] | list[Any]
WindowBKE = Float[_Given, "B W E"] | list[Any]

# The input and output matrices of the recurrence: shared by all channels, shared by each group, or constant over time.
SequenceMatrix = Inexact[_Given, "B L N"] | Inexact[_Given, "B L #G N"] | Inexact[_Given, "E N"] | list[Any]
TokenMatrix = Inexact[_Given, "B #G N"] | Inexact[_Given, "E N"] | list[Any]
