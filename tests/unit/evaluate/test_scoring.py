"""Probes: whole labels and tuple answers, scored many at a time as if each stood alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import backbone_of, corpus, naive_logprob, prompter_of, random_factors
from torch import nn

from memmcl.backbone.forward import Backbone
from memmcl.evaluate.scoring import Probe
from memmcl.merge.build import Merger
from memmcl.suite.examples import Example
from memmcl.suite.prompts import Demonstration, Prompter
from memmcl.suite.subtasks import SUBTASKS, Subtask

SPLITS = (0, 1, 2)
# Labels that share their first tokens; one of a single token, one that begins another.
AWKWARD = replace(SUBTASKS["irony"], labels=("irony", "non_irony", "non", "non_iro", "i"), positive_label="irony")


@pytest.fixture(scope="module", params=SPLITS)
def backbone(request: pytest.FixtureRequest, tiny_base: Path) -> Backbone:
    return backbone_of(tiny_base, request.param)


@pytest.fixture(scope="module", params=["chat", "plain"])
def prompter(request: pytest.FixtureRequest, tiny_base: Path, plain_base: Path) -> Prompter:
    return prompter_of(tiny_base if request.param == "chat" else plain_base)


@pytest.fixture(scope="module")
def chat(tiny_base: Path) -> Prompter:
    return prompter_of(tiny_base)


def naive_scores(
    model: nn.Module,
    prompter: Prompter,
    subtask: Subtask,
    examples: Sequence[Example],
    shots: Sequence[Demonstration] = (),
) -> np.ndarray:
    """One pass per row and label, nothing shared."""
    return np.array(
        [
            [
                naive_logprob(model, prompter.prompt(subtask, example, shots), prompter.answer(label))
                for label in subtask.labels
            ]
            for example in examples
        ]
    )


SHOTS = {
    "none": (),
    "own": tuple((SUBTASKS["sent2"], shot) for shot in corpus("sent2", 12)[10:]),
    "mixed": ((SUBTASKS["emotion"], corpus("emotion", 1)[0]), (SUBTASKS["uabsa"], corpus("uabsa", 1)[0])),
}


@pytest.mark.parametrize("shots", SHOTS)
@pytest.mark.parametrize("name", ["asc", "emotion"])
def test_label_scores_equal_one_pass_per_label(
    backbone: Backbone, model: nn.Module, prompter: Prompter, name: str, shots: str
) -> None:
    examples, subtask = corpus(name, 3), SUBTASKS[name]
    probe = Probe(backbone, prompter, subtask, examples, demonstrations=SHOTS[shots], batch_size=2)
    expected = naive_scores(model, prompter, subtask, examples, SHOTS[shots])
    found = probe.label_scores()
    assert found.dtype == np.float64
    assert probe.prefix_tokens > 10
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
    assert np.array_equal(probe.label_scores(), found), "the second look differs from the first"


@pytest.mark.parametrize("batch_size", [1, 2, 3, 4, 5])
def test_batch_size_and_labels_that_begin_alike(
    backbone: Backbone, model: nn.Module, chat: Prompter, batch_size: int
) -> None:
    answers = [chat.answer(label) for label in AWKWARD.labels]
    assert answers[1][0] == answers[2][0] == answers[3][0]
    assert len(answers[4]) == 2, "the one-token label has more tokens"
    examples = corpus("irony", 4)
    probe = Probe(backbone, chat, AWKWARD, examples, batch_size=batch_size)
    np.testing.assert_allclose(probe.label_scores(), naive_scores(model, chat, AWKWARD, examples), rtol=0, atol=1e-4)


def test_one_row_alone(backbone: Backbone, model: nn.Module, chat: Prompter) -> None:
    """All but the last token of the only prompt is its shared prefix."""
    examples = corpus("sent2", 1)
    probe = Probe(backbone, chat, SUBTASKS["sent2"], examples)
    assert probe.prefix_tokens == len(chat.prompt(SUBTASKS["sent2"], examples[0])) - 1
    np.testing.assert_allclose(
        probe.label_scores(), naive_scores(model, chat, SUBTASKS["sent2"], examples), rtol=0, atol=1e-4
    )


@pytest.mark.parametrize("name", ["asc", "uabsa", "aste"])
@pytest.mark.parametrize("shots", ["none", "mixed"])
def test_gold_logprob_is_the_mean_over_answer_tokens(
    backbone: Backbone, model: nn.Module, prompter: Prompter, name: str, shots: str
) -> None:
    examples, subtask = corpus(name, 4), SUBTASKS[name]
    probe = Probe(backbone, prompter, subtask, examples, demonstrations=SHOTS[shots], batch_size=3)
    answers = [prompter.answer(example.answer) for example in examples]
    prompts = [prompter.prompt(subtask, example, SHOTS[shots]) for example in examples]
    total = sum(naive_logprob(model, prompt, answer) for prompt, answer in zip(prompts, answers, strict=True))
    assert probe.gold_logprob() == pytest.approx(total / sum(map(len, answers)), abs=1e-4)


def test_label_answers_are_the_best_scores_less_offsets(backbone: Backbone, chat: Prompter) -> None:
    subtask = SUBTASKS["emotion"]
    probe = Probe(backbone, chat, subtask, corpus("emotion", 5), batch_size=2)
    scores = probe.label_scores()
    assert probe.answers() == [subtask.labels[i] for i in scores.argmax(axis=1)]
    offsets = np.median(scores, axis=0)
    calibrated = probe.answers(offsets)
    assert calibrated == [subtask.labels[i] for i in (scores - offsets).argmax(axis=1)]
    assert calibrated != probe.answers()


@pytest.mark.parametrize("shots", ["none", "mixed"])
def test_tuple_answers_are_what_transformers_generates(
    backbone: Backbone, model: nn.Module, chat: Prompter, shots: str
) -> None:
    examples, subtask = corpus("uabsa", 5), SUBTASKS["uabsa"]
    probe = Probe(backbone, chat, subtask, examples, demonstrations=SHOTS[shots], batch_size=2, max_new_tokens=7)
    expected = []
    for example in examples:
        prompt = torch.tensor([chat.prompt(subtask, example, SHOTS[shots])])
        mask = torch.ones_like(prompt)
        out = model.generate(
            prompt, attention_mask=mask, do_sample=False, max_new_tokens=7, eos_token_id=2, pad_token_id=0
        )
        expected.append(chat.decode(out[0, prompt.shape[1] :].tolist()))
    assert len(set(expected)) > 1
    assert probe.answers() == expected
    assert probe.answers() == expected, "the second look differs from the first"


def test_a_probe_follows_the_weights(tiny_base: Path, chat: Prompter) -> None:
    """Scores after a merge are those of a probe made after it, though the old probe keeps its trunk."""
    backbone = backbone_of(tiny_base, 2)
    merger = Merger(backbone, {"one": random_factors(tiny_base, layers=(2, 3), seed=1)}, blocks=1)
    examples = corpus("asc", 4)
    probe = Probe(backbone, chat, SUBTASKS["asc"], examples)
    tuples = Probe(backbone, chat, SUBTASKS["uabsa"], corpus("uabsa", 3), max_new_tokens=6)
    base, base_tuples = probe.label_scores(), tuples.answers()
    merger.apply({"one": (0.8,)})
    merged, merged_tuples = probe.label_scores(), tuples.answers()
    fresh = Probe(backbone, chat, SUBTASKS["asc"], examples)
    assert np.array_equal(merged, fresh.label_scores())
    assert np.abs(merged - base).max() > 0.1
    np.testing.assert_allclose(merged, naive_scores(backbone.model, chat, SUBTASKS["asc"], examples), rtol=0, atol=1e-4)
    assert merged_tuples != base_tuples
    assert merged_tuples == Probe(backbone, chat, SUBTASKS["uabsa"], corpus("uabsa", 3), max_new_tokens=6).answers()
    merger.reset()
    assert np.array_equal(probe.label_scores(), base)
    assert tuples.answers() == base_tuples


def test_a_probe_leaves_no_gradients_and_no_random_numbers(tiny_base: Path, chat: Prompter) -> None:
    state = torch.random.get_rng_state()
    backbone = backbone_of(tiny_base, 1)
    Probe(backbone, chat, SUBTASKS["sent2"], corpus("sent2", 2)).label_scores()
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in backbone.model.parameters())
    assert torch.equal(torch.random.get_rng_state(), state)
