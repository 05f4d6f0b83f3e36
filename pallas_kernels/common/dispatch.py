"""Choice of the implementation of an op: by name, or in the order of preference of the target platform."""

import dataclasses
import functools
import importlib
import logging
from collections.abc import Callable, Mapping
from typing import Any

import jax

from pallas_kernels.common.devices import target_platform

logger = logging.getLogger("pallas_kernels")


@dataclasses.dataclass(frozen=True)
class Backend:
    """An implementation that is imported when it is first called, so that one which cannot be leaves the others alone.

    Attributes:
        module: full name of the module.
        function: name of the function in it.
        options: keyword arguments that it is called with besides.
    """

    module: str
    function: str
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __call__(self, *args: Any) -> Any:
        """Calls the function.

        Raises:
            NotImplementedError: the module cannot be imported; backends use private parts of JAX, which change.
        """
        try:
            function = getattr(importlib.import_module(self.module), self.function)
        except (ImportError, AttributeError) as error:
            raise NotImplementedError(f"{self.module} cannot be imported here: {error}") from error
        return function(*args, **self.options)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dispatcher[Output]:
    """The implementations of one op.

    An implementation raises NotImplementedError, while it is traced, for arguments that it cannot take. Its operations
    carry the name scope `op.implementation`, so that a lowered module shows what ran.

    Attributes:
        op: name of the op.
        implementations: by name; all take the same arguments.
        platform_order: names to try on a platform, best first. A platform without an entry has `default_order`.
        default_order: names to try on any other platform.
    """

    op: str
    implementations: Mapping[str, Callable[..., Output]]
    platform_order: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    default_order: tuple[str, ...] = ("xla",)

    def using(self, implementation: str | None) -> Callable[..., Output]:
        """The op as a function of its arguments, by the named implementation."""
        return functools.partial(self, implementation=implementation)

    def __call__(self, *args, implementation: str | None, **kwargs) -> Output:
        """Runs the named implementation, or the first of the platform's order that can take the arguments.

        Raises:
            ValueError: there is no implementation of that name.
            NotImplementedError: the named implementation cannot take the arguments.
            ExceptionGroup: no implementation of the platform's order can; it holds the reason of each.
        """
        if implementation is not None:
            if implementation not in self.implementations:
                raise ValueError(
                    f"{self.op}: unknown implementation {implementation!r}; choose None or one of "
                    f"{', '.join(self.implementations)}"
                )
            return self._run(implementation, *args, **kwargs)

        platform = target_platform()
        reasons: list[NotImplementedError] = []
        for name in self.platform_order.get(platform, self.default_order):
            try:
                output = self._run(name, *args, **kwargs)
            except NotImplementedError as reason:
                reason.add_note(f"raised by implementation {name!r}")
                reasons.append(reason)
                continue
            _log_once(self.op, name, platform, tuple(map(str, reasons)))
            return output
        raise ExceptionGroup(f"{self.op}: no implementation for {platform} takes these arguments", reasons)

    def _run(self, name: str, *args, **kwargs) -> Output:
        with jax.named_scope(f"{self.op}.{name}"):
            return self.implementations[name](*args, **kwargs)


@functools.cache
def _log_once(op: str, name: str, platform: str, reasons: tuple[str, ...]) -> None:
    """Reports the choice, as a warning when a preferred implementation declined."""
    level = logging.WARNING if reasons else logging.INFO
    suffix = f" (preferred implementations declined: {'; '.join(reasons)})" if reasons else ""
    logger.log(level, "%s runs as %r on %s%s", op, name, platform, suffix)
