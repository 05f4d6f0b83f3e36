"""Times attention by every implementation, beside torch's flash attention if torch is installed.

    python benchmarks/run_attention.py --device gpu
    python benchmarks/run_attention.py --device gpu --implementations cudnn torch --workloads long

Times are of whole jitted calls in bfloat16, forward, and forward with the gradients of queries, keys and values.
"""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp

import harness
from harness import Results, setting_here
from mamba_jax.cli import one_line_errors, parse
from mamba_jax.config_base import require
from mamba_jax.models.mixers.attention.attend import AttendOptions, attend
from mamba_jax.models.mixers.attention.rotary import positions_in_documents


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
    """Sizes of a call.

    Attributes:
        batch: rows.
        length: tokens of a row.
        heads: of queries.
        kv_heads: of keys and values.
        channels: of a head.
        window: tokens that a token attends to; None is all.
        documents: of equal length in a row.
    """

    batch: int
    length: int
    heads: int = 16
    kv_heads: int = 16
    channels: int = 64
    window: int | None = None
    documents: int = 1

    @property
    def scale(self) -> float:
        """Factor on the products of queries and keys."""
        return self.channels**-0.5

    @property
    def sizes(self) -> str:
        """For people."""
        sizes = f"({self.batch}, {self.length}), {self.heads} heads of {self.channels}"
        shared = f", {self.kv_heads} of keys" if self.kv_heads != self.heads else ""
        window = f", window {self.window}" if self.window else ""
        return sizes + shared + window + (f", {self.documents} documents" if self.documents > 1 else "")

    def arrays(self) -> tuple[jax.Array, ...]:
        """Random queries, keys, values, and a cotangent of the output."""
        keys = jax.random.split(jax.random.key(0), 4)
        heads = (self.heads, self.kv_heads, self.kv_heads, self.heads)
        return tuple(
            jax.random.normal(key, (self.batch, self.length, number, self.channels), jnp.bfloat16)
            for key, number in zip(keys, heads, strict=True)
        )

    def positions(self) -> jax.Array | None:
        """Of the tokens in their documents."""
        if self.documents == 1:
            return None
        ids_L = jnp.arange(self.length) * self.documents // self.length
        return positions_in_documents(self.length, jnp.broadcast_to(ids_L, (self.batch, self.length)))


WORKLOADS = {
    "training": Workload(batch=8, length=2048),
    "long": Workload(batch=1, length=16384),
    "packed": Workload(batch=8, length=2048, documents=5),
    "packed_long": Workload(batch=1, length=16384, documents=5),
    "window": Workload(batch=1, length=16384, window=2048),
    "grouped": Workload(batch=8, length=2048, kv_heads=4, channels=128),
}
IMPLEMENTATIONS = {"gpu": ("cudnn", "tokamax", "xla", "torch"), "tpu": ("splash", "xla"), "cpu": ("xla",)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What to time.

    Attributes:
        device: that JAX runs on.
        workloads: by name; None is all.
        implementations: by name; None is those of the device.
        seconds: to spend on each time.
        output: folder of the results.
    """

    device: Literal["gpu", "tpu", "cpu"] = "gpu"
    workloads: tuple[str, ...] | None = None
    implementations: tuple[str, ...] | None = None
    seconds: float = 1.0
    output: Path = harness.RESULTS

    def __post_init__(self) -> None:
        for name in self.workloads or ():
            require(name in WORKLOADS, f"--workloads: there is no {name!r}; choose of {', '.join(WORKLOADS)}")
        known = sorted({name for names in IMPLEMENTATIONS.values() for name in names})
        for name in self.implementations or ():
            require(name in known, f"--implementations: there is no {name!r}; choose of {', '.join(known)}")


@functools.partial(jax.jit, static_argnums=(0, 1))
def forward(options: AttendOptions, workload: Workload, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """The output, from queries, keys and values."""
    q, k, v = arrays[:3]
    return (attend(q, k, v, workload.positions(), options=options),)


@functools.partial(jax.jit, static_argnums=(0, 1))
def forward_backward(options: AttendOptions, workload: Workload, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """The output and the gradients of queries, keys and values, from these and a cotangent."""
    y, vjp = jax.vjp(lambda *qkv: forward(options, workload, *qkv)[0], *arrays[:3])
    return y, *vjp(arrays[3])


DIRECTIONS: dict[str, Callable[..., tuple[jax.Array, ...]]] = {
    "forward": forward,
    "forward + backward": forward_backward,
}


class Pending:
    """What torch computes on a GPU; waiting for it is waiting for the GPU."""

    def __init__(self, torch: Any, result: Any) -> None:
        """The module, and a tree of tensors that keeps them alive."""
        self._torch, self.result = torch, result

    def block_until_ready(self) -> "Pending":
        """Waits."""
        self._torch.cuda.synchronize()
        return self


def torch_call(workload: Workload, direction: str) -> Callable[[], Pending]:
    """Torch's flash attention of a workload.

    Raises:
        NotImplementedError: torch is not installed or has no GPU, or its flash attention has no such option.
    """
    try:
        import torch  # pyrefly: ignore[missing-import]
    except ImportError as error:
        raise NotImplementedError(f"torch cannot be imported: {error}") from error
    if not torch.cuda.is_available():
        raise NotImplementedError("torch has no GPU")
    if workload.documents > 1 or workload.window is not None:
        raise NotImplementedError("torch's flash attention takes one document a row and no window")
    heads = (workload.heads, workload.kv_heads, workload.kv_heads, workload.heads)
    q, k, v, dy = (
        torch.randn(workload.batch, workload.length, number, workload.channels, device="cuda", dtype=torch.bfloat16)
        .transpose(1, 2)
        .requires_grad_()
        for number in heads
    )

    def call() -> Pending:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
            y = torch.nn.functional.scaled_dot_product_attention(
                q, k, v, is_causal=True, enable_gqa=workload.heads != workload.kv_heads
            )
        return Pending(torch, y if direction == "forward" else torch.autograd.grad(y, (q, k, v), dy))

    return call


def jax_call(workload: Workload, direction: str, implementation: str) -> tuple[Callable[[], Any], float]:
    """A call of ours, and how far its results are from those in float32, relative to the largest of each."""
    options = AttendOptions(scale=workload.scale, window=workload.window, implementation=implementation)
    exact = dataclasses.replace(options, implementation="xla")
    arrays = workload.arrays()
    run = DIRECTIONS[direction]
    with jax.default_matmul_precision("highest"):
        expected = run(exact, workload, *(array.astype(jnp.float32) for array in arrays))
    found = run(options, workload, *arrays)
    error = max(
        float(jnp.max(jnp.abs(one.astype(jnp.float32) - other)) / jnp.max(jnp.abs(other)))
        for one, other in zip(found, expected, strict=True)
    )
    return lambda: run(options, workload, *arrays), error


def measure(results: Results, name: str, direction: str, implementation: str, *, seconds: float) -> None:
    """Adds the result of one implementation, or why there is none."""
    workload, figures = WORKLOADS[name], {}
    what = {"implementation": implementation, "direction": direction}
    title = f"{name} {workload.sizes}"
    try:
        if implementation == "torch":
            call = torch_call(workload, direction)
        else:
            call, figures["error"] = jax_call(workload, direction, implementation)
    except NotImplementedError as reason:
        results.add("attention", title, **what, declined=str(reason).splitlines()[0])
        return
    timing = harness.time_calls(call, seconds=seconds, in_a_row=jax.default_backend() != "cpu")
    results.add("attention", title, **what, milliseconds=timing.milliseconds, **figures)


def main() -> None:
    """Command-line entry."""
    with one_line_errors():
        options = parse(Options, prog="benchmarks/run_attention.py")
        harness.select_platform(options.device)
        results = Results(options.output, setting_here(harness.hardware(), libraries=("jaxlib",)))
        for name in options.workloads or WORKLOADS:
            for direction in DIRECTIONS:
                for implementation in options.implementations or IMPLEMENTATIONS[options.device]:
                    measure(results, name, direction, implementation, seconds=options.seconds)
        note = (
            "bfloat16; whole jitted calls, one after the other. `error` is the largest difference from XLA's "
            "implementation in float32 over the largest value, of the output and of each gradient."
        )
        print(f"wrote {results.write_table(f'attention_{options.device}', 'Attention', note)}")


if __name__ == "__main__":
    main()
