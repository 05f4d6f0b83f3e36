"""The `mamba-jax` command: every program of the package by one name.

mamba-jax train quickstart
mamba-jax generate runs/quickstart --prompt "The President"
"""

import difflib
import importlib
import sys

import mamba_jax
from mamba_jax.cli import one_line_errors, print_result
from mamba_jax.config_files import list_configs
from mamba_jax.errors import InputError

# By name: the module whose `main(prog)` it is, words that go before those given, and what it does.
_PROGRAMS = {
    "train": ("mamba_jax.commands.train", (), "train a model from a config"),
    "eval": ("mamba_jax.commands.evaluate", (), "held-out loss, tasks and a sample of a checkpoint"),
    "generate": ("mamba_jax.commands.generate", (), "continue prompts"),
    "serve": ("mamba_jax.serve.__main__", (), "serve a checkpoint over HTTP"),
    "export": ("mamba_jax.export.__main__", (), "write a checkpoint for other programs"),
    "report": ("mamba_jax.report.__main__", (), "a page about a run, or several to compare"),
    "sweep": ("mamba_jax.sweep", (), "train a config with several values of its fields"),
    "experiments": ("mamba_jax.experiments.__main__", (), "make the papers' experiments and compare with them"),
    "prepare": ("mamba_jax.data.prepare", (), "make token shards of text"),
    "train-tokenizer": ("mamba_jax.data.train_tokenizer", (), "train a tokenizer on text"),
    "compile": ("mamba_jax.commands.train", ("--compile-only",), "compile the step for TPUs that need not be there"),
}
_CONFIGS = "configs"


def main() -> None:
    """Hands over to the program that the first word names."""
    with one_line_errors():
        words = sys.argv[1:]
        if not words or words[0] in ("--help", "-h"):
            print_result(_usage())
        elif words[0] == "--version":
            print_result(f"mamba-jax {mamba_jax.__version__}")
        elif words == [_CONFIGS]:
            print_result(list_configs())
        else:
            _run(*words)


def _run(name: str, *words: str) -> None:
    """Runs a program with the words that follow its name.

    Raises:
        InputError: there is none of this name.
    """
    if name not in _PROGRAMS:
        near = difflib.get_close_matches(name, [*_PROGRAMS, _CONFIGS], n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise InputError(f"no command {' '.join((name, *words))!r}: {hint}mamba-jax --help lists them")
    module, first, _ = _PROGRAMS[name]
    prog = f"mamba-jax {name}"
    sys.argv = [prog, *first, *words]
    importlib.import_module(module).main(prog)


def _usage() -> str:
    commands = {name: what for name, (_, _, what) in _PROGRAMS.items()}
    commands[_CONFIGS] = "list the configs that come with the package, to be given to train by name"
    width = max(map(len, commands))
    lines = [f"  {name:<{width}}  {what}" for name, what in commands.items()]
    return "\n".join(["usage: mamba-jax COMMAND ...; mamba-jax COMMAND --help explains it", "", *lines])


if __name__ == "__main__":
    main()
