"""The program that trains a model, or compiles its step for TPUs that need not be there."""

import argparse

from mamba_jax.cli import one_line_errors
from mamba_jax.config_files import CONFIG_HELP, load_config
from mamba_jax.errors import InputError


def main(prog: str = "python train.py") -> None:
    """Reads the command line and does what it asks for.

    Args:
        prog: what it is called by.
    """
    usage = f"{prog} CONFIG [flags] [--field value ...]"
    parser = argparse.ArgumentParser(prog, usage, add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("config", nargs="?", metavar="CONFIG", help=CONFIG_HELP)
    parser.add_argument("--help", "-h", action="store_true", help="print this and, with a CONFIG, all of its fields")
    for flag, text in {
        "--wait": "for another job that trains in train.run_dir",
        "--from-scratch": "set aside what train.run_dir holds, and begin at step 0",
        "--distributed": "find the other processes of the run through the launcher",
        "--compile-only": "compile the step for the TPUs of --topology, which need not be there, and report",
        "--verbose": "in that report, name the ten instructions that take most time",
    }.items():
        parser.add_argument(flag, action="store_true", help=text)
    parser.add_argument("--topology", nargs="?", help="such as v5e:4x4")
    parser.add_argument("--num-slices", nargs="?", const="(nothing)", default="1", help="of the topology; 1 by default")
    with one_line_errors():
        try:
            raise SystemExit(_run(parser))
        except argparse.ArgumentError as error:
            raise InputError(str(error)) from None


def _run(parser: argparse.ArgumentParser) -> int:
    """The exit status."""
    flags, overrides = parser.parse_known_args()
    if flags.help:
        parser.print_help()
    if flags.config is None:
        if flags.help:
            return 0
        raise InputError(f"{parser.format_usage().strip()}; --help says more")
    from mamba_jax.export.initial import model_for

    config = load_config(flags.config, overrides + ["--help"] * flags.help, model_for=model_for)
    if flags.compile_only:
        from mamba_jax.pods.compile import print_report

        return print_report(config, flags.topology, flags.num_slices, largest=10 * flags.verbose)
    if (flags.topology, flags.num_slices, flags.verbose) != (None, "1", False):
        raise InputError("--topology, --num-slices and --verbose are of --compile-only: pass that too")
    from mamba_jax.run import distributed, loop, watchdog

    distributed.initialize(detect=flags.distributed)
    try:
        result = loop.train(config, wait=flags.wait, from_scratch=flags.from_scratch)
    finally:
        watchdog.end_within(config.faults.deadline_seconds)
    return 0 if result.stop_signal is None else 128 + result.stop_signal
