"""Writes the page of one run, or of several to compare: python -m mamba_jax.report runs/quickstart."""

import dataclasses
import os
from pathlib import Path

import tyro

from mamba_jax.cli import one_line_errors, parse
from mamba_jax.errors import InputError
from mamba_jax.files import replacement
from mamba_jax.report.page import render
from mamba_jax.report.run import read_runs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """Shows training runs as one HTML page that needs no network; a run that is still going will do.

    Attributes:
        run_dirs: directories of runs, or folders of such; several runs are compared in one page.
        output: the file to write; None is report.html in the first run's directory.
    """

    run_dirs: tyro.conf.Positional[tuple[str, ...]]
    output: str | None = None


def main(prog: str = "python -m mamba_jax.report") -> None:
    """Reads the command line, writes the page and says where it is.

    Args:
        prog: what it is called by.
    """
    with one_line_errors():
        arguments = parse(Arguments, prog=prog)
        if not arguments.run_dirs:
            raise InputError("missing RUN_DIR: give the train.run_dir of a run, or of several to compare")
        page = render([run for folder in arguments.run_dirs for run in read_runs(Path(folder))])
        output = Path(arguments.output or Path(arguments.run_dirs[0]) / "report.html")
        # Half of a surrogate pair, as in the name of a folder that is not UTF-8, is shown as an escape.
        content = page.encode("utf-8", "backslashreplace")
        try:
            _write(output, content)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise InputError(f"cannot write {output} ({reason}): choose another file with --output") from None
        print(f"wrote {output} ({len(content) / 1e6:.1f} MB)")


def _write(output: Path, content: bytes) -> None:
    """Writes a file whole or not at all; into a pipe or device, which must have a reader."""
    if output.is_file() or not output.exists():
        with replacement(output) as temporary:
            temporary.write_bytes(content)
        return
    descriptor = os.open(output, os.O_WRONLY | os.O_NONBLOCK)
    os.set_blocking(descriptor, True)
    with open(descriptor, "wb") as file:
        file.write(content)


if __name__ == "__main__":
    main()
