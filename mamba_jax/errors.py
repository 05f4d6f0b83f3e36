"""The one exception type that command-line programs turn into a single line."""

_LONGEST = 2000


class InputError(ValueError):
    """Something the user gave is wrong: a config value, a file, a token id.

    The message is one line: what is wrong, the offending value, and what to do. `train.py`, `eval.py` and the
    `python -m mamba_jax...` commands print it as `error: ...` and exit with status 2. Any other exception is a defect
    of this library and keeps its traceback.

    Args:
        message: may quote names of files and words of other libraries; what in them would break or colour the line is
            spelt out, and a very long one loses its middle.
    """

    def __init__(self, message: str) -> None:
        line = " ".join(message.splitlines())
        line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
        if len(line) > _LONGEST:
            line = f"{line[: _LONGEST // 2]} ... {line[-_LONGEST // 2 :]}"
        super().__init__(line)
