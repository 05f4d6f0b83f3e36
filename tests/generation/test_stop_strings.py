"""What is shown ends in front of the first stop string, however the text is cut."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mamba_jax.errors import InputError
from mamba_jax.generation.stop_strings import Shown, StopStrings

# Few characters, so that stop strings occur, overlap and nearly occur.
TEXT = st.text("abc", max_size=40)
STOPS = st.lists(st.text("abc", min_size=1, max_size=5), max_size=3)


def expected_text(text: str, stops: list[str]) -> tuple[str, bool]:
    """The text before the stop string that is complete first, read character by character."""
    for end in range(len(text) + 1):
        if ending := [stop for stop in stops if text[:end].endswith(stop)]:
            return text[: end - max(map(len, ending))], True
    return text, False


def test_a_stop_string_across_pieces_is_not_shown() -> None:
    stops = StopStrings(["\n\nQ:", "</s>"])
    shown = [stops.add(piece) for piece in ("A: 4", "2\n", "\n", "Q", ": more", "text")]
    assert shown == [
        Shown(text="A: 4", stopped=False),
        Shown(text="2", stopped=False),
        Shown(text="", stopped=False),
        Shown(text="", stopped=False),
        Shown(text="", stopped=True),
        Shown(text="", stopped=True),
    ]
    assert stops.finish() == ""


def test_what_only_looked_like_a_stop_string_is_shown() -> None:
    stops = StopStrings(["</s>"])
    assert [stops.add(piece).text for piece in ("a<", "/s", "b<", "<")] == ["a", "", "</sb", "<"]
    assert stops.finish() == "<"
    assert stops.finish() == ""


def test_the_first_complete_stop_string_counts() -> None:
    assert StopStrings(["abcd", "bc"]).add("xabcd") == Shown(text="xa", stopped=True)
    assert StopStrings(["c", "abc"]).add("xabc") == Shown(text="x", stopped=True)
    assert StopStrings([]).add("text") == Shown(text="text", stopped=False)


@settings(max_examples=300, deadline=None, database=None)
@given(text=TEXT, stops=STOPS, cuts=st.lists(st.integers(0, 40), max_size=40))
def test_any_cut_shows_the_same_text(text: str, stops: list[str], cuts: list[int]) -> None:
    expected, stopped = expected_text(text, stops)
    bounds = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    for pieces in ([text[a:b] for a, b in itertools.pairwise(bounds)], list(text)):
        watch, shown, read, has_stopped = StopStrings(stops), "", 0, False
        for piece in pieces:
            got = watch.add(piece)
            shown, read, has_stopped = shown + got.text, read + len(piece), got.stopped
            assert expected.startswith(shown)
            assert has_stopped or read - len(shown) < max([1, *map(len, stops)])
        assert has_stopped == stopped
        assert shown + watch.finish() == expected
    if len(stops) == 1 and stops[0] in text:
        assert expected == text[: text.find(stops[0])]


def test_a_stop_string_of_no_characters_is_refused() -> None:
    with pytest.raises(InputError, match="a stop string has no characters"):
        StopStrings(["a", ""])
