"""Patterns of layers, and the units that repeat in a list."""

import itertools

import pytest

from mamba_jax.config import Mamba1Config, Mamba2Config, ModelConfig
from mamba_jax.errors import InputError
from mamba_jax.models.config import Hybrid, Unit
from mamba_jax.models.pattern import repeating_units, spelled_out

LETTERS = {letter: letter for letter in "MAF"}


@pytest.mark.parametrize(
    ("pattern", "spelled"),
    [
        ("MMA", "MMA"),
        ("(MMMA)*2", "MMMAMMMA"),
        ("M*3 (A F) * 2", "MMMAFAF"),
        ("((MA)*2F)*2M", "MAMAFMAMAFM"),
        ("(M)", "M"),
    ],
)
def test_what_a_pattern_spells_out(pattern: str, spelled: str) -> None:
    assert spelled_out(pattern, LETTERS) == list(spelled)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("(MMA", r"'\(MMA': a '\(' has no '\)'"),
        ("MMA)", r"a '\)' has no '\('"),
        ("*3M", r"'\*3' follows neither a letter nor a parenthesis"),
        ("M*2*3", r"'\*3' follows neither"),
        ("()*2", r"'\*2' follows neither"),
        ("M*0", r"'\*0' makes 0 layers"),
        ("M*99999", r"makes 99999 layers, not 1 to 10000"),
        ("M-A", "'-' has no meaning there"),
        ("MXA", "X stands for no layer: give one, or use A, F, M"),
    ],
)
def test_what_is_no_pattern(pattern: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        spelled_out(pattern, LETTERS)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("layers", "units"),
    [
        ("MMMM", [("M", 4)]),
        ("MMMAMMMA", [("MMMA", 2)]),
        ("MMAMMAM", [("MMA", 2), ("M", 1)]),
        ("AFAFAF", [("AF", 3)]),
        ("MAMF", [("MAMF", 1)]),
        # The first and the last layers are of their own.
        ("FMAMAMAF", [("F", 1), ("MA", 3), ("F", 1)]),
    ],
)
def test_units_that_repeat(layers: str, units: list[tuple[str, int]]) -> None:
    assert repeating_units(layers) == [(tuple(unit), repeats) for unit, repeats in units]


def test_units_spell_out_the_layers_again() -> None:
    for layers in itertools.product("MA", repeat=7):
        units = repeating_units(layers)
        assert [layer for unit, repeats in units for layer in unit * repeats] == list(layers)


def test_a_hybrid_of_a_pattern() -> None:
    one, other = Mamba1Config(), Mamba2Config()
    hybrid = Hybrid.of_pattern("(MMS)*3", M=one, S=other)
    assert hybrid == Hybrid(units=(Unit(mixers=(one, one, other), repeats=3),))
    assert ModelConfig(vocab_size=8, d_model=64, num_layers=9, mixer=hybrid).stacks[2].mixer == other
    with pytest.raises(InputError, match="num_layers is 8, but the units of its mixer make 9 blocks"):
        ModelConfig(vocab_size=8, d_model=64, num_layers=8, mixer=hybrid)
