"""The configuration: what it takes, what it refuses, and how it says so."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel, ValidationError

from memmcl import seeds
from memmcl.config import DataConfig, RunConfig, load_config, parse_config
from memmcl.errors import ConfigError
from memmcl.suite.subtasks import SUBTASKS

SECTIONS = ("model", "data", "experts", "search", "curriculum", "evaluation", "promotion", "store", "ray")


def sections(model: type[BaseModel] = RunConfig, prefix: str = "") -> Iterator[tuple[str, type[BaseModel]]]:
    yield prefix, model
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from sections(field.annotation, f"{prefix}{name}.")


def tree_of(key: str, value: object) -> dict[str, Any]:
    """{"a": {"b": value}} for "a.b"."""
    tree: Any = value
    for name in reversed(key.split(".")):
        tree = {name: tree}
    return dict(tree)


def test_every_field_says_what_it_is() -> None:
    found = dict(sections())
    assert set(found) == {"", *(f"{name}." for name in SECTIONS)}
    for prefix, model in found.items():
        assert model.__doc__
        for name, field in model.model_fields.items():
            assert field.description, f"{prefix}{name} has no description"
            assert field.description[0] == field.description[0].upper() or field.description[0] in "'m"
            assert not field.is_required(), f"{prefix}{name} has no default"


def test_the_defaults_are_a_valid_run_of_known_subtasks() -> None:
    config = load_config(None)
    assert config == RunConfig() == parse_config({})
    assert set(config.data.subtasks) <= set(SUBTASKS)
    assert config.search.bounds == (0.0, 1.5)
    assert config.search.lookahead >= config.ray.workers


@pytest.mark.parametrize("key", [prefix for prefix, _ in sections()])
def test_an_unknown_key_names_the_known_ones_of_its_section(key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(tree_of(f"{key}stepz", 3), "run.yaml")
    fields = dict(sections())[key].model_fields
    assert str(caught.value) == f"run.yaml: unknown key '{key}stepz'; known here: {', '.join(fields)}"


def test_all_problems_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config({"experts": {"steps": 0, "rank": "many"}, "sead": 3})
    message = str(caught.value)
    assert "\n" not in message
    assert message.count("; ") == 3  # three problems, and one inside the unknown key's
    assert "experts.steps: input should be greater than or equal to 1 (got 0)" in message
    assert "experts.rank: input should be a valid integer, unable to parse string as an integer (got 'many')" in message
    assert "unknown key 'sead'; known here: name, seed, model" in message


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("seed", -1),
        ("name", ""),
        ("name", "n" * 81),
        ("export", "onnx"),
        ("model.name_or_path", ""),
        ("model.dtype", "float16"),
        ("model.device", "tpu"),
        ("data.source", ""),
        ("data.subtasks", []),
        ("data.train_rows", 0),
        ("data.weak_rows", 0),
        ("data.test_rows", 0),
        ("data.max_prompt_tokens", 15),
        ("data.max_prompt_tokens", 8193),
        ("data.on_overlap", "ignore"),
        ("experts.steps", 0),
        ("experts.steps", 1.5),
        ("experts.batch_size", 0),
        ("experts.rank", 0),
        ("experts.rank", 513),
        ("experts.alpha", 0),
        ("experts.alpha", float("inf")),
        ("experts.adapt_layers", "top-0"),
        ("experts.adapt_layers", "top10"),
        ("experts.adapt_layers", "bottom-3"),
        ("experts.target_modules", []),
        ("experts.learning_rate", 0),
        ("experts.learning_rate", 1.5),
        ("experts.learning_rate", float("nan")),
        ("experts.warmup", -0.1),
        ("experts.warmup", 1.1),
        ("experts.weight_decay", -1),
        ("experts.clip", 0),
        ("experts.anchor_weight", -0.1),
        ("experts.anchor_weight", float("inf")),
        ("experts.anchor_batch_size", 0),
        ("experts.anchor_rows", 0),
        ("experts.micro_batch_size", 0),
        ("experts.dropout", 1),
        ("experts.init", "zeros"),
        ("experts.schedule", "step"),
        ("experts.warm_start", 1),
        ("experts.warm_start", -0.1),
        ("experts.anchor_every", 0),
        ("experts.anchor_every", 17),
        ("experts.anchor_delay", 1.1),
        ("experts.anchor_after", 1),
        ("experts.anchor_source", "web"),
        ("experts.validation_rows", -1),
        ("experts.validate_every", 0),
        ("experts.patience", -1),
        ("experts.checkpoint_every", -1),
        ("search.strategy", "grid"),
        ("search.stage1_evaluations", 0),
        ("search.stage2_evaluations", 0),
        ("search.blocks", 0),
        ("search.lambdas", []),
        ("search.population", 3),
        ("search.sigma", 0),
        ("search.sigma", 1.1),
        ("search.fitness", "loss"),
        ("search.lookahead", 0),
        ("search.bounds", [0.0, float("inf")]),
        ("search.bounds", [0.0]),
        ("curriculum.contexts", ["zero-shot", "hard-first"]),
        ("curriculum.own_shots", -1),
        ("curriculum.shots_per_subtask", -1),
        ("curriculum.budget_tokens", -1),
        ("curriculum.gate_margin", -1),
        ("curriculum.weights", {"classes": "heavy"}),
        ("evaluation.batch_size", 0),
        ("evaluation.max_new_tokens", 0),
        ("evaluation.max_new_tokens", 1025),
        ("evaluation.bootstrap_samples", 99),
        ("evaluation.interference_rows", -1),
        ("store.url", ""),
        ("ray.workers", 0),
        ("ray.cpus_per_worker", 0),
        ("ray.gpus_per_worker", -1),
    ],
)
def test_values_out_of_bounds(key: str, value: object) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(tree_of(key, value))
    message = str(caught.value)
    assert message.startswith(f"config: {key}")
    assert "\n" not in message


@pytest.mark.parametrize(
    ("tree", "said"),
    [
        ({"search": {"bounds": [1.5, 0.0]}}, r"search: bounds must rise; got 1\.5, 0\.0"),
        (
            {"search": {"bounds": [0.1, 1.5]}},
            r"search: bounds must hold 0 \(the base\) and 1 \(an expert\); got 0\.1, 1\.5",
        ),
        ({"search": {"bounds": [0.0, 0.9], "lambdas": [0.5]}}, "bounds must hold 0"),
        ({"search": {"lambdas": [0.5, 1.6]}}, r"search: lambdas must lie within bounds \[0\.0, 1\.5\]; got 1\.6"),
        ({"data": {"subtasks": ["asc", "sent2", "asc"]}}, r"data\.subtasks: each subtask may be named once"),
        ({"curriculum": {"contexts": ["curriculum"]}}, "contexts must name zero-shot, and each context once"),
        (
            {"curriculum": {"contexts": ["zero-shot", "zero-shot"]}},
            "contexts must name zero-shot, and each context once",
        ),
        (
            {"experts": {"anchor_source": "texts"}},
            "experts: anchor_texts goes with anchor_source: texts, and that with it",
        ),
        ({"experts": {"anchor_texts": "a.txt"}}, "experts: anchor_texts goes with anchor_source: texts"),
        (
            {"experts": {"patience": 2}},
            "experts: patience needs validation_rows: without them nothing says when to stop",
        ),
        (
            {"experts": {"anchor_after": 0.3, "anchor_weight": 0}},
            "experts: anchor_after needs an anchor_weight above 0",
        ),
        (
            {"search": {"lookahead": 2}, "ray": {"workers": 3}},
            r"config: search\.lookahead \(2\) must be at least ray\.workers \(3\), or workers stand idle",
        ),
    ],
)
def test_values_that_do_not_fit_together(tree: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse_config(tree)


def test_as_many_candidates_ahead_as_workers_is_enough() -> None:
    assert parse_config({"search": {"lookahead": 3}, "ray": {"workers": 3}}).search.lookahead == 3


def test_a_file_and_overrides(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("seed: 5\nexperts: {steps: 40, rank: 4}\ndata:\n  subtasks: [sent2, asc]\n")
    config = load_config(
        path,
        [
            "experts.steps=7",
            "experts.learning_rate=1e-3",
            "search.bounds=[-0.5, 1.0]",
            "search.lambdas=[0.5]",
            "curriculum.weights={classes: 2}",
            "ray.address=null",
            "name=a=b",
            "evaluation.joint_lora=false",
        ],
    )
    assert (config.seed, config.experts.steps, config.experts.rank) == (5, 7, 4)
    assert config.experts.learning_rate == 0.001
    assert config.data == DataConfig(subtasks=("sent2", "asc"))
    assert (config.search.bounds, config.search.lambdas) == ((-0.5, 1.0), (0.5,))
    assert config.curriculum.weights == {"classes": 2.0}
    assert config.ray.address is None
    assert config.name == "a=b"
    assert config.evaluation.joint_lora is False


def test_the_last_override_wins() -> None:
    assert load_config(None, ["seed=1", "seed=2"]).seed == 2


def test_an_empty_file_is_the_defaults(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("# nothing yet\n")
    assert load_config(tmp_path / "run.yaml") == RunConfig()


@pytest.mark.parametrize("override", ["seed", "=3", "experts.=3", ".steps=3", "experts..steps=3", ""])
def test_an_override_without_key_or_value(override: str) -> None:
    with pytest.raises(ConfigError, match=r"--set expects key=value, as in --set experts\.steps=40; got"):
        load_config(None, [override])


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("experts.stepz=3", "unknown key 'experts.stepz'; known here: steps, batch_size"),
        ("expert.steps=3", "unknown key 'expert'; known here: name, seed"),
        ("seed.deep=3", "seed: input should be a valid integer"),
        ("experts.steps=", "experts.steps: input should be a valid integer (got None)"),
        ("experts.steps=[1", "--set experts.steps: '[1' is not a YAML value"),
        ("experts=3", "experts: input should be a valid dictionary"),
    ],
)
def test_an_override_that_does_not_fit(override: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, [override])
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_override_below_a_value(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("seed: 3\n")
    with pytest.raises(ConfigError, match=r"--set seed\.deep: seed is a value, not a section"):
        load_config(tmp_path / "run.yaml", ["seed.deep=1"])


def test_an_override_of_an_empty_section(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("experts:\n")
    assert load_config(tmp_path / "run.yaml", ["experts.steps=3"]).experts.steps == 3


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"seed: [1", "is not YAML"),
        (b"seed: 1\n\tdata: 2", "is not YAML"),
        (b"\xff\xfe\x00seed", "is not YAML"),
        (b"- seed", "expected a mapping of settings, got list"),
        (b"seed", "expected a mapping of settings, got str"),
        (b"1: 2", "should be strings|valid string"),
        (b"!!python/object/apply:os.system [echo]", "is not YAML"),
    ],
)
def test_a_file_that_is_no_configuration(tmp_path: Path, text: bytes, said: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(text)
    with pytest.raises(ConfigError, match=said) as caught:
        load_config(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"cannot read .*missing\.yaml: No such file or directory; give the path of a YAML file"
    ):
        load_config(tmp_path / "missing.yaml")
    with pytest.raises(ConfigError, match="Is a directory"):
        load_config(tmp_path)


def test_what_is_everything_but_where_and_the_name() -> None:
    here = RunConfig()
    there = parse_config({"name": "other", "store": {"url": "s3://b/p"}, "ray": {"workers": 4, "address": "auto"}})
    assert seeds.digest(here.what()) == seeds.digest(there.what())
    assert set(here.what()) == set(RunConfig.model_fields) - {"name", "promotion", "store", "ray"}
    for change in ({"seed": 1}, {"experts": {"steps": 1}}, {"model": {"dtype": "float32"}}, {"export": "full"}):
        assert seeds.digest(parse_config(change).what()) != seeds.digest(here.what())


def test_what_leaves_no_trace_in_the_model_does_not_make_another_run() -> None:
    """Where anchor texts lie, and how often a training is written down."""
    here, there = (
        parse_config({"experts": {"anchor_source": "texts", "anchor_texts": place, "checkpoint_every": every}})
        for place, every in (("a.txt", 5), ("s3://bucket/b.parquet", 0))
    )
    assert here.what() == there.what()
    assert here.what()["experts"]["anchor_source"] == "texts"


def test_what_is_plain_json_and_makes_the_same_run() -> None:
    config = parse_config({"search": {"bounds": [-1, 2]}, "curriculum": {"weights": {"classes": 1.5}}})
    again = parse_config(json.loads(json.dumps(config.what())))
    assert again == config
    assert parse_config(yaml.safe_load(yaml.safe_dump(config.model_dump(mode="json")))) == config


def test_a_configuration_cannot_be_changed() -> None:
    config = RunConfig()
    with pytest.raises(ValidationError, match="frozen"):
        config.seed = 3
    with pytest.raises(ValidationError, match="frozen"):
        config.experts.steps = 3
    with pytest.raises(ValidationError, match="frozen"):
        config.model.dtype = "float32"


# ------------------------------------------------------------------------------------ subtasks and sources of one's own

TICKETS: dict[str, Any] = {
    "name": "tickets",
    "group": "MAST",
    "instruction": "How urgent?",
    "labels": ["urgent", "can wait"],
    "data": {"path": "tickets.csv"},
}


def with_own(**changes: Any) -> dict[str, Any]:
    return {"data": {"subtasks": ["sent2", "tickets"], "custom": [TICKETS | changes]}}


def test_own_subtasks_have_the_usual_metric() -> None:
    assert parse_config(with_own()).data.custom[0].scored_by == "accuracy"
    pairs = with_own(labels=[], tuple_fields=["part", "fault"])
    assert parse_config(pairs).data.custom[0].scored_by == "tuple_f1"
    assert parse_config(with_own(metric="label_f1", positive_label="urgent")).data.custom[0].scored_by == "label_f1"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"labels": []}, "give either labels or tuple_fields"),
        ({"tuple_fields": ["part"]}, "give either labels or tuple_fields"),
        ({"labels": ["urgent"]}, "at least two labels"),
        ({"labels": ["urgent", "Urgent"]}, "named once, whatever its case"),
        ({"labels": ["urgent", " late"]}, "without spaces around them"),
        ({"metric": "tuple_f1"}, "tuple_f1 goes with tuple_fields"),
        ({"metric": "label_f1"}, "positive_label goes with metric label_f1"),
        ({"positive_label": "urgent"}, "positive_label goes with metric label_f1"),
        ({"metric": "label_f1", "positive_label": "never"}, "must be one of urgent, can wait"),
        ({"needs": ["text"]}, "a field of every row"),
        ({"name": "Tickets!"}, "should match pattern"),
        ({"group": "OTHER"}, "'SC', 'ABSA' or 'MAST'"),
        ({"data": {}}, "expected path, or train and test"),
        ({"data": {"train": "a.csv"}}, "expected path, or train and test"),
        ({"data": {"path": "a.csv", "test": "b.csv"}}, "leave out test, or path"),
        ({"data": {"path": "a.csv", "dataset": "b"}}, "leave out dataset, or path"),
        ({"data": {"path": "a.csv", "subset": "b"}}, "belong to dataset"),
        ({"data": {"paht": "a.csv"}}, r"unknown key 'data.custom.0.data.paht'; known here: path, train, weak, test"),
    ],
)
def test_an_own_subtask_that_cannot_be_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse_config(with_own(**changes))


def test_own_subtasks_and_sources_belong_to_named_subtasks() -> None:
    tree = with_own()
    tree["data"]["subtasks"] = ["sent2"]
    with pytest.raises(ConfigError, match=r"custom subtask 'tickets' is not in data\.subtasks"):
        parse_config(tree)
    with pytest.raises(ConfigError, match="needs a name of its own"):
        parse_config({"data": {"subtasks": ["tickets"], "custom": [TICKETS, TICKETS]}})
    with pytest.raises(ConfigError, match=r"names 'irony', which is not in data\.subtasks"):
        parse_config({"data": {"subtasks": ["sent2"], "sources": {"irony": {"path": "a.csv"}}}})
    with pytest.raises(ConfigError, match="has its data with it"):
        parse_config({"data": {**with_own()["data"], "sources": {"tickets": {"path": "a.csv"}}}})


@pytest.mark.parametrize(
    "tree",
    [
        {"data": {"source": "s3://me:hunter2@bucket/x"}},
        {"experts": {"anchor_source": "texts", "anchor_texts": "https://me:hunter2@example.org/a.txt"}},
        {"data": {"subtasks": ["sent2"], "sources": {"sent2": {"path": "https://me:hunter2@example.org/a.csv"}}}},
        {"data": {"subtasks": ["tickets"], "custom": [TICKETS | {"data": {"path": "https://hunter2@x.org/a.csv"}}]}},
    ],
)
def test_a_url_with_credentials_is_refused_and_not_repeated(tree: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="credentials in the environment") as caught:
        parse_config(tree)
    assert "hunter2" not in str(caught.value)


def test_where_rows_lie_does_not_make_another_run() -> None:
    here, there = (parse_config(with_own(data={"path": path})) for path in ("a.csv", "s3://b/c.parquet"))
    assert here.what() == there.what()
    assert parse_config(with_own(instruction="How late?")).what() != here.what()


@pytest.mark.parametrize("name", ["sent2", "train", "labels"])
def test_a_wrong_key_of_a_source_is_named_whatever_its_subtask_is_called(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"unknown key 'data.sources.{name}.file'; known here: path, train, weak"):
        parse_config({"data": {"sources": {name: {"file": "x.jsonl"}}}})


def test_a_secret_in_a_list_is_not_shown_in_part() -> None:
    with pytest.raises(ConfigError, match=r"data\.source: ") as error:
        parse_config({"data": {"source": ["a" * 160, f"s3://key:{'hunter2' * 9}@bucket/x"]}})
    assert "hunter2" not in str(error.value)
