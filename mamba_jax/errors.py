"""The exception type that command-line programs print as a single line, and helpers for its messages."""

import reprlib

_LONGEST = 2000
_SHORT = reprlib.Repr(maxlevel=2, maxdict=3, maxlist=6, maxstring=80, maxlong=40, maxother=80)


def clean_line(text: str) -> str:
    """The text as one line that is safe to print: line breaks become spaces, control characters become escapes.

    Args:
        text: any text, such as a message that quotes file names; from a very long one the middle is left out.
    """
    line = " ".join(part for part in text.splitlines() if part)
    line = "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in line)
    return line if len(line) <= _LONGEST else f"{line[: _LONGEST // 2]} ... {line[-_LONGEST // 2 :]}"


def reason(error: OSError | ValueError) -> str:
    """Why a system call failed, without the path. Python raises ValueError for impossible names, with a NUL in them."""
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error)


def brief(error: Exception) -> str:
    """What another library says of an error, as one line of at most 300 characters; its class if that is nothing."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:300] + " ..."


def short(value: object) -> str:
    """A short text for any value, such as one read from a file, to be quoted in a message."""
    return _SHORT.repr(value)


class InputError(ValueError):
    """Something the user gave is wrong: a config value, a file, a token id.

    The message is one line: what is wrong, the offending value, and what to do. `train.py`, `eval.py` and the
    `python -m mamba_jax...` commands print it as `error: ...` and exit with status 2. Any other exception is a defect
    of this library and keeps its traceback.

    Args:
        message: the message; it is passed through `clean_line`.
    """

    def __init__(self, message: str) -> None:
        super().__init__(clean_line(message))
