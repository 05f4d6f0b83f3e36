"""What the command-line programs share: error lines, output that may fail, flags."""

import contextlib
import io
import os
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import tyro

from mamba_jax.errors import InputError

# Ctrl-C that ended the program at once. 128 + SIGINT is left to a run that Ctrl-C stopped and that has saved.
EXIT_INTERRUPTED = 3


class EnduringStream:
    r"""A text stream in front of another one that may fail: what cannot be written is lost, and nothing is raised.

    The other one may be closed, lead to a reader that went away, a terminal that hung up or a full disk. A character
    that its encoding does not have is written as an escape such as `\u2581`. All else is asked of the other stream.

    Attributes:
        failure: why something was lost, of the last time; None as long as all was written.
    """

    def __init__(self, stream: Any) -> None:
        """Takes the stream to write to, whatever class it is of."""
        self.failure: OSError | ValueError | None = None
        self._stream = stream

    def write(self, text: str) -> int:
        """Writes `text` if that is possible, and returns its length."""
        try:
            try:
                self._stream.write(text)
            except UnicodeEncodeError:
                encoding = self._stream.encoding or "ascii"
                self._stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        except (OSError, ValueError) as error:
            self.failure = error
        return len(text)

    def writelines(self, lines: Sequence[str]) -> None:
        """Writes texts one after the other."""
        self.write("".join(lines))

    def flush(self) -> None:
        """Hands on what is buffered."""
        try:
            self._stream.flush()
        except (OSError, ValueError) as error:
            self.failure = error

    def isatty(self) -> bool:
        """Whether a terminal is behind it, and there still."""
        try:
            return self._stream.isatty()
        except (OSError, ValueError):
            return False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def enduring(stream: Any) -> EnduringStream:
    """The text stream as one that raises nothing; one that is so already stays, None becomes one that loses all."""
    if isinstance(stream, EnduringStream):
        return stream
    return EnduringStream(_Nowhere() if stream is None else stream)


class _Nowhere(io.StringIO):
    def write(self, text: str) -> int:
        return len(text)


def endure_lost_output() -> None:
    """Makes standard output and standard error such that writing to them never ends this process.

    That holds until it exits: Python's last flush would otherwise turn its exit status into 120. Descriptors 0 to 2
    that were closed lead to nowhere from here on, because the next file to be opened would get their number, and with
    it all that compilers and watchdogs write past Python.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # The lowest number that is free.
            os.open(os.devnull, os.O_RDWR)
    for name in ("stdout", "stderr"):
        setattr(sys, name, enduring(getattr(sys, name)))


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Turns an `InputError` into `error: ...` on standard error and status 2, and Ctrl-C into a line and status 3.

    Output that is lost ends nothing.
    """
    endure_lost_output()
    try:
        yield
    except InputError as error:
        print("error:", error, file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("interrupted: what was not saved before is lost", file=sys.stderr)
        raise SystemExit(EXIT_INTERRUPTED) from None


def print_result(text: str) -> None:
    """Prints what a program was called for; a reader that has had enough of it is not an error.

    Raises:
        InputError: it cannot be written, as on a full disk.
    """
    print(text, flush=True)
    failure = getattr(sys.stdout, "failure", None)
    if failure is not None and not isinstance(failure, BrokenPipeError):
        reason = getattr(failure, "strerror", None) or failure
        raise InputError(f"cannot write the result to standard output ({reason}): send it elsewhere")


def parse[T](
    cls: type[T], args: Sequence[str] | None = None, *, default: T | None = None, prog: str | None = None
) -> T:
    """Reads command-line flags into a dataclass.

    Args:
        cls: the dataclass; its field docstrings become the help text.
        args: the arguments; None takes those of the process.
        default: values of flags that are not given.
        prog: program name in messages.

    Raises:
        InputError: a flag is unknown (the closest known one is named), misses its value or has a bad one.
    """
    messages = io.StringIO()
    try:
        with contextlib.redirect_stderr(messages):
            return tyro.cli(cls, args=args, default=default, prog=prog, config=(tyro.conf.AvoidSubcommands,))
    except SystemExit as stop:
        if stop.code == 0:
            raise
        raise InputError(_one_line(messages.getvalue())) from None


def _one_line(report: str) -> str:
    """The first statement of tyro's report, which it sets in a box on a terminal, and its best suggestion."""
    report = re.sub(r"\[/?bold\]", "", report)
    paragraphs: list[list[str]] = [[]]
    for line in (line.strip("│╭╮╰╯|+ ") for line in report.splitlines()):
        if line.startswith("─") or (line and not line.strip("-")):
            paragraphs.append([])
        elif line:
            paragraphs[-1].append(line)
    statements = [lines for lines in paragraphs if any(":" in line or "--" in line for line in lines)]
    flags = [[line.split()[0] for line in lines if line.startswith("--")] for lines in statements]
    if not statements:
        return " ".join(report.split())
    if statements[0][0].startswith("Missing from"):
        return f"missing {', '.join(flags[0]) or 'an argument'}; --help explains it"
    message = " ".join(statements[0])
    suggestion = next((flag for group in flags[1:] for flag in group), None)
    return f"{message}; did you mean {suggestion}?" if message.startswith("Unrecognized") and suggestion else message
