"""Overlapping texts: the block list against brute force, and the same answer in every process."""

import os
import subprocess
import sys
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memmcl.suite import overlap
from memmcl.suite.examples import normalised
from memmcl.suite.overlap import WINDOW, Blocklist

PIECES = ("abcdefghijklmnopqrstuvwxyz0123456789", "zyxwvutsrqponmlkjihgfedcba9876543210", "äöüß漢字かな한글ΑΒΓ😀𐍈" * 3)


@st.composite
def texts(draw: st.DrawFn) -> str:
    """A text around a slice of a shared piece: overlaps of 35, 36 and 37 characters are common, and whole texts."""
    piece = draw(st.sampled_from(PIECES)) * 2
    length = draw(st.sampled_from([1, 34, 35, 36, 37, 38, 50]))
    start = draw(st.integers(0, 3))
    around = st.text(st.sampled_from("xyé漢😀"), max_size=4)
    return draw(around) + piece[start : start + length] + draw(around)


def brute_force(test: Sequence[str], rows: Sequence[str]) -> list[bool]:
    windows = {text[i : i + WINDOW] for text in test for i in range(len(text) - WINDOW + 1)}
    return [any(row[i : i + WINDOW] in windows for i in range(len(row) - WINDOW + 1)) for row in rows]


@pytest.mark.parametrize("batch", [1, 100, 1 << 20])
@settings(max_examples=150, deadline=None)
@given(test=st.lists(texts(), max_size=5), rows=st.lists(texts(), max_size=8))
def test_sharing_and_equal_are_those_of_brute_force(batch: int, test: list[str], rows: list[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(overlap, "_BATCH", batch)
        blocklist = Blocklist.of(test)
        assert blocklist.sharing(rows).tolist() == brute_force(test, rows)
        assert blocklist.equal(rows).tolist() == [row in test for row in rows]


@pytest.mark.parametrize(("length", "shares"), [(35, False), (36, True), (37, True)])
@pytest.mark.parametrize("place", ["start", "middle", "end", "whole"])
def test_thirty_six_characters_in_one_piece_overlap_wherever_they_stand(length: int, shares: bool, place: str) -> None:
    piece = (PIECES[0] + "ABC")[:length]
    row = {"start": piece + "_" * 40, "middle": "-" * 40 + piece + "_" * 40, "end": "-" * 40 + piece, "whole": piece}
    blocklist = Blocklist.of(["+" * 50 + piece + "=" * 50])
    assert blocklist.sharing([row[place]]).tolist() == [shares]
    assert blocklist.equal([row[place]]).tolist() == [False]


def test_a_window_never_reaches_over_the_end_of_a_text() -> None:
    first, second = PIECES[0][:20], PIECES[0][20:]
    assert not Blocklist.of([PIECES[0]]).sharing([first, second]).any()
    assert len(Blocklist.of([first, second]).hashes) == 0
    assert not Blocklist.of([first, second]).sharing([PIECES[0]]).any()


def test_a_short_text_is_found_by_equality_only() -> None:
    blocklist = Blocklist.of([normalised("Good."), normalised("!!!")])
    rows = [normalised(text) for text in ("good", "GOOD!", "a good thing, really good", "!!!", "!!!!")]
    assert blocklist.equal(rows).tolist() == [True, True, False, True, False]
    assert not blocklist.sharing(rows).any()


def test_texts_beside_each_other_in_the_alphabet_do_not_collide() -> None:
    """Windows that differ in one or two characters, by little: what a weak hash would confuse first."""
    base = "a" * WINDOW
    changed = {
        base[:i] + chr(97 + a) + base[i + 1 : j] + chr(97 + b) + base[j + 1 :]
        for i in range(WINDOW - 1)
        for j in range(i + 1, WINDOW)
        for a in range(8)
        for b in range(8)
    }
    assert len(Blocklist.of(changed).hashes) == len(changed)


def test_an_empty_block_list_and_no_rows() -> None:
    empty = Blocklist.of([])
    assert empty.sharing(["a" * 40]).tolist() == [False]
    assert empty.equal(["a" * 40]).tolist() == [False]
    full = Blocklist.of(["a" * 40])
    assert full.sharing([]).shape == full.equal([]).shape == (0,)
    assert full.sharing([""]).tolist() == [False]


def test_half_a_surrogate_pair_is_a_character_like_others() -> None:
    assert Blocklist.of(["\ud83d" * 36]).sharing(["\ud83d" * 36, "\ud83e" * 36]).tolist() == [True, False]


def test_the_numbers_of_windows_are_the_same_in_every_process() -> None:
    script = f"from memmcl.suite.overlap import Blocklist\nprint(Blocklist.of({PIECES!r}).hashes.tobytes().hex())"
    made = {
        subprocess.run(
            [sys.executable, "-c", script],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "PYTHONHASHSEED": seed},
        ).stdout.strip()
        for seed in ("1", "2")
    }
    assert made == {Blocklist.of(PIECES).hashes.tobytes().hex()}


def test_the_hashes_are_sorted_and_each_is_there_once() -> None:
    hashes = Blocklist.of([PIECES[0] * 3, PIECES[0] * 2]).hashes
    assert len(hashes) == 36  # a text of period 36 has no more windows
    assert (np.diff(hashes.astype(object)) > 0).all()
