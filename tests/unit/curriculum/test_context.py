"""Contexts: which demonstrations, in which order, inside which budget."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memmcl.curriculum import CONTEXTS, Context, Shots, build_context
from memmcl.errors import ConfigError, DataError
from memmcl.suite.examples import Example

ORDER = ("easy", "middle", "hard", "harder")
POOL = {
    "easy": [Example.create("easy", f"easy {i}", ("positive", "negative")[i % 2]) for i in range(20)],
    "middle": [Example.create("middle", f"middle {i}", "abcd"[i % 4]) for i in range(20)],
    "hard": [
        Example.create("hard", f"hard {i}", [("it", ("positive", "neutral")[i % 2])] if i % 3 else [])
        for i in range(20)
    ],
    "harder": [Example.create("harder", f"harder {i}", "x") for i in range(20)],
}
ORDERED = ("curriculum", "reversed", "random")


def build(kind: str, subtask: str = "hard", **changes: Any) -> Context:
    arguments: dict[str, Any] = {
        "order": ORDER,
        "demonstrations": POOL,
        "count_tokens": lambda name, row: 10,
        "seed": 5,
    }
    shots = Shots(changes.pop("own_shots", 3), changes.pop("others", 2), changes.pop("budget", 1000))
    return build_context(kind, subtask, shots=shots, **{**arguments, **changes})


def sources(context: Context) -> list[str]:
    return [name for name, _ in context.demonstrations]


def test_the_kinds() -> None:
    assert build("zero-shot") == Context("zero-shot", "hard", (), 0)
    assert sources(build("own-shots")) == ["hard"] * 3
    curriculum = build("curriculum")
    assert sources(curriculum) == ["easy", "easy", "middle", "middle", "hard", "hard", "hard"]
    assert curriculum.tokens == 70
    assert sources(build("reversed")) == ["middle", "middle", "easy", "easy", "hard", "hard", "hard"]
    assert sources(build("random"))[4:] == ["hard"] * 3


def test_ablations_differ_in_the_order_of_the_others_alone() -> None:
    contexts = [build(kind, "harder", others=3) for kind in ORDERED]
    assert all(Counter(context.demonstrations) == Counter(contexts[0].demonstrations) for context in contexts)
    assert len({context.demonstrations for context in contexts}) == 3
    own = build("own-shots", "harder").demonstrations
    assert all(context.demonstrations[-3:] == own for context in contexts)


def test_for_the_easiest_subtask_the_curriculum_is_its_own_shots() -> None:
    own = build("own-shots", "easy").demonstrations
    assert len(own) == 3
    assert all(build(kind, "easy").demonstrations == own for kind in ORDERED)


def test_own_demonstrations_come_one_per_label_in_turn() -> None:
    labels = [row.gold for _, row in build("own-shots", "middle", own_shots=8).demonstrations]
    assert sorted(labels[:4]) == ["a", "b", "c", "d"]
    assert labels[4:] == labels[:4]
    tuples = build("own-shots", "hard", own_shots=6).demonstrations
    first = ["none" if not row.gold else row.gold[0][-1] for _, row in tuples]
    assert Counter(first) == {"none": 2, "positive": 2, "neutral": 2}


def test_demonstrations_are_distinct_and_run_out() -> None:
    chosen = build("own-shots", "easy", own_shots=50).demonstrations
    assert len(chosen) == len(set(chosen)) == 20


def test_the_budget_goes_to_own_then_to_the_nearest() -> None:
    assert sources(build("curriculum", budget=29)) == ["hard", "hard"]
    assert sources(build("curriculum", budget=49)) == ["middle", "hard", "hard", "hard"]
    assert sources(build("curriculum", budget=60)) == ["easy", "middle", "middle", "hard", "hard", "hard"]
    assert build("curriculum", budget=0).demonstrations == ()


def test_what_does_not_fit_is_skipped_for_the_next_of_its_label() -> None:
    normal = build("own-shots", "easy", own_shots=2).demonstrations
    too_long = normal[0][1]
    count = lambda name, row: 500 if row == too_long else 10  # noqa: E731
    chosen = build("own-shots", "easy", own_shots=2, budget=100, count_tokens=count).demonstrations
    assert too_long not in [row for _, row in chosen]
    assert [row.gold for _, row in chosen] == [row.gold for _, row in normal]
    assert chosen[1] == normal[1]


def test_no_more_candidates_are_counted_than_a_few_per_demonstration() -> None:
    counted: list[str] = []

    def count(name: str, row: Example) -> int:
        counted.append(name)
        return 999

    assert build("curriculum", budget=100, count_tokens=count).demonstrations == ()
    assert Counter(counted) == {"hard": 12, "middle": 8, "easy": 8}


def test_the_order_of_candidates_does_not_matter_and_the_seed_does() -> None:
    backward = {name: rows[::-1] for name, rows in POOL.items()}
    assert build("curriculum", demonstrations=backward) == build("curriculum")
    assert len({build("own-shots", seed=seed).demonstrations for seed in range(10)}) > 5
    assert len({tuple(sources(build("random", seed=seed))) for seed in range(20)}) > 2


def test_a_missing_pool_gives_fewer_demonstrations() -> None:
    assert sources(build("curriculum", demonstrations={"hard": POOL["hard"]})) == ["hard"] * 3


@pytest.mark.parametrize(
    ("kind", "changes", "error"),
    [
        ("few-shot", {}, ConfigError),
        ("curriculum", {"own_shots": -1}, ConfigError),
        ("curriculum", {"budget": -1}, ConfigError),
        ("curriculum", {"order": ("easy", "middle")}, DataError),
        ("curriculum", {"order": ("easy", "easy", "hard")}, DataError),
    ],
)
def test_bad_requests_are_refused(kind: str, changes: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        build(kind, **changes)


@settings(max_examples=80, deadline=None)
@given(
    subtask=st.sampled_from(ORDER),
    own=st.integers(0, 6),
    others=st.integers(0, 4),
    budget=st.integers(0, 300),
    seed=st.integers(0, 99),
)
def test_every_context_keeps_to_its_budget_and_to_easier_subtasks(
    subtask: str, own: int, others: int, budget: int, seed: int
) -> None:
    def count(name: str, row: Example) -> int:
        return 5 + int(row.id, 16) % 40

    for kind in CONTEXTS:
        context = build(kind, subtask, own_shots=own, others=others, budget=budget, count_tokens=count, seed=seed)
        assert context.tokens == sum(count(*demonstration) for demonstration in context.demonstrations) <= budget
        found = Counter(sources(context))
        assert found[subtask] <= own
        assert all(found[name] <= others for name in ORDER if name != subtask)
        assert all(ORDER.index(name) <= ORDER.index(subtask) for name in found)
        assert sources(context)[len(context.demonstrations) - found[subtask] :] == [subtask] * found[subtask]
