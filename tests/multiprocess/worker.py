"""One process of a run with a fault built in: python worker.py FAULT train.py CONFIG [flags].

FAULT is `none`, or KIND@PLACE as in `SIGTERM@step:6`. KIND is a signal that the process sends to itself, `hang` or
`crash`; `SIGKILL+0.05` comes 0.05 s later. PLACE is `step:K` (when its batch is drawn), `compile`, `evaluation`,
`sample`, or `save:K` (when the save of step K has begun). Batches are slow from then on, so that the run is not over
before its processes have agreed where to stop.
"""

import functools
import os
import runpy
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax

from mamba_jax.checkpoint import Checkpointer
from mamba_jax.data.pipeline import TrainBatches
from mamba_jax.run import held_out, loop

SLOW_SECONDS = 0.5
has_struck = threading.Event()


def strike(kind: str) -> None:
    """Does what the fault says, at once or later."""
    name, _, delay = kind.partition("+")
    print(f"fault at {time.time()}", file=sys.stderr, flush=True)
    has_struck.set()
    if name == "hang":
        time.sleep(3600)
    elif name == "crash":
        raise RuntimeError("the fault of a test")
    elif delay:
        threading.Timer(float(delay), os.kill, (os.getpid(), signal.Signals[name])).start()
    else:
        os.kill(os.getpid(), signal.Signals[name])


def build_in(fault: str) -> None:
    """Makes the named place strike when it is reached for the first time."""
    kind, _, place = fault.partition("@")
    name, _, step = place.partition(":")
    TrainBatches.iterate = _striking_iterate(TrainBatches.iterate, kind, int(step) if name == "step" else -1)
    if name == "step":
        return
    if name == "compile":
        jax.stages.Lowered.compile = _before(jax.stages.Lowered.compile, kind)
    elif name == "evaluation":
        held_out.evaluate = _before(held_out.evaluate, kind)
    elif name == "sample":
        loop.complete = _before(loop.complete, kind)
    elif name == "save":
        Checkpointer.save = _striking_save(Checkpointer.save, kind, int(step))
    else:
        raise ValueError(f"no place {place!r} for a fault")


def _striking_iterate(iterate: Callable[..., Any], kind: str, step: int) -> Callable[..., Iterator[Any]]:
    def striking(self: TrainBatches, start_step: int) -> Iterator[Any]:
        for index, batch in enumerate(iterate(self, start_step), start_step):
            if has_struck.is_set():
                time.sleep(SLOW_SECONDS)
            if index + 1 == step:
                strike(kind)
            yield batch

    return striking


def _before(function: Callable[..., Any], kind: str) -> Callable[..., Any]:
    pending = [kind]

    @functools.wraps(function)
    def striking(*args: Any, **kwargs: Any) -> Any:
        if pending:
            strike(pending.pop())
        return function(*args, **kwargs)

    return striking


def _striking_save(save: Callable[..., Any], kind: str, step: int) -> Callable[..., Any]:
    def striking(self: Checkpointer, saved_step: int, *args: Any, **kwargs: Any) -> Any:
        result = save(self, saved_step, *args, **kwargs)
        if saved_step == step:
            strike(kind)
        return result

    return striking


if __name__ == "__main__":
    chosen, program = sys.argv[1:3]
    if chosen != "none":
        build_in(chosen)
    sys.argv = sys.argv[2:]
    runpy.run_path(program, run_name="__main__")
