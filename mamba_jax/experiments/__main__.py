"""Makes the experiments of the papers: python -m mamba_jax.experiments induction_heads."""

import dataclasses
import fnmatch
from pathlib import Path
from typing import Annotated

import tyro

from mamba_jax.cli import one_line_errors, parse, print_result
from mamba_jax.config_base import require
from mamba_jax.config_files import call_config, configs_folder
from mamba_jax.errors import InputError
from mamba_jax.experiments.declaration import Experiment, Scale
from mamba_jax.experiments.page import write_page
from mamba_jax.experiments.runs import Run, make, make_beside_each_other, plan, unfinished

_CONFIGS = configs_folder() / "experiments"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """Trains and judges every cell of an experiment, and writes what came of it beside the published results.

    Cells that are finished stay as they are, so the same command goes on where it was stopped.

    Attributes:
        name: the experiment; without one, the page alone is written anew from the results there are.
        list: name the experiments and their cells instead.
        scale: "reduced" for two CPU cores, "short" for minutes of one GPU, "published" as in the paper.
        seeds: seeds of the runs of each cell.
        only: names of cells, or patterns such as 'mamba-*'; none takes all.
        jobs: runs at a time, each by a process of its own on the same device.
        output: folder for `results.md`, and `results/` with records and pictures.
        runs: folder for the run directories.
    """

    name: Annotated[str | None, tyro.conf.Positional] = None
    list: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    scale: Scale = "reduced"
    seeds: tuple[int, ...] = (0,)
    only: tuple[str, ...] = ()
    jobs: int = 1
    output: str = "docs"
    runs: str = "runs/experiments"

    def check(self) -> None:
        """Raises an InputError where numbers mean nothing."""
        require(self.jobs > 0, f"--jobs must be positive, got {self.jobs}")
        is_set = 0 < len(self.seeds) == len(set(self.seeds))
        require(is_set, f"--seeds takes different numbers, got {' '.join(map(str, self.seeds)) or 'none'}")


def main(prog: str = "python -m mamba_jax.experiments") -> None:
    """Reads the command line, makes what is not finished, and writes the page.

    Args:
        prog: what it is called by.
    """
    with one_line_errors():
        raise SystemExit(_main(parse(Arguments, prog=prog)))


def names() -> tuple[str, ...]:
    """The experiments that there are."""
    return tuple(sorted(path.stem for path in _CONFIGS.glob("[a-z]*.py")))


def experiment(name: str, scale: Scale) -> Experiment:
    """An experiment by its name.

    Raises:
        InputError: there is none of this name.
    """
    if name not in names():
        raise InputError(f"no experiment {name!r}; there are {', '.join(names()) or f'none in {_CONFIGS}'}")
    return call_config(str(_CONFIGS / f"{name}.py"), "get_experiment", scale)


def _main(arguments: Arguments) -> int:
    """The exit status: 0 if all runs are finished, 2 if one is not, 128 plus the signal that stopped it."""
    arguments.check()
    if arguments.list:
        for name in names():
            found = experiment(name, arguments.scale)
            print_result(f"{name}: {found.title} ({found.source})\n  {' '.join(cell.name for cell in found.cells)}")
        return 0
    output = Path(arguments.output)
    status = 0 if arguments.name is None else _make_all(arguments.name, arguments, output / "results")
    known = {name: (lambda scale, name=name: experiment(name, scale)) for name in names()}
    print_result(f"wrote {write_page(output, known)}")
    return status


def _make_all(name: str, arguments: Arguments, results: Path) -> int:
    """Makes the runs that are asked for and not finished; returns the exit status."""
    found = experiment(name, arguments.scale)
    runs = _chosen(plan(name, arguments.scale, found, arguments.seeds, Path(arguments.runs)), arguments)
    path = results / f"{name}.jsonl"
    left = unfinished(runs, path)
    if len(left) < len(runs):
        print(f"{len(runs) - len(left)} of {len(runs)} runs were finished before", flush=True)
    if arguments.jobs > 1:
        places = ("--output", arguments.output, "--runs", arguments.runs)
        make_beside_each_other(left, path, places, arguments.jobs)
    else:
        for run in left:
            if (signal := make(run, found, path)) is not None:
                return 128 + signal
    return 2 if unfinished(runs, path) else 0


def _chosen(runs: list[Run], arguments: Arguments) -> list[Run]:
    """The runs of the cells that `--only` names.

    Raises:
        InputError: a pattern names none.
    """
    cells = list(dict.fromkeys(run.cell.name for run in runs))
    for pattern in arguments.only:
        if not fnmatch.filter(cells, pattern):
            raise InputError(f"--only {pattern}: no such cell; there are {', '.join(cells)}")
    wanted = arguments.only or ("*",)
    return [run for run in runs if any(fnmatch.fnmatchcase(run.cell.name, pattern) for pattern in wanted)]


if __name__ == "__main__":
    main()
