"""What the command-line programs share: error lines, config files with overrides, a quiet log."""

import contextlib
import importlib.util
import io
import re
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path

import tyro

from mamba_jax.config import ExperimentConfig
from mamba_jax.errors import InputError

# Ctrl-C that ended the program at once. 128 + SIGINT is left to a run that Ctrl-C stopped and that has saved.
EXIT_INTERRUPTED = 3


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Turns an `InputError` into `error: ...` on standard error and status 2, and Ctrl-C into a line and status 3."""
    try:
        yield
    except InputError as error:
        print("error:", " ".join(str(error).splitlines()), file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("interrupted: what was not saved before is lost", file=sys.stderr)
        raise SystemExit(EXIT_INTERRUPTED) from None


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
    if statements[0][0].startswith("Missing from"):
        return f"missing {', '.join(flags[0]) or 'an argument'}; --help explains it"
    message = " ".join(statements[0])
    suggestion = next((flag for group in flags[1:] for flag in group), None)
    return f"{message}; did you mean {suggestion}?" if message.startswith("Unrecognized") and suggestion else message


def load_config(path: str, overrides: Sequence[str]) -> ExperimentConfig:
    """Runs `get_config()` of a config file and applies overrides such as `--train.num-steps 100`.

    Args:
        path: a Python file that defines `get_config() -> ExperimentConfig`.
        overrides: command-line flags.

    Raises:
        InputError: the file is missing, cannot be run, has no `get_config`, or it returns something else.
    """
    if not Path(path).is_file():
        raise InputError(f"no config file {path!r}; configs/ holds the ones that come with the project")
    try:
        config = _run_config_file(path)
    except InputError:
        raise
    except (Exception, SystemExit) as error:
        raise InputError(f"config {path!r} cannot be run{_place(error, path)}: {_describe(error)}") from error
    if not isinstance(config, ExperimentConfig):
        raise InputError(f"get_config() of {path!r} returned {type(config).__name__}, expected ExperimentConfig")
    return parse(ExperimentConfig, overrides, default=config, prog=f"train.py {path}")


def _run_config_file(path: str) -> object:
    spec = importlib.util.spec_from_file_location("mamba_jax_run_config", path)
    if spec is None or spec.loader is None:
        raise InputError(f"config {path!r} is not a Python file; its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not callable(getattr(module, "get_config", None)):
        raise InputError(f"config {path!r} defines no get_config()")
    return module.get_config()


def _place(error: BaseException, path: str) -> str:
    """Where in the config file it happened; empty if that is not known."""
    places = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    if isinstance(error, SyntaxError):
        places.append((error.filename or "", error.lineno))
    lines = [line for file, line in places if line is not None and Path(file) == Path(path).absolute()]
    return f", line {lines[-1]}" if lines else ""


def _describe(error: BaseException) -> str:
    text = error.msg if isinstance(error, SyntaxError) else str(error)
    return f"{type(error).__name__}: {' '.join(text.split())}"
