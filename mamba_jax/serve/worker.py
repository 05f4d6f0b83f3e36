"""The thread that owns a server's model: it alone steps the engine."""

import dataclasses
import queue
import threading
import traceback
from collections.abc import Callable, Sequence

import jax

from mamba_jax.errors import InputError, clean_line
from mamba_jax.generation.text_engine import Piece, TextEngine
from mamba_jax.serve.job import Job

# Pieces that have come, each with its job and its place there, and how many continuations have ended.
Deliver = Callable[[list[tuple[Job, Piece]], int], None]


class Worker:
    """Steps an engine in a thread of its own; its methods are for one other thread, and never wait.

    Args:
        engine: the engine, which nobody else may use as long as the thread runs.
        deliver: gets the pieces; it is called in the thread and must not wait.
        fail: gets one line if the engine has failed, after which nothing is delivered any more.
    """

    def __init__(self, engine: TextEngine, deliver: Deliver, fail: Callable[[str], None]) -> None:
        self._engine, self._deliver, self._fail = engine, deliver, fail
        self._commands: queue.SimpleQueue[tuple[str, Job | None]] = queue.SimpleQueue()
        self._places: dict[int, tuple[Job, int]] = {}
        # A program that is being compiled cannot be interrupted; it shall not keep the process alive.
        self._thread = threading.Thread(target=self._run, name="mamba-jax engine", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Begins a job, whose continuations the engine has prepared."""
        self._commands.put(("submit", job))

    def cancel(self, job: Job) -> None:
        """Ends what is unfinished of a job."""
        self._commands.put(("cancel", job))

    def stop(self, timeout: float) -> bool:
        """Ends the thread; whether it has ended within so many seconds."""
        self._commands.put(("stop", None))
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _run(self) -> None:
        """Obeys commands and steps the engine, until told to stop."""
        try:
            while self._obey():
                self._hand_out(self._engine.step())
            for number in self._places:
                self._engine.cancel(number)
        # Whatever it is: clients wait for an answer.
        except BaseException as error:
            self._fail(_in_one_line(error))

    def _obey(self) -> bool:
        """Does what has been asked for; waits for it if there is nothing else to do. False to stop."""
        while True:
            try:
                command, job = self._commands.get(block=self._engine.is_idle)
            except queue.Empty:
                return True
            if job is None:
                return False
            if command == "submit":
                for place, continuation in enumerate(job.continuations):
                    self._places[self._engine.submit(continuation)] = (job, place)
            else:
                numbers = [number for number, (other, _) in self._places.items() if other is job]
                for number in numbers:
                    self._engine.cancel(number)
                    del self._places[number]
                self._deliver([], len(numbers))

    def _hand_out(self, pieces: Sequence[Piece]) -> None:
        """Delivers pieces with their jobs."""
        found, ended = [], 0
        for piece in pieces:
            job, place = self._places[piece.prompt]
            found.append((job, dataclasses.replace(piece, prompt=place)))
            if piece.generated is not None:
                del self._places[piece.prompt]
                ended += 1
        if found:
            self._deliver(found, ended)


def _in_one_line(error: BaseException) -> str:
    """Why the engine has failed; a defect's traceback goes to standard error."""
    if isinstance(error, MemoryError | jax.errors.JaxRuntimeError):
        return clean_line(f"the device has failed or is out of memory ({str(error)[:200] or 'MemoryError'})")
    if not isinstance(error, InputError):
        traceback.print_exception(error)
    return clean_line(f"the engine has failed ({type(error).__name__}: {str(error)[:200]})")
