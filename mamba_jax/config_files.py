"""Config files: found by path or by the name of one that comes with the package, run or read, and changed by flags."""

import contextlib
import dataclasses
import difflib
import importlib.util
import json
import os
import re
import sys
import traceback
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from mamba_jax import cli
from mamba_jax.config_base import from_json
from mamba_jax.errors import InputError
from mamba_jax.experiment import FROM_CHECKPOINT, ExperimentConfig
from mamba_jax.models.config import ModelConfig
from mamba_jax.training.config import TrainConfig

CONFIG_HELP = "a name that `mamba-jax configs` lists, a Python file with get_config(), or a config as JSON or YAML"
# YAML 1.1 takes 1e-3 for a text, as it has no point.
_FLOAT_WITHOUT_POINT = re.compile(r"^[-+]?[0-9]+[eE][-+]?[0-9]+$")
_SUFFIXES = (".py", ".json", ".yaml", ".yml")


def shipped_configs() -> dict[str, Path]:
    """The config files that come with the package, by name, such as "quickstart" or "hybrids/jamba_like_130m"."""
    folder = configs_folder()
    paths = {path.relative_to(folder).with_suffix("").as_posix(): path for path in sorted(folder.glob("**/*.py"))}
    return {name: path for name, path in paths.items() if "def get_config(" in path.read_text(encoding="utf-8")}


def list_configs() -> str:
    """A line for each config that comes with the package: its name and what it is."""
    found = shipped_configs()
    width = max(map(len, found), default=0)
    lines = {name: path.read_text(encoding="utf-8").split('"""', 2)[1].splitlines()[0] for name, path in found.items()}
    return "\n".join(f"{name:<{width}}  {line}" for name, line in lines.items())


def configs_folder() -> Path:
    """The folder of the configs that come with the package: inside it, or beside it in a checkout."""
    package = Path(__file__).parent
    return next(folder for folder in (package / "configs", package.parent / "configs") if folder.is_dir())


def load_config(
    path: str, overrides: Sequence[str], *, model_for: Callable[[TrainConfig], ModelConfig] | None = None
) -> ExperimentConfig:
    """Reads a config and applies overrides such as `--train.num-steps 100`.

    Args:
        path: a Python file that defines `get_config() -> ExperimentConfig`, a file with the fields as JSON (as the
            `config.json` of a run) or YAML, or the name of a config that comes with the package.
        overrides: command-line flags.
        model_for: gives the model of what the config's `train` begins with, if it or `--model from_checkpoint` asks for
            that; flags then change its fields. None leaves the config as it is.

    Raises:
        InputError: there is no such file or name, it cannot be read or run, has no `get_config`, or gives something
            else; or what `model_for` raises.
    """
    file = str(_found(path))
    if Path(file).suffix != ".py":
        return _with_flags(path, _from_text(file), overrides, model_for)
    with _config_module(file) as module:
        config = _called(file, module, "get_config")
        if not isinstance(config, ExperimentConfig):
            raise InputError(f"get_config() of {path!r} returned {type(config).__name__}, expected ExperimentConfig")
        # In the module, where the types of a config's own dataclasses are looked up.
        return _with_flags(path, config, overrides, model_for)


def _with_flags(
    path: str,
    config: ExperimentConfig,
    overrides: Sequence[str],
    model_for: Callable[[TrainConfig], ModelConfig] | None,
) -> ExperimentConfig:
    words, config = _with_model(list(overrides), config, model_for)
    return cli.parse(ExperimentConfig, words, default=config, prog=f"train.py {path}")


def _found(path: str) -> Path:
    """The file of this path, or of the shipped config of this name; a file of the user's goes first."""
    # `os.path.exists` is false where a path is too long or holds a zero.
    if Path(path).suffix or os.path.exists(path):
        return Path(path)
    configs = shipped_configs()
    if path in configs:
        return configs[path]
    near = difflib.get_close_matches(path, configs, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise InputError(
        f"no config file {path!r}, and none of this name comes with the package: {hint}see mamba-jax configs"
    )


def _from_text(path: str) -> ExperimentConfig:
    """A config that is written as JSON or YAML."""
    try:
        text = _read_config_file(path).decode()
        if Path(path).suffix != ".json":
            # Strict reading is of JSON, where a tuple is a list.
            text = json.dumps(yaml.load(text, _YamlLoader), allow_nan=False)
    except (ValueError, TypeError, yaml.YAMLError) as error:
        raise InputError(f"config {path!r} cannot be read: {_describe(error)}") from None
    return from_json(ExperimentConfig, text, origin=path)


class _YamlLoader(yaml.SafeLoader):
    """Plain values, with numbers as JSON has them."""


_YamlLoader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT_WITHOUT_POINT, list("-+0123456789"))


def call_config(path: str, function: str, *arguments: Any) -> Any:
    """What a function of a config file returns.

    Args:
        path: the file.
        function: its name.
        *arguments: what it is called with.

    Raises:
        InputError: the file is missing, cannot be run, or has no such function.
    """
    with _config_module(path) as module:
        return _called(path, module, function, *arguments)


def _called(path: str, module: types.ModuleType, function: str, *arguments: Any) -> Any:
    """Runs the file as the module, and calls the function."""
    source = _read_config_file(path)
    try:
        # Not imported: Python keeps a compiled file beside it, which it takes for the text as long as that has the
        # same size and was edited in the same second.
        exec(compile(source, str(module.__file__), "exec", dont_inherit=True), vars(module))
        if not callable(getattr(module, function, None)):
            raise InputError(f"config {path!r} defines no {function}()")
        return getattr(module, function)(*arguments)
    except InputError:
        raise
    # A config file that ends the program, or the person who interrupts it, ends it in one line too.
    except BaseException as error:
        raise InputError(f"config {path!r} cannot be run{_place(error, path)}: {_describe(error)}") from error


def _with_model(
    words: list[str], config: ExperimentConfig, model_for: Callable[[TrainConfig], ModelConfig] | None
) -> tuple[list[str], ExperimentConfig]:
    """Flags and config once the model that they take from a checkpoint is known, so that flags can change it."""
    given, words = _taken(words, "--model")
    if given not in (None, FROM_CHECKPOINT):
        raise InputError(f"--model {given} is no model: give {FROM_CHECKPOINT}, or fields such as --model.num-layers")
    if model_for is None or FROM_CHECKPOINT not in (given, config.model):
        return words, config
    fields: dict[str, Any] = {}
    for name in ("init_from", "branch_from", "run_dir"):
        if (value := _taken(words, f"--train.{name}")[0]) is not None:
            fields[name] = value
    train = dataclasses.replace(config.train, **fields)
    return words, dataclasses.replace(config, model=model_for(train))


def _taken(words: Sequence[str], flag: str) -> tuple[str | None, list[str]]:
    """The last value of a flag, which may have hyphens in place of underscores, and the words without it."""
    value, rest = None, []
    queue = list(words)
    while queue:
        name, has_value, own = queue[0].partition("=")
        if name.replace("-", "_") != flag.replace("-", "_"):
            rest.append(queue.pop(0))
            continue
        queue.pop(0)
        value = own if has_value else queue.pop(0) if queue else None
    return value, rest


def _read_config_file(path: str) -> bytes:
    """What a config file holds; raises an InputError that tells what is wrong with the path."""
    try:
        if not Path(path).is_file():
            problem = ", but something else of this name" if Path(path).exists() else ""
            raise InputError(
                f"no config file {path!r}{problem}; mamba-jax configs lists those that come with the package"
            )
        if Path(path).suffix not in _SUFFIXES:
            raise InputError(f"config {path!r} is no config: its name must end in {', '.join(_SUFFIXES)}")
        return Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"config {path!r} cannot be read ({error.strerror}): choose another file") from None


@contextlib.contextmanager
def _config_module(path: str) -> Iterator[types.ModuleType]:
    """An empty module of the file; while the block runs it is where dataclasses look up the types of their fields.

    What configs import of `configs` is what comes with the package, unless a checkout or the user has a folder of this
    name where Python looks.
    """
    module = types.ModuleType("mamba_jax_run_config")
    module.__file__ = str(Path(path).absolute())
    outer = sys.modules.get(module.__name__)
    sys.modules[module.__name__] = module
    if "configs" not in sys.modules and importlib.util.find_spec("configs") is None:
        shipped = types.ModuleType("configs")
        shipped.__path__ = [str(configs_folder())]
        sys.modules["configs"] = shipped
    try:
        yield module
    finally:
        sys.modules.pop(module.__name__, None)
        if outer is not None:
            sys.modules[module.__name__] = outer


def _place(error: BaseException, path: str) -> str:
    """Where in the config file it happened; empty if that is not known."""
    places = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    if isinstance(error, SyntaxError):
        places.append((error.filename or "", error.lineno))
    lines = [line for file, line in places if line is not None and Path(file) == Path(path).absolute()]
    return f", line {lines[-1]}" if lines else ""


def _describe(error: BaseException) -> str:
    try:
        text = error.msg if isinstance(error, SyntaxError) else str(error)
    except Exception:
        text = "(it has no text)"
    return f"{type(error).__name__}: {' '.join(text.split())}"
