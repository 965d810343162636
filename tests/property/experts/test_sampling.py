"""The rows of a step are a function of the step, and every epoch is a permutation."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from memmcl.backbone.batches import TokenizedRow
from memmcl.experts.sampling import Sampler, Turns

SIZES, SEEDS = st.integers(1, 12), st.integers(0, 2**63 - 1)


def rows(count: int) -> list[TokenizedRow]:
    return [TokenizedRow((number,)) for number in range(count)]


@settings(deadline=None)
@given(count=st.integers(1, 9), size=SIZES, seed=SEEDS, steps=st.integers(1, 12))
def test_an_epoch_sees_each_row_once(count: int, size: int, seed: int, steps: int) -> None:
    sampler = Sampler(rows(count), size, seed)
    batches = [sampler.batch(step) for step in range(steps)]
    assert {len(batch) for batch in batches} == {size}
    seen = [row.prompt[0] for batch in batches for row in batch]
    for start in range(0, len(seen) - count + 1, count):
        assert sorted(seen[start : start + count]) == list(range(count))
    rest = seen[len(seen) - len(seen) % count :]
    assert len(set(rest)) == len(rest)


@settings(deadline=None)
@given(count=st.integers(1, 9), size=SIZES, seed=SEEDS, asked=st.lists(st.integers(0, 40), max_size=12))
def test_a_step_has_its_rows_whatever_was_asked_before(count: int, size: int, seed: int, asked: list[int]) -> None:
    """That is what resuming rests on: a sampler that was just made, and one that took all steps, agree."""
    sequential = Sampler(rows(count), size, seed)
    by_step = [sequential.batch(step) for step in range(41)]
    jumping = Sampler(rows(count), size, seed)
    assert [jumping.batch(step) for step in asked] == [by_step[step] for step in asked]


@settings(deadline=None)
@given(
    counts=st.dictionaries(st.sampled_from("abcdef"), st.integers(0, 5), min_size=1),
    size=SIZES,
    seed=SEEDS,
    data=st.data(),
)
def test_turns_go_round_in_the_order_of_names(
    counts: dict[str, int], size: int, seed: int, data: st.DataObject
) -> None:
    given_rows = {
        name: [TokenizedRow((ord(name), number)) for number in range(count)] for name, count in counts.items()
    }
    names = sorted(name for name, count in counts.items() if count)
    turns = Turns(given_rows, size, seed)
    assert bool(turns) == bool(names)
    if not names:
        return
    shuffled = Turns({name: given_rows[name] for name in data.draw(st.permutations(sorted(counts)))}, size, seed)
    for turn in data.draw(st.lists(st.integers(0, 30), max_size=8)):
        batch = turns.batch(turn)
        assert {chr(row.prompt[0]) for row in batch} == {names[turn % len(names)]}
        assert shuffled.batch(turn) == batch
