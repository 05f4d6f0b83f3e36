"""Configs survive JSON unchanged, and every kind of mistake gets one line that names it."""

import dataclasses
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest

from mamba_jax import config as c
from mamba_jax.cli import one_line_errors
from mamba_jax.config_files import load_config
from mamba_jax.errors import InputError
from mamba_jax.models.mixers.mamba1.config import ScanName
from pallas_kernels.selective_scan.api import IMPLEMENTATIONS

ROOT = Path(__file__).resolve().parents[1]


def make_config() -> c.ExperimentConfig:
    return c.ExperimentConfig(
        name="test",
        model=c.ModelConfig(vocab_size=257, d_model=64, num_layers=2),
        data=c.DataConfig(train=c.TextFolderSource(path="text"), seq_len=16, global_batch=4),
        optimizer=c.OptimizerConfig(peak_lr=1e-3, schedule=c.WarmupStableDecaySchedule()),
        train=c.TrainConfig(num_steps=3, run_dir="runs/test"),
    )


def test_json_round_trip() -> None:
    config = make_config()
    assert c.from_json(c.ExperimentConfig, c.to_json(config), origin="f") == config


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ('"d_model": 64', '"d_modle": 64', "did you mean 'd_model'?"),
        ('"d_model": 64', '"d_model": "wide"', "model.d_model: Input should be a valid integer, got 'wide'"),
        ('"d_model": 64', '"d_model": "64"', "model.d_model: Input should be a valid integer, got '64'"),
        ('"d_model": 64', '"d_model": -1', "ModelConfig.d_model must be positive, got -1"),
        ('"num_steps": 3,', "", "missing key 'train.num_steps'"),
        ('"text_folder"', '"text_fodler"', "does not match any of the expected tags"),
        ('"accumulation_steps": 1', '"accumulation_steps": 3', "must be divisible by train.accumulation_steps (3)"),
        ('"seed": 0,', '"seed": 0', "Invalid JSON"),
    ],
)
def test_json_mistakes_get_one_line(old: str, new: str, expected: str) -> None:
    text = c.to_json(make_config())
    assert old in text
    with pytest.raises(InputError) as raised:
        c.from_json(c.ExperimentConfig, text.replace(old, new), origin="run/config.json")
    message = str(raised.value)
    assert message.startswith("run/config.json: ")
    assert expected in message
    assert "\n" not in message


def data(**fields: Any) -> c.DataConfig:
    defaults: dict[str, Any] = {"train": c.ShardSource(path="s"), "seq_len": 16, "global_batch": 4}
    return c.DataConfig(**defaults | fields)


def train(**fields: Any) -> c.TrainConfig:
    defaults: dict[str, Any] = {"num_steps": 3, "run_dir": "run"}
    return c.TrainConfig(**defaults | fields)


def optimizer(**fields: Any) -> c.OptimizerConfig:
    defaults: dict[str, Any] = {"peak_lr": 1e-3}
    return c.OptimizerConfig(**defaults | fields)


def model(**fields: Any) -> c.ModelConfig:
    defaults: dict[str, Any] = {"vocab_size": 257, "d_model": 64, "num_layers": 2}
    return c.ModelConfig(**defaults | fields)


def experiment(**recipe: object) -> c.ExperimentConfig:
    return dataclasses.replace(make_config(), optimizer=optimizer(**recipe))


def test_a_mesh_that_was_stored_before_there_was_an_axis_of_experts_is_read() -> None:
    stored = '{"data": 2, "fsdp": 4, "sequence": 1, "tensor": 1}'
    assert c.from_json(c.MeshConfig, stored, origin="f") == c.MeshConfig(data=2, fsdp=4, expert=1)


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (lambda: c.Mamba1Config(dt_min=0.2, dt_max=0.1), "dt_max (0.1) must not be below dt_min (0.2)"),
        (lambda: c.Mamba1Config(dt_max=math.inf), "dt_max: Input should be a finite number, got inf"),
        (lambda: c.Mamba1Config(dt_rank=0), "Mamba1Config.dt_rank must be positive, got 0"),
        (lambda: c.Mamba1Config(selective=("dt", "dt")), "names a projection twice: ('dt', 'dt')"),
        (lambda: c.TokenizerConfig(kind="hf_json"), "'hf_json' needs a path"),
        (lambda: c.TokenizerConfig(path="x.json"), "'byte' takes none"),
        (lambda: c.TextFolderSource(path="t", validation_fraction=1.5), "must lie in [0, 1], got 1.5"),
        (lambda: c.MeshConfig(data=-1, fsdp=-1), "at most one -1"),
        (lambda: c.MeshConfig(sequence=0), "sizes must be positive"),
        (lambda: c.MeshConfig(expert=0), "got (data, fsdp, expert, sequence, tensor) = (-1, 1, 0, 1, 1)"),
        (lambda: c.CosineSchedule(warmup_steps=-1), "CosineSchedule.warmup_steps must not be negative, got -1"),
        (lambda: c.WarmupStableDecaySchedule(decay_steps=-2), "decay_steps must not be negative, got -2"),
        (
            lambda: experiment(schedule=c.CosineSchedule(warmup_steps=10**6)),
            "has 1000000 steps of warm-up and 0 of decay",
        ),
        (lambda: train(init_optimizer=True), "give init_from=RUN or RUN@STEP"),
        (lambda: train(init_from="a", branch_from="b@1"), "exclude each other"),
        (lambda: c.CosineSchedule(final_lr=-1e-5), "CosineSchedule.final_lr must not be negative"),
        (lambda: c.WarmupStableDecaySchedule(warmup_fraction=0.6, decay_fraction=0.6), "must not exceed 1, got 1.2"),
        (lambda: optimizer(peak_lr=0.0), "OptimizerConfig.peak_lr must be positive, got 0.0"),
        (lambda: optimizer(peak_lr=-1e-3), "OptimizerConfig.peak_lr must be positive, got -0.001"),
        (lambda: optimizer(peak_lr=math.nan), "peak_lr: Input should be a finite number, got nan"),
        (lambda: optimizer(peak_lr=math.inf), "peak_lr: Input should be a finite number, got inf"),
        (lambda: optimizer(clip_norm=math.inf), "clip_norm: Input should be a finite number, got inf"),
        (lambda: optimizer(clip_norm=1e19), "clip_norm must not exceed 1e18"),
        (lambda: optimizer(eps=1e-40), "OptimizerConfig.eps = 1e-40 is beyond float32, which holds 0 and 1.18e-38"),
        (lambda: optimizer(peak_lr=1e39), "OptimizerConfig.peak_lr = 1e+39 is beyond float32"),
        (lambda: optimizer(b2=1 - 1e-9), "OptimizerConfig.b2 must lie in [0, 1), got 0.999999999"),
        (lambda: optimizer(ema_decay=1 - 1e-9), "OptimizerConfig.ema_decay must lie in [0, 1), got 0.999999999"),
        (lambda: experiment(peak_lr=11.0), "optimizer.peak_lr * weight_decay = 1.1 must not exceed 1"),
        (
            lambda: experiment(peak_lr=1.0, eps=1e-37),
            "clip_norm / eps = 3e+37: weights could exceed what float32 holds",
        ),
        (lambda: model(vocab_size=2**31), "ModelConfig.vocab_size must stay below 2**31 ids, got 2147483648"),
        (lambda: optimizer(b1=1.0), "OptimizerConfig.b1 must lie in [0, 1), got 1.0"),
        (lambda: optimizer(b2=1.0), "OptimizerConfig.b2 must lie in [0, 1), got 1.0"),
        (lambda: optimizer(muon_momentum=1.0), "OptimizerConfig.muon_momentum must lie in [0, 1), got 1.0"),
        (lambda: optimizer(ema_decay=1.0), "OptimizerConfig.ema_decay must lie in [0, 1), got 1.0"),
        (lambda: optimizer(ema_decay=-0.1), "OptimizerConfig.ema_decay must lie in [0, 1), got -0.1"),
        (lambda: optimizer(weight_decay=-0.1), "OptimizerConfig.weight_decay must not be negative, got -0.1"),
        (lambda: data(seq_len=0), "DataConfig.seq_len must be positive, got 0"),
        (lambda: data(global_batch=-4), "DataConfig.global_batch must be positive, got -4"),
        (lambda: train(num_steps=2**31), "TrainConfig.num_steps must be below 2**31, got 2147483648"),
        (lambda: train(windows=0), "TrainConfig.windows must be positive, got 0"),
        (lambda: train(z_loss=-1.0), "TrainConfig.z_loss must not be negative, got -1.0"),
        (lambda: train(sample_every=-1), "TrainConfig.sample_every must not be negative, got -1"),
        (lambda: train(profile_steps=(3, 2)), "1 <= first <= last <= num_steps, got (3, 2)"),
        (lambda: train(profile_steps=(0, 2)), "1 <= first <= last <= num_steps, got (0, 2)"),
        (lambda: train(profile_steps=(2, 4)), "1 <= first <= last <= num_steps, got (2, 4)"),
        (lambda: c.CheckpointConfig(keep=0), "CheckpointConfig.keep must be positive, got 0"),
        (lambda: c.EvaluationConfig(batch_size=0), "EvaluationConfig.batch_size must be positive, got 0"),
        (lambda: c.FaultsConfig(spike_factor=1.0), "FaultsConfig.spike_factor must be above 1 or None, got 1.0"),
        (lambda: c.FaultsConfig(spike_factor=math.nan), "spike_factor: Input should be a finite number, got nan"),
        (lambda: c.FaultsConfig(deadline_seconds=1e300), "deadlines must not exceed 1e9 seconds, got 1e+300"),
        (lambda: dataclasses.replace(make_config(), seed=-1), "ExperimentConfig.seed must lie in 0 .. 2**32 - 1"),
        (lambda: dataclasses.replace(make_config(), seed=2**32), "seed must lie in 0 .. 2**32 - 1, got 4294967296"),
        (lambda: dataclasses.replace(make_config(), train=train(windows=5)), "divisible by train.windows (5)"),
    ],
)
def test_impossible_values_are_refused(build: Callable[[], object], expected: str) -> None:
    with pytest.raises(InputError) as raised:
        build()
    assert expected in str(raised.value)
    assert "\n" not in str(raised.value)


# The annotations are checked by the test run itself, ahead of the library: these calls need a process of their own.
WRONG_TYPES = {
    "ShardSource(path=3)": "ShardSource.path: Input should be a valid string, got 3",
    "DATA(seq_len='16')": "DataConfig.seq_len: Input should be a valid integer, got '16'",
    "DATA(seq_len=16.5)": "DataConfig.seq_len: Input should be a valid integer, got 16.5",
    "DATA(train=None)": "DataConfig.train: Input should be a valid dictionary or object",
    "DATA(documents='glued')": "DataConfig.documents: Input should be 'packed' or 'concatenated', got 'glued'",
    "TRAIN(num_steps=True)": "TrainConfig.num_steps: Input should be a valid integer, got True",
    "TRAIN(run_dir=None)": "TrainConfig.run_dir: Input should be a valid string, got None",
    "TRAIN(profile_steps=[1, 2])": "TrainConfig.profile_steps: Input should be a valid tuple, got [1, 2]",
    "OptimizerConfig(peak_lr='1e-3')": "OptimizerConfig.peak_lr: Input should be a valid number, got '1e-3'",
    "OptimizerConfig(peak_lr=None)": "OptimizerConfig.peak_lr: Input should be a valid number, got None",
    "OptimizerConfig(peak_lr='x', b1='y')": "got 'x'; OptimizerConfig.b1: Input should be a valid number, got 'y'",
    "OptimizerConfig(peak_lr=1e-3, schedule=None)": "OptimizerConfig.schedule: ",
    "Mamba1Config(scan_implementation='cuda')": "'xla_sequential' or 'xla_associative', got 'cuda'",
    "ModelConfig(vocab_size=257, d_model=8, num_layers=1, remat='all')": "should be 'none', 'block', 'dots' or 'cheap'",
    "OptimizerConfig(peak_lr=numpy.float32(0.5), b1=0).__dict__": "'peak_lr': 0.5, ",
}
_SCRIPT = """
import functools, sys, numpy
from mamba_jax.config import *
from mamba_jax.errors import InputError
from typing import Any
DATA = functools.partial(DataConfig, **dict(train=ShardSource(path="s"), seq_len=16, global_batch=4))
TRAIN = functools.partial(TrainConfig, **dict(num_steps=3, run_dir="run"))
for text in sys.argv[1:]:
    try:
        print(eval(text))
    except InputError as error:
        print(error)
"""


def test_wrong_types_are_refused() -> None:
    command = [sys.executable, "-c", _SCRIPT, *WRONG_TYPES]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    for line, (text, expected) in zip(result.stdout.splitlines(), WRONG_TYPES.items(), strict=True):
        assert expected in line, f"{text}: {line}"


def test_every_scan_can_be_chosen() -> None:
    assert set(get_args(ScanName)) == set(IMPLEMENTATIONS)


def test_derived_sizes() -> None:
    model = c.ModelConfig(vocab_size=50277, d_model=768, num_layers=24)
    mixer = c.Mamba1Config()
    assert (model.padded_vocab_size, mixer.channels(model.d_model), mixer.rank(model.d_model)) == (50280, 1536, 48)
    assert c.Mamba1Config(dt_rank=7).rank(model.d_model) == 7


@pytest.fixture
def config_file(tmp_path: Path) -> str:
    path = tmp_path / "run.py"
    path.write_text(
        "from mamba_jax.config import *\n"
        "def get_config():\n"
        f"    return from_json(ExperimentConfig, {c.to_json(make_config())!r}, origin='inline')\n"
    )
    return str(path)


def test_overrides_change_single_fields(config_file: str) -> None:
    config = load_config(config_file, ["--train.num-steps", "7", "--model.mixer.selective", "dt", "C"])
    assert config.train.num_steps == 7
    assert isinstance(config.model.mixer, c.Mamba1Config)
    assert config.model.mixer.selective == ("dt", "C")
    assert config.data == make_config().data


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--train.num-stepz", "7"], "did you mean --train.num-steps?"),
        (["--train.num-steps", "many"], "--train.num-steps"),
        (["--model.d-model", "-3"], "ModelConfig.d_model must be positive, got -3"),
        (["--train.num-steps"], "Missing value for argument '--train.num-steps'"),
    ],
)
def test_bad_flags_get_one_line_and_status_2(config_file: str, flags: list[str], expected: str, capsys) -> None:
    with pytest.raises(SystemExit) as stop, one_line_errors():
        load_config(config_file, flags)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert expected in error
    assert error.count("\n") == 1


def test_missing_and_wrong_config_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no config file 'nowhere\.py'"):
        load_config("nowhere.py", [])
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(InputError, match="defines no get_config"):
        load_config(str(tmp_path / "empty.py"), [])
    (tmp_path / "wrong.py").write_text("def get_config():\n    return 3\n")
    with pytest.raises(InputError, match="returned int, expected ExperimentConfig"):
        load_config(str(tmp_path / "wrong.py"), [])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("x = 1\ndef get_config(:\n", "line 2: SyntaxError: invalid syntax"),
        ("import no_such_module\n", "line 1: ModuleNotFoundError: No module named 'no_such_module'"),
        ("from mamba_jax.config import Nothing\n", "line 1: ImportError: cannot import name 'Nothing'"),
        ("get_config = 3\n", "defines no get_config()"),
        ("def get_config(name):\n    return name\n", "TypeError: get_config() missing 1 required positional argument"),
        ("def get_config():\n    return 1 / 0\n", "line 2: ZeroDivisionError: division by zero"),
        ("def get_config():\n    raise OSError('two\\nlines')\n", "line 2: OSError: two lines"),
        ("raise SystemExit(0)\n", "line 1: SystemExit: 0"),
        ("def get_config():\n    return dict(seq_length=3)\n", "returned dict, expected ExperimentConfig"),
        ("\0", "SyntaxError: "),
        ("exec(compile('a b', 'other.py', 'exec'))\n", "line 1: SyntaxError: invalid syntax"),
    ],
)
def test_config_files_that_cannot_be_run(tmp_path: Path, text: str, expected: str, capsys) -> None:
    (tmp_path / "broken.py").write_text(text)
    with pytest.raises(SystemExit) as stop, one_line_errors():
        load_config(str(tmp_path / "broken.py"), [])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert expected in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("[a-z]*.py")), ids=lambda path: path.stem)
def test_committed_configs_load(path: Path) -> None:
    config = load_config(str(path), [])
    assert c.from_json(c.ExperimentConfig, c.to_json(config), origin=path.name) == config
