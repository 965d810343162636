"""Which rows a step takes: pinned for one seed; tests/property/experts/test_sampling.py has the rules."""

from __future__ import annotations

from memmcl import seeds
from memmcl.backbone.batches import TokenizedRow
from memmcl.experts.sampling import Sampler, Turns


def rows(name: int, count: int) -> list[TokenizedRow]:
    return [TokenizedRow((name, number)) for number in range(count)]


def numbers(batch: list[TokenizedRow]) -> list[int]:
    return [row.prompt[1] for row in batch]


def test_a_seed_gives_these_rows_in_every_release() -> None:
    """Checkpoints and stored results rest on it: whoever changes it raises train.STAGE_VERSION."""
    sampler = Sampler(rows(0, 5), 3, 7)
    expected = [[4, 1, 3], [0, 2, 2], [3, 0, 4], [1, 4, 2], [3, 1, 0]]
    assert [numbers(sampler.batch(step)) for step in range(5)] == expected


def test_a_batch_may_hold_more_rows_than_there_are() -> None:
    batch = numbers(Sampler(rows(0, 3), 8, 1).batch(2))  # rows 16 to 23: epoch 5 from its second row, 6, half of 7
    assert len(batch) == 8
    assert sorted(batch[2:5]) == sorted(batch[5:8]) == [0, 1, 2]
    assert len(set(batch[:2])) == 2
    assert numbers(Sampler(rows(0, 1), 4, 1).batch(3)) == [0, 0, 0, 0]


def test_epochs_and_seeds_differ() -> None:
    one, two = (Sampler(rows(0, 20), 20, seed) for seed in (1, 2))
    orders = [numbers(sampler.batch(epoch)) for sampler in (one, two) for epoch in range(5)]
    assert len({tuple(order) for order in orders}) == 10


def test_subtasks_take_turns_in_the_order_of_their_names() -> None:
    given = {"c": rows(3, 2), "none": [], "a": rows(1, 4), "b": rows(2, 3)}
    turns = Turns(given, 2, 9)
    assert turns
    batches = [turns.batch(turn) for turn in range(9)]
    assert [{row.prompt[0] for row in batch} for batch in batches] == [{1}, {2}, {3}] * 3
    for place, name in enumerate("abc"):
        alone = Sampler(given[name], 2, seeds.derive(9, name))
        assert batches[place::3] == [alone.batch(taken) for taken in range(3)], "another subtask moves its rows"
    assert sorted(numbers(batches[0]) + numbers(batches[3])) == [0, 1, 2, 3]


def test_without_rows_nobody_takes_turns() -> None:
    assert not Turns({}, 2, 0)
    assert not Turns({"a": []}, 2, 0)
