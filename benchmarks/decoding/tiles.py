"""Searches the tiles of the Triton kernels that read one token of a block, on matrices that lie by columns.

Several layers, together larger than the GPU's cache, read several tokens in one program, as a decoder does. The tile of
one kernel after the other is changed, one size at a time, as long as the program gets faster.
"""

import concurrent.futures
import dataclasses
import functools
import math
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Format, Layout

from harness import Results, time_calls
from mamba_jax.config import Mamba1Config, Mamba2Config
from pallas_kernels.mamba1_step import arguments as mamba1
from pallas_kernels.mamba1_step.triton import op as mamba1_triton
from pallas_kernels.mamba1_step.triton import tilings as mamba1_tilings
from pallas_kernels.mamba2_step import arguments as mamba2
from pallas_kernels.mamba2_step.triton import op as mamba2_triton
from pallas_kernels.mamba2_step.triton import tilings as mamba2_tilings

TOKENS = 16
# Bytes of all layers, so that no weight is still in the cache when it is read again.
LEAST_BYTES = 400e6
MATRICES = ("in_proj", "x_proj", "BC_proj", "dt_proj", "out_proj")
CARRIED = ("window", "BC_window", "state", "ring_x", "ring_B", "ring_dt", "ring_length")
# A change counts as faster from this on.
GAIN = 0.99
Arrays = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
    """Layers to read tokens with.

    Attributes:
        width: D.
        mixer: of all layers.
        rows: B.
        state_dtype: of the recurrent state.
        ring: tokens whose inputs are kept instead of writing the state; 0 is none.
    """

    width: int
    mixer: Any
    rows: int
    state_dtype: str
    ring: int = 0

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the arrays of a layer, by name."""
        mixer, D, B, K = self.mixer, self.width, self.rows, self.mixer.conv_width
        E, N = mixer.channels(D), mixer.state_dim
        shared = {"norm_scale": (D,), "in_proj": (D, 2, E), "conv_weight": (K, E), "conv_bias": (E,)}
        shared |= {"out_proj": (E, D), "window": (B, K - 1, E)}
        if isinstance(mixer, Mamba1Config):
            R = mixer.rank(D)
            own = {"x_proj": (E, R + 2 * N), "dt_proj": (R, E), "dt_bias": (E,), "A_log": (E, N), "D": (E,)}
            return {**shared, **own, "state": (B, E, N)}
        H, P, G = mixer.heads(D), mixer.head_dim, mixer.num_groups
        M = 2 * G * N
        own = {"BC_proj": (D, 2, G, N), "dt_proj": (D, H), "BC_conv_weight": (K, M), "BC_conv_bias": (M,)}
        own |= {"dt_bias": (H,), "A_log": (H,), "D": (H,), "gated_norm_scale": (E,)}
        own |= {"BC_window": (B, K - 1, M), "state": (B, H, P, N)}
        if self.ring:
            ring = {"x": (self.ring, E), "B": (self.ring, G * N), "dt": (self.ring, H), "length": ()}
            own |= {f"ring_{name}": (B, *sizes) for name, sizes in ring.items()}
        return {**shared, **own}

    def layer(self, place: Any) -> Arrays:
        """Shapes of a layer's arrays, which say how they lie on a device."""

        def shape(name: str, sizes: tuple[int, ...]) -> jax.ShapeDtypeStruct:
            dtype = {"state": self.state_dtype, "ring_length": "int32"}.get(name, "bfloat16")
            order = (*range(1, len(sizes)), 0) if name in MATRICES else tuple(range(len(sizes)))
            return jax.ShapeDtypeStruct(sizes, dtype, sharding=Format(Layout(order), place))

        return {name: shape(name, sizes) for name, sizes in self.shapes.items()}

    @property
    def moved(self) -> int:
        """Bytes that a layer moves for a token: all that it reads, and what it writes; of a ring a place."""
        sizes = {name: math.prod(shape) * 2 for name, shape in self.shapes.items()}
        sizes["state"] *= jnp.dtype(self.state_dtype).itemsize // 2
        writes = {"window": 1, "BC_window": 1, "state": 1 / max(self.ring, 1)}
        writes |= {name: 1 / self.ring for name in sizes if name.startswith("ring")}
        return sum(sizes.values()) + round(sum(sizes[name] * share for name, share in writes.items() if name in sizes))

    def tiling(self) -> Any:
        """What the search starts from."""
        if isinstance(self.mixer, Mamba1Config):
            return mamba1_tilings.default_tiling(self.rows, width=self.width)
        return mamba2_tilings.default_tiling(self.rows, width=self.width, has_ring=self.ring > 0)

    def step(self, arrays: Arrays, tiling: Any) -> Any:
        """One layer."""
        if isinstance(self.mixer, Mamba1Config):
            return mamba1_triton.mamba1_step(mamba1.StepArguments.of(**arrays, eps=1e-5), tiling=tiling)
        assert isinstance(self.mixer, Mamba2Config)
        static = {"eps": 1e-5, "gated_norm_eps": 1e-5, "group_size": self.mixer.group_size(self.width)}
        return mamba2_triton.mamba2_step(mamba2.StepArguments.of(**arrays, **static), tiling=tiling)


def program(workload: Workload, tiling: Any, shapes: Any) -> Any:
    """Compiles several tokens through all layers."""

    def token(_index: Any, carry: Any, weights: list[Arrays]) -> Any:
        residual, carried = carry
        after = []
        for layer, own in zip(weights, carried, strict=True):
            output = workload.step({**layer, **own, "residual": residual}, tiling)
            residual = output.residual
            after.append({name: getattr(output, name) for name in own})
        return residual, after

    def run(weights: list[Arrays], carry: Any) -> Any:
        return jax.lax.fori_loop(0, TOKENS, functools.partial(token, weights=weights), carry)

    return jax.jit(run, donate_argnums=1).lower(*shapes).compile()


def shapes_of(workload: Workload, device: jax.Device) -> tuple[list[Arrays], Any]:
    """Shapes of the weights of all layers, and of what is carried from token to token."""
    place = jax.sharding.SingleDeviceSharding(device)
    layer = workload.layer(place)
    count = max(2, math.ceil(LEAST_BYTES / workload.moved))
    weights = {name: array for name, array in layer.items() if name not in CARRIED}
    carried = {name: array for name, array in layer.items() if name in CARRIED}
    residual = jax.ShapeDtypeStruct((workload.rows, workload.width), jnp.float32, sharding=place)
    return [weights] * count, (residual, [carried] * count)


def drawn(shapes: Any) -> Any:
    """Random arrays of these shapes, that lie as they say."""
    keys = iter(jax.random.split(jax.random.key(0), len(jax.tree.leaves(shapes))))

    def draw(shape: jax.ShapeDtypeStruct) -> jax.Array:
        if shape.dtype == jnp.int32:
            return jnp.zeros(shape.shape, shape.dtype)
        return jax.device_put(0.02 * jax.random.normal(next(keys), shape.shape, shape.dtype), shape.format)

    return jax.tree.map(draw, shapes)


def neighbours(tile: Any) -> Iterator[Any]:
    """Tiles that differ in one size that is set."""
    for name, value in vars(tile).items():
        if value is None:
            continue
        others = (value - 1, value + 1) if name == "stages" else (value // 2, value * 2)
        yield from (dataclasses.replace(tile, **{name: other}) for other in others if other >= 1)


class Search:
    """The search for one workload; `best` is the fastest tiling so far, and `fastest` its milliseconds a layer."""

    def __init__(self, results: Results, name: str, workload: Workload, *, seconds: float) -> None:
        """Draws the arrays, and measures where the search starts."""
        self.results, self.name, self.workload = results, name, workload
        self.deadline = time.perf_counter() + seconds
        self.shapes = shapes_of(workload, jax.devices()[0])
        self.weights, self.carry = drawn(self.shapes)
        self.best, self.fastest = workload.tiling(), math.inf
        self.measure([("as it is", self.best)])

    def run(self) -> None:
        """Changes one kernel's tile after the other."""
        for field in dataclasses.fields(self.best):
            while time.perf_counter() < self.deadline and dataclasses.is_dataclass(getattr(self.best, field.name)):
                changes = [
                    (f"{field.name} {described(tile)}", dataclasses.replace(self.best, **{field.name: tile}))
                    for tile in neighbours(getattr(self.best, field.name))
                ]
                if not self.measure(changes):
                    break
        tiles = [
            f"{name}={described(tile)}" for name, tile in vars(self.best).items() if dataclasses.is_dataclass(tile)
        ]
        self.results.add(
            "tiles", self.name, implementation=f"best: {', '.join(tiles)}", direction="forward", **self.figures()
        )

    def measure(self, tilings: list[tuple[str, Any]]) -> bool:
        """Times tilings; returns whether one is faster than the best so far, which it then is."""
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            programs = [pool.submit(program, self.workload, tiling, self.shapes) for _, tiling in tilings]
        before = self.fastest
        for (name, tiling), built in zip(tilings, programs, strict=True):
            if (failure := built.exception()) is not None:
                if self.fastest == math.inf:
                    raise failure
                continue
            try:
                milliseconds = self.timed(built.result())
            except jax.errors.JaxRuntimeError:
                if self.fastest == math.inf:
                    raise
                self.weights, self.carry = drawn(self.shapes)
                continue
            self.results.add("tiles", self.name, implementation=name, direction="forward", milliseconds=milliseconds)
            if milliseconds < GAIN * self.fastest:
                self.best, self.fastest = tiling, milliseconds
        return self.fastest < before

    def timed(self, built: Any) -> float:
        """Milliseconds of a token and layer."""

        def call() -> jax.Array:
            self.carry = built(self.weights, self.carry)
            return self.carry[0]

        return time_calls(call, seconds=0.1, in_a_row=False).milliseconds / TOKENS / len(self.weights)

    def figures(self) -> dict[str, float]:
        """Of the best."""
        rate = self.workload.moved / self.fastest / 1e6
        return {"milliseconds": self.fastest, "gigabytes_per_second": rate}


def described(tile: Any) -> str:
    """Such as "columns 16 depth 256"."""
    return " ".join(f"{name} {value}" for name, value in vars(tile).items())
