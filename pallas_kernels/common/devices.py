"""The platform that the function being traced is meant for."""

import re
from collections.abc import Mapping

import jax


def target_platform() -> str:
    """Platform of the computation being traced: "cpu", "gpu" or "tpu".

    Ahead-of-time compilation names its target through the abstract mesh; without one the process' default backend is
    the target.
    """
    abstract_device = jax.sharding.get_abstract_mesh().abstract_device
    platform = jax.default_backend() if abstract_device is None else abstract_device.platform
    return "gpu" if platform in ("cuda", "rocm") else platform


def target_device_kind() -> str:
    """Name of the kind of device that the computation being traced is meant for, such as "TPU v5 lite"."""
    abstract_device = jax.sharding.get_abstract_mesh().abstract_device
    return str(jax.local_devices()[0].device_kind if abstract_device is None else abstract_device.device_kind)


def entry_of_kind[Entry](table: Mapping[str, Entry], device_kind: str, *, default: str) -> Entry:
    """The first entry of a table whose key is part of the kind of device; that of `default` if there is none."""
    return next((entry for part, entry in table.items() if part in device_kind), table[default])


# By a word of the name, for GPUs that programs are compiled for where there is none to ask.
_COMPUTE_CAPABILITIES = {
    "A100": 80,
    "A30": 80,
    "A10": 86,
    "A10G": 86,
    "A40": 86,
    "L4": 89,
    "L40": 89,
    "L40S": 89,
    "H100": 90,
    "H200": 90,
    "H800": 90,
    "GH200": 90,
    "B200": 100,
    "GB200": 100,
}


def cuda_compute_capability() -> int | None:
    """Ten times the compute capability of the target GPU, such as 90; None if it is not a CUDA GPU or not known."""
    if target_platform() != "gpu":
        return None
    abstract_device = jax.sharding.get_abstract_mesh().abstract_device
    if abstract_device is not None:
        words = re.split(r"[^A-Z0-9]+", target_device_kind().upper())
        return next((_COMPUTE_CAPABILITIES[word] for word in words if word in _COMPUTE_CAPABILITIES), None)
    version = str(getattr(jax.local_devices()[0], "compute_capability", ""))
    return int(version.replace(".", "")) if re.fullmatch(r"\d+\.\d", version) else None
