"""The one exception type that command-line programs turn into a single line."""


class InputError(ValueError):
    """Something the user gave is wrong: a config value, a file, a token id.

    The message is one line: what is wrong, the offending value, and what to do. `train.py`, `eval.py` and the
    `python -m mamba_jax...` commands print it as `error: ...` and exit with status 2. Any other exception is a defect
    of this library and keeps its traceback. Names of files and values out of them may hold line breaks and worse, so
    whatever cannot be shown is escaped.
    """

    def __init__(self, message: str) -> None:
        if not message.isprintable():
            message = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in message)
        super().__init__(message)
