"""The `mamba-jax` command, configs that come with the package, and configs that are no Python files."""

import json
import sys
from pathlib import Path

import pytest

import mamba_jax
import mamba_jax.__main__ as command
from mamba_jax import config_base
from mamba_jax.config_files import load_config, shipped_configs
from mamba_jax.errors import InputError

ROOT = Path(__file__).parents[1]


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    """The exit status of `mamba-jax WORDS`."""
    monkeypatch.setattr(sys, "argv", ["mamba-jax", *words])
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, getattr(sys, name))
    try:
        command.main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


@pytest.mark.parametrize("name", command._PROGRAMS)
def test_every_program_answers(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, name, "--help") == 0
    assert f"usage: mamba-jax {name}" in capsys.readouterr().out


def test_lists(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "configs") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == sum("def get_config(" in path.read_text() for path in ROOT.glob("configs/**/*.py"))
    quickstart = next(line for line in lines if line.startswith("quickstart "))
    assert "  A small byte-level Mamba trained on two centuries" in quickstart
    assert run(monkeypatch) == 0
    usage = capsys.readouterr().out
    assert all(f"  {name} " in usage for name in command._PROGRAMS)
    assert run(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == f"mamba-jax {mamba_jax.__version__}\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trian", "quickstart"], "no command 'trian quickstart': did you mean 'train'? mamba-jax --help lists them"),
        (["train", "mamba_130"], "no config file 'mamba_130', and none of this name comes with the package: did you"),
        (["train", "x/y"], "no config file 'x/y', and none of this name comes with the package: see mamba-jax configs"),
        (["compile", "quickstart"], "--compile-only needs --topology, such as --topology v5e:4x4"),
        (["configs", "all"], "no command 'configs all'"),
    ],
)
def test_bad_words_are_one_line(
    words: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, *words) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}")
    assert error.count("\n") == 1


def test_names_are_those_of_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = shipped_configs()
    assert load_config("hybrids/jamba_like_130m", []) == load_config(str(names["hybrids/jamba_like_130m"]), [])
    # A file of the user's goes first, and may lean on one that comes with the package.
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(
        "from configs import mamba_130m\n\n\ndef get_config():\n    return mamba_130m.get_config()\n"
    )
    assert load_config("own.py", []) == load_config("mamba_130m", [])


def test_json_and_yaml(tmp_path: Path) -> None:
    config = load_config("quickstart", ["--optimizer.peak-lr", "1e-3"])
    written = tmp_path / "config.json"
    written.write_text(config_base.to_json(config))
    assert load_config(str(written), []) == config
    fields = json.loads(written.read_text())
    fields["optimizer"]["peak_lr"] = "PEAK"
    # Flow style is YAML too; YAML's own reading of a number without a point would be a text.
    (tmp_path / "config.yaml").write_text(json.dumps(fields, indent=1).replace('"PEAK"', "1e-3"))
    assert load_config(str(tmp_path / "config.yaml"), []) == config
    assert load_config(str(tmp_path / "config.yaml"), ["--seed", "7"]).seed == 7


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.yaml", "name: [", r"config .* cannot be read: ParserError: while parsing"),
        ("a.yaml", "name: 2020-01-01", "cannot be read: TypeError: Object of type date is not JSON serializable"),
        ("a.yaml", "nmae: x", "unknown key 'nmae'"),
        ("a.json", "{", "a.json: "),
        ("a.json", "\xff", "a.json: "),
    ],
)
def test_bad_files_are_one_line(name: str, text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=message) as error:
        load_config(str(tmp_path / name), [])
    assert "\n" not in str(error.value)
