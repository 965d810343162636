"""Forward passes that compute nothing twice, against plain passes that compute everything each time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import VOCABULARY, answer_logits, backbone_of, naive_logprob, plain_model
from torch import nn

from memmcl.backbone.batches import ROUND, TokenizedRow, collate, pack
from memmcl.backbone.decode import _fewer, dropping, in_place
from memmcl.backbone.forward import Backbone
from memmcl.errors import ModelError

SPLITS = (0, 1, 2)
TOLERANCE = {"rtol": 0, "atol": 1e-4}


@pytest.fixture(scope="module")
def model(tiny_base: Path) -> nn.Module:
    """The oracle: the same weights, run by transformers alone."""
    return plain_model(tiny_base)


@pytest.fixture(scope="module", params=SPLITS)
def backbone(request: pytest.FixtureRequest, tiny_base: Path) -> Backbone:
    return backbone_of(tiny_base, request.param)


def random_ids(rng: np.random.Generator, length: int) -> tuple[int, ...]:
    return tuple(int(token) for token in rng.integers(3, VOCABULARY, length))


def random_rows(seed: int, prefix: int, lengths: tuple[int, ...] = (1, 9, 4, 6, 2, 9, 3)) -> list[TokenizedRow]:
    """Rows behind one prefix; continuations of one token and more, some with the same beginning."""
    rng = np.random.default_rng(seed)
    shared, start = random_ids(rng, prefix), random_ids(rng, 2)
    continuations = ((*start, 7, 2), (*start, 2), start, (start[0],), (11,), (11, 2), random_ids(rng, 5))
    return [
        TokenizedRow((*shared, *random_ids(rng, length)), continuations[: 1 + i]) for i, length in enumerate(lengths)
    ]


def scored_logits(
    backbone: Backbone, rows: list[TokenizedRow], prefix: int, batch_size: int
) -> dict[tuple[int, int], torch.Tensor]:
    """Return, by (row, continuation), the logits that predict its tokens."""
    prepared = backbone.prepare(rows, batch_size=batch_size, prefix=prefix)
    backbone.trunk(prepared)
    cache = backbone.prefix_cache(prepared)
    found: dict[tuple[int, int], list[torch.Tensor]] = {}
    targets: dict[tuple[int, int], list[int]] = {}
    for index, order in enumerate(prepared.order):
        batch = prepared.batches[index]
        logits = backbone.logits(backbone.outputs(prepared, index, cache))[batch.picks]
        for (row, continuation), line, target in zip(
            batch.owners.tolist(), logits, batch.targets.tolist(), strict=True
        ):
            found.setdefault((order[row], continuation), []).append(line)
            targets.setdefault((order[row], continuation), []).append(target)
    for (row, continuation), ids in targets.items():
        assert tuple(ids) == rows[row].continuations[continuation]
    return {key: torch.stack(lines) for key, lines in found.items()}


def test_collate_lays_out_a_tree() -> None:
    batch = collate([TokenizedRow((5, 6), ((7, 8), (9,))), TokenizedRow((4,), ((3, 2, 1),))], pad=0, prefix=3)
    assert batch.tokens.tolist() == [[5, 6, 7], [4, 3, 2]]
    assert batch.positions.tolist() == [[3, 4, 5], [3, 4, 5]]
    assert batch.queries.tolist() == [[0, 1], [0, 2], [1, 0], [1, 1], [1, 2]]
    assert batch.picks.tolist() == [0, 1, 0, 2, 3, 4]
    assert batch.targets.tolist() == [7, 8, 9, 3, 2, 1]
    assert batch.owners.tolist() == [[0, 0], [0, 0], [0, 1], [1, 0], [1, 0], [1, 0]]
    assert batch.lengths.tolist() == [2, 1]
    assert batch.mask.shape == (2, 1, 3, 6)
    assert batch.mask[..., :3].all()


def test_the_mask_hides_one_continuation_from_another_and_padding_from_all() -> None:
    batch = collate([TokenizedRow((5, 6), ((7, 8, 2), (9, 2), (4,))), TokenizedRow((3,))], pad=0)
    assert batch.tokens.tolist() == [[5, 6, 7, 8, 9], [3, 0, 0, 0, 0]]
    assert batch.positions.tolist()[0] == [0, 1, 2, 3, 2]
    first, second = batch.mask[:, 0].int().tolist()
    assert first == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 0, 0, 1]]
    assert [line[0] for line in second] == [1, 0, 0, 0, 0]
    assert second[0] == [1, 0, 0, 0, 0]
    assert batch.mask.any(-1).all(), "a position that may attend nowhere gives NaN"


@pytest.mark.parametrize("prefix", [0, 5])
@pytest.mark.parametrize("batch_size", [1, 2, 3, 4, 5])
def test_all_continuations_in_one_pass_equal_one_pass_each(
    backbone: Backbone, model: nn.Module, batch_size: int, prefix: int
) -> None:
    rows = random_rows(batch_size, prefix)
    found = scored_logits(backbone, rows, prefix, batch_size)
    assert set(found) == {(i, c) for i, row in enumerate(rows) for c in range(len(row.continuations))}
    with torch.no_grad():
        for (i, c), logits in found.items():
            expected = answer_logits(model, rows[i].prompt, rows[i].continuations[c])
            torch.testing.assert_close(logits, expected, **TOLERANCE)


def test_the_trunk_is_computed_once_and_serves_other_top_weights(backbone: Backbone, tiny_base: Path) -> None:
    rows = random_rows(3, 4)
    prepared = backbone.prepare(rows, batch_size=3, prefix=4)
    backbone.trunk(prepared)
    before = list(prepared.hidden)
    changed = plain_model(tiny_base)
    weight = backbone.decoder.layers[-1].mlp.down_proj.weight
    kept = weight.detach().clone()
    try:
        with torch.no_grad():
            weight.mul_(1.7)
            changed.model.layers[-1].mlp.down_proj.weight.mul_(1.7)
        backbone.trunk(prepared)
        assert all(a is b for a, b in zip(before, prepared.hidden, strict=True))
        cache = backbone.prefix_cache(prepared)
        outputs = [backbone.outputs(prepared, index, cache) for index in range(len(prepared.batches))]
        again = [backbone.outputs(prepared, index, cache) for index in range(len(prepared.batches))]
    finally:
        weight.copy_(kept)
    for index, order in enumerate(prepared.order):
        batch = prepared.batches[index]
        assert torch.equal(outputs[index], again[index]), "the prefix's cache was changed by use"
        logprobs = backbone.logits(outputs[index]).log_softmax(-1)[batch.picks, batch.targets]
        sums: dict[tuple[int, int], float] = {}
        for (row, continuation), value in zip(batch.owners.tolist(), logprobs.tolist(), strict=True):
            sums[row, continuation] = sums.get((row, continuation), 0.0) + value
        for (row, continuation), value in sums.items():
            original = rows[order[row]]
            assert value == pytest.approx(
                naive_logprob(changed, original.prompt, original.continuations[continuation]), abs=1e-4
            )


def test_the_trunks_keys_and_values_can_be_asked_for_later(backbone: Backbone) -> None:
    rows = [TokenizedRow(row.prompt) for row in random_rows(5, 2)]
    later, at_once = (backbone.prepare(rows, batch_size=3, prefix=2) for _ in range(2))
    backbone.trunk(later)
    backbone.trunk(later, keep_cache=True)
    backbone.trunk(at_once, keep_cache=True)
    for prepared in (later, at_once):
        assert len(prepared.caches) == len(prepared.hidden) == len(prepared.batches) == 3
    one, two = (
        [dropping(backbone, p, i, backbone.prefix_cache(p), end=2, max_new_tokens=4) for i in range(3)]
        for p in (later, at_once)
    )
    assert one == two


def test_sequence_hidden_is_the_models_own_hidden_state(backbone: Backbone, model: nn.Module) -> None:
    ids = random_ids(np.random.default_rng(0), 11)
    with torch.no_grad():
        states = model(torch.tensor([ids]), output_hidden_states=True).hidden_states
    torch.testing.assert_close(backbone.sequence_hidden(ids), states[backbone.split][0], rtol=0, atol=1e-5)


def test_prepare_sorts_rows_by_length_and_keeps_their_indices(backbone: Backbone) -> None:
    rows = [
        TokenizedRow((1, 2, 3, 4), ((5,),)),
        TokenizedRow((1, 2), ((5,),)),
        TokenizedRow((1, 2), ((5, 6, 7),)),
        TokenizedRow((1, 9, 9), ((5,),)),
    ]
    prepared = backbone.prepare(rows, batch_size=3, prefix=1)
    assert prepared.order == [[1, 3, 0], [2]]
    assert prepared.prefix == (1,)
    assert prepared.rows == 4
    assert prepared.batches[0].tokens.tolist() == [[2, 0, 0], [9, 9, 0], [2, 3, 4]]


def generated(model: nn.Module, prompt: tuple[int, ...], end: int, count: int) -> list[int]:
    """What transformers generates greedily, one row alone, without the end token."""
    out = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        do_sample=False,
        max_new_tokens=count,
        eos_token_id=end,
        pad_token_id=0,
    )[0, len(prompt) :].tolist()
    return out[: out.index(end)] if end in out else out


Decode = Callable[..., list[list[int]]]
WAYS = pytest.mark.parametrize("decode", [dropping, in_place])


@WAYS
@pytest.mark.parametrize("prefix", [0, 5])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_greedy_equals_generate(
    backbone: Backbone, model: nn.Module, batch_size: int, prefix: int, decode: Decode
) -> None:
    rows = [TokenizedRow(row.prompt) for row in random_rows(2, prefix)]
    free = [generated(model, row.prompt, VOCABULARY, 8) for row in rows]
    assert len({token for ids in free for token in ids}) > 10, "the oracle says one token over and over"
    end = free[1][3]  # stops one row in the middle, others later or never
    expected = [generated(model, row.prompt, end, 8) for row in rows]
    assert {len(ids) for ids in expected} > {8}
    prepared = backbone.prepare(rows, batch_size=batch_size, prefix=prefix)
    backbone.trunk(prepared, keep_cache=True)
    cache = backbone.prefix_cache(prepared)
    for _ in range(2):  # twice: decoding must not use its caches up
        answers: dict[int, list[int]] = {}
        for index, order in enumerate(prepared.order):
            decoded = decode(backbone, prepared, index, cache, end=end, max_new_tokens=8)
            answers.update(zip(order, decoded, strict=True))
        assert [answers[i] for i in range(len(rows))] == expected


@WAYS
@pytest.mark.parametrize("limit", [1, 2, 5])
def test_greedy_stops_at_the_limit(backbone: Backbone, model: nn.Module, limit: int, decode: Decode) -> None:
    rows = [TokenizedRow(row.prompt) for row in random_rows(4, 0)]
    prepared = backbone.prepare(rows, batch_size=8)
    backbone.trunk(prepared, keep_cache=True)
    (order,) = prepared.order
    answers = decode(backbone, prepared, 0, None, end=VOCABULARY, max_new_tokens=limit)
    assert answers == [generated(model, rows[i].prompt, VOCABULARY, limit) for i in order]
    assert {len(ids) for ids in answers} == {limit}


@WAYS
def test_an_answer_that_ends_at_once_is_empty(backbone: Backbone, model: nn.Module, decode: Decode) -> None:
    rows = [TokenizedRow(row.prompt) for row in random_rows(4, 0)]
    end = generated(model, rows[0].prompt, VOCABULARY, 1)[0]
    prepared = backbone.prepare(rows[:1], batch_size=8)
    backbone.trunk(prepared, keep_cache=True)
    assert decode(backbone, prepared, 0, None, end=end, max_new_tokens=6) == [[]]


@WAYS
@pytest.mark.parametrize("prefix", [0, 5])
def test_weights_that_are_no_numbers_leave_nothing_behind(backbone: Backbone, decode: Decode, prefix: int) -> None:
    rows = [TokenizedRow(row.prompt) for row in random_rows(4, prefix)]
    prepared = backbone.prepare(rows, batch_size=8, prefix=prefix)
    backbone.trunk(prepared, keep_cache=True)

    def decoded() -> list[list[int]]:
        return decode(backbone, prepared, 0, backbone.prefix_cache(prepared), end=VOCABULARY, max_new_tokens=5)

    before = decoded()
    weight = backbone.decoder.layers[-2].mlp.down_proj.weight
    kept = weight.detach().clone()
    try:
        with torch.no_grad():
            weight.fill_(torch.nan)
        assert decoded() != before
    finally:
        weight.copy_(kept)
    assert decoded() == before


def packed_rows() -> tuple[list[TokenizedRow], list[int]]:
    """Rows of two prefixes and of none, one of them twice, with answers of one token and more."""
    rng = np.random.default_rng(6)
    first, second = random_ids(rng, 4), random_ids(rng, 2)
    rows = [
        TokenizedRow((*first, *random_ids(rng, 3)), (random_ids(rng, 3),)),
        TokenizedRow((*second, *random_ids(rng, 5)), (random_ids(rng, 1),)),
        TokenizedRow((*first, *random_ids(rng, 1)), (random_ids(rng, 2),)),
        TokenizedRow(random_ids(rng, 4), (random_ids(rng, 4),)),
        TokenizedRow((*second, *random_ids(rng, 2)), (random_ids(rng, 2),)),
        TokenizedRow(random_ids(rng, 1), (random_ids(rng, 1),)),
    ]
    return [*rows, rows[0]], [4, 2, 4, 0, 2, 0, 4]


def test_pack_holds_each_prefix_once_and_pads_the_end_alone() -> None:
    rows, prefixes = packed_rows()
    batch = pack(rows, prefixes, 0)
    bodies = [
        len(row.prompt) - prefix + len(row.continuations[0]) - 1 for row, prefix in zip(rows, prefixes, strict=True)
    ]
    used = sum(bodies) + 4 + 2
    assert batch.lengths.tolist() == [used]
    assert batch.tokens.shape == batch.positions.shape == (1, used + -used % ROUND)
    assert not batch.mask[0, 0, :used, used:].any()
    assert batch.owners[:, 0].tolist() == [i for i, row in enumerate(rows) for _ in row.continuations[0]]
    assert batch.targets.tolist() == [token for row in rows for token in row.continuations[0]]


def test_packed_rows_behave_as_if_each_stood_alone(backbone: Backbone, model: nn.Module) -> None:
    rows, prefixes = packed_rows()
    batch = pack(rows, prefixes, 0)
    parts, seen = [], set()
    for row, prefix in zip(rows, prefixes, strict=True):
        (answer,) = row.continuations
        hidden = backbone.sequence_hidden((*row.prompt, *answer[:-1]))
        if row.prompt[:prefix] not in seen:
            seen.add(row.prompt[:prefix])
            parts.append(hidden[:prefix])
        parts.append(hidden[prefix:])
    with torch.no_grad():
        hidden = torch.cat(parts)
        hidden = nn.functional.pad(hidden, (0, 0, 0, batch.tokens.shape[1] - len(hidden)), value=7.0)
        logits = backbone.logits(backbone.top(hidden[None], batch))
        expected = torch.cat([answer_logits(model, row.prompt, row.continuations[0]) for row in rows])
    torch.testing.assert_close(logits, expected, **TOLERANCE)
    loss = nn.functional.cross_entropy(logits, batch.targets)
    total = sum(naive_logprob(model, row.prompt, row.continuations[0]) for row in rows)
    assert float(loss) == pytest.approx(-total / len(batch.targets), abs=1e-4)


def test_the_last_mlp_runs_at_answers_alone_with_the_same_values_and_gradients(backbone: Backbone) -> None:
    rows, prefixes = packed_rows()
    batch = pack(rows, prefixes, 0)
    mlp = backbone.model.model.layers[-1].mlp
    sizes: list[int] = []
    found = []
    for every_token in (False, True):
        hidden = torch.randn(1, batch.tokens.shape[1], 64, generator=torch.Generator().manual_seed(0))
        hidden.requires_grad_()
        weights = [mlp.down_proj.weight, backbone.model.model.layers[-1].self_attn.v_proj.weight]
        for weight in weights:
            weight.requires_grad_()
        with mlp.down_proj.register_forward_pre_hook(lambda _, given: sizes.append(given[0].shape[-2])):
            out = backbone.top(hidden, batch, every_token=every_token)
        found.append((out, *torch.autograd.grad(out.square().sum(), [hidden, *weights])))
        for weight in weights:
            weight.requires_grad_(False)
    assert sizes == [len(batch.queries) + -len(batch.queries) % ROUND, batch.tokens.shape[1]]
    for ours, whole in zip(*found, strict=True):
        torch.testing.assert_close(ours, whole, rtol=1e-4, atol=1e-5)


def test_a_backbone_leaves_the_model_as_it_was(backbone: Backbone, model: nn.Module) -> None:
    ids = torch.tensor([random_ids(np.random.default_rng(1), 9)])
    with torch.no_grad():
        torch.testing.assert_close(backbone.model(ids).logits, model(ids).logits, rtol=0, atol=0)
    assert backbone.layers == len(backbone.model.model.layers) == 4


class Foreign(nn.Module):
    """A model that keeps its layers elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer = nn.Linear(2, 2)


def test_a_model_without_model_layers_is_refused() -> None:
    with pytest.raises(ModelError, match=r"Foreign has no `model\.layers`.*Llama, Qwen or Mistral"):
        Backbone(Foreign(), pad=0, split=0)


@pytest.mark.parametrize("split", [-1, 4, 9])
def test_a_split_that_is_no_layer_is_refused(tiny_base: Path, split: int) -> None:
    with pytest.raises(ModelError, match=f"layers 0 to 3; it cannot be split at layer {split}"):
        backbone_of(tiny_base, split)


@pytest.mark.parametrize(
    ("live", "kept"),
    [
        ([True] * 3, [0, 1, 2]),
        ([False, True, False], [0, 1, 2]),  # eight rows or fewer stay together
        ([True] * 9 + [False] * 7, list(range(16))),
        ([False] * 8 + [True] * 8, list(range(8, 16))),
        ([False] * 9 + [True] * 7, [0, *range(9, 16)]),  # one that has ended fills the batch up
    ],
)
def test_batches_that_are_decoded_fall_in_steps(live: list[bool], kept: list[int]) -> None:
    assert _fewer(torch.tensor(live)).tolist() == kept
