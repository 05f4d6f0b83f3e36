"""`lm_eval`'s own command line, with this library's models.

    python -m mamba_jax.evaluation.lm_eval --model_args pretrained=runs/quickstart --tasks lambada_openai

All its flags work. Where the command does not name them, the model is `mamba_jax` and the batch size `auto`.
"""

import importlib
import importlib.util
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from mamba_jax.cli import one_line_errors
from mamba_jax.errors import InputError

_DEFAULTS = (("--model", "-M", "mamba_jax"), ("--batch_size", "-b", "auto"))


def main() -> None:
    """Registers the model and hands over to `lm_eval`."""
    with one_line_errors():
        if importlib.util.find_spec("lm_eval") is None:
            raise InputError("lm_eval is not installed: pip install 'mamba-jax[lm-eval]'")
        importlib.import_module("mamba_jax.evaluation.harness")
        sys.argv[1:] = with_defaults(sys.argv[1:])
        try:
            importlib.import_module("lm_eval.__main__").cli_evaluate()
        except (ValueError, OSError) as error:
            if isinstance(error, InputError) or _is_ours(error):
                raise
            # A task that is not there, or data that cannot be fetched.
            raise InputError(f"lm_eval: {error}") from None


def _is_ours(error: BaseException) -> bool:
    """Whether code of this library, behind this module, has a part in an error."""
    files = {Path(frame.filename) for frame in traceback.extract_tb(error.__traceback__)} - {Path(__file__)}
    return any(file.is_relative_to(Path(__file__).parents[1]) for file in files)


def with_defaults(arguments: Sequence[str]) -> list[str]:
    """The arguments, with model and batch size where an evaluation does not name them itself or by a config file."""
    own = list(arguments)
    is_run = bool(own) and (own[0] == "run" or own[0].startswith("-")) and not {"-h", "--help"} & set(own)
    if not is_run or any(argument in ("-C", "--config") or argument.startswith("--config=") for argument in own):
        return own
    for name, letter, value in _DEFAULTS:
        if not any(argument in (name, letter) or argument.startswith(f"{name}=") for argument in own):
            own += [name, value]
    return own


if __name__ == "__main__":
    main()
