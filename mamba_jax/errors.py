"""The one exception type that command-line programs turn into a single line, and what its messages are made of."""

import reprlib

_LONGEST = 2000
_SHORT = reprlib.Repr(maxlevel=2, maxdict=3, maxlist=6, maxstring=80, maxlong=40, maxother=80)


def clean_line(text: str) -> str:
    """The text in one line that does nothing to a terminal: what would break or colour it is spelt out.

    Args:
        text: may quote names of files and words of other libraries; a very long one loses its middle.
    """
    line = " ".join(part for part in text.splitlines() if part)
    line = "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in line)
    return line if len(line) <= _LONGEST else f"{line[: _LONGEST // 2]} ... {line[-_LONGEST // 2 :]}"


def reason(error: OSError | ValueError) -> str:
    """Why a system call failed, without the path; a name that no file can have is a ValueError."""
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error)


def short(value: object) -> str:
    """A value out of a file for a message, whatever its size and depth."""
    return _SHORT.repr(value)


class InputError(ValueError):
    """Something the user gave is wrong: a config value, a file, a token id.

    The message is one line: what is wrong, the offending value, and what to do. `train.py`, `eval.py` and the
    `python -m mamba_jax...` commands print it as `error: ...` and exit with status 2. Any other exception is a defect
    of this library and keeps its traceback.

    Args:
        message: goes through `clean_line`.
    """

    def __init__(self, message: str) -> None:
        super().__init__(clean_line(message))
