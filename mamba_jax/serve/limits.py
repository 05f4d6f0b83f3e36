"""What a server allows its clients."""

import dataclasses
import math

from mamba_jax.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """What a server allows its clients.

    Attributes:
        max_queue: continuations that may wait for a row; requests that would exceed it get status 429.
        max_body: most bytes of a request.
        max_connections: clients that may be connected; more get status 503.
        timeout: seconds from a request to the end of its answer, waiting included.
        body_timeout: seconds that a client may take to send a request.
        grace: seconds that a server which is told to stop gives running requests to end.
    """

    max_queue: int = 256
    max_body: int = 2**20
    max_connections: int = 512
    timeout: float = 600.0
    body_timeout: float = 20.0
    grace: float = 30.0

    def __post_init__(self) -> None:
        for name, least in (("max_queue", 0), ("max_body", 1), ("max_connections", 1), ("grace", 0)):
            if not least <= (value := getattr(self, name)) < math.inf:
                raise InputError(f"{name} must be {least} or more, and finite, got {value}")
        for name in ("timeout", "body_timeout"):
            if not 0 < (value := getattr(self, name)) < math.inf:
                raise InputError(f"{name} must be a positive number of seconds, got {value}")
