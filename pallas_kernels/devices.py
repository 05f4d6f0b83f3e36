"""The platform that the function being traced is meant for."""

import jax


def target_platform() -> str:
    """Platform of the computation being traced: "cpu", "gpu" or "tpu".

    Ahead-of-time compilation names its target through the abstract mesh; without one the process' default backend is
    the target.
    """
    abstract_device = jax.sharding.get_abstract_mesh().abstract_device
    platform = jax.default_backend() if abstract_device is None else abstract_device.platform
    return "gpu" if platform in ("cuda", "rocm") else platform
