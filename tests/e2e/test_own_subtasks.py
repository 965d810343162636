"""A user's own subtasks, from YAML and files alone, through the whole DAG into a bucket; weak rows without labels."""

from __future__ import annotations

import csv
import hashlib
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from e2e_driver import Desk, desk, manifest, one_line, read_json, tiny_config, traces
from servers import S3Server

from memmcl.store import Manifest, Store
from memmcl.suite.examples import from_table

pytestmark = pytest.mark.timeout(1200)

LABELS = {"1": "urgent", "2": "can wait", "3": "spam"}
"""What the file calls a label -> what it means."""
SAID = {"1": "is on fire", "2": "could be cleaner some day", "3": "wins you a free cruise"}
THINGS = ("printer", "lift", "kettle", "router", "door", "lamp", "heater", "till", "scanner", "fridge", "fan", "desk")
ROWS = 90
JOINT = 14


def write_tickets(path: Path) -> None:
    """Write a CSV with columns of its own names, semicolons, quoted line breaks, and labels that are numbers."""
    draw = random.Random(0)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter=";")
        writer.writerow(["no", "subject", "room", "urgency"])
        for number in range(ROWS):
            code = str(1 + number % 3)
            text = f"The {draw.choice(THINGS)}\nin corner {number} {SAID[code]}; see to it, {draw.random():.6f}."
            writer.writerow([number, text, f"room {number % 7}", code])


def write_parts(path: Path) -> None:
    """Write JSON lines whose answers are pairs."""
    draw = random.Random(1)
    rows = []
    for number in range(ROWS):
        thing, fault = draw.choice(THINGS), draw.choice(("rattles", "leaks", "smells"))
        rows.append({"text": f"Day {number}: the {thing} {fault}, {draw.random():.6f}.", "label": [[thing, fault]]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def own_config(base: Path, folder: Path) -> dict[str, Any]:
    """Return the tiny configuration with one subtask of the catalogue and two that nobody wrote Python for."""
    config = tiny_config(base)
    config["ray"] = {"workers": 1}  # two would import everything twice, which is what takes the time
    config["search"] |= {
        "method": "ties",
        "parameters": {"scale": 1.2},
        "genes": {"density": [0.1, 0.9]},
        "adapter_rank": 4,
        "stage1_evaluations": 8,
        "joint_evaluations": JOINT,
        "strategy": "genetic",
        "update": "steady-state",
        "mask": True,
        "keep": 0.4,
        "blocks": 2,
        "rivals": ["tsv"],
        "blend": {"loglik": 1, "agree": 3},
        "rungs": [0.3, 0.6],
        "finalists": 2,
        "shrink": 0.01,
    }
    config["data"] |= {
        "selection_rows": 3,
        "subtasks": ["sent2", "tickets", "parts"],
        "custom": [
            {
                "name": "tickets",
                "group": "MAST",
                "title": "Urgency of a ticket",
                "instruction": "Say how urgent the ticket is: urgent, can wait or spam.",
                "labels": list(LABELS.values()),
                "needs": ["place"],
                "metric": "macro_f1",
                "data": {
                    "path": str(folder / "tickets.csv"),
                    "labels": LABELS,
                    "columns": {"text": "subject", "place": "room", "label": "urgency"},
                },
            },
            {
                "name": "parts",
                "group": "ABSA",
                "instruction": "List [('part', 'fault'), ...].",
                "tuple_fields": ["part", "fault"],
                "data": {"path": (folder / "parts.jsonl").as_uri()},
            },
        ],
    }
    return config


@pytest.fixture(scope="module")
def bucket(s3: S3Server) -> dict[str, str]:
    """Where the run's store is, as settings."""
    return {"url": f"s3://{s3.bucket}/own", "endpoint_url": s3.endpoint_url, "region": "us-east-1"}


@pytest.fixture(scope="module")
def store(place: Desk, bucket: dict[str, str]) -> Store:
    """The run's store."""
    return Store.open(**bucket)


@pytest.fixture(scope="module")
def place(
    tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, prefect_api: str, s3: S3Server, bucket: dict[str, str]
) -> Iterator[Desk]:
    """A desk at which a run with own subtasks went through, on a Prefect server that was there before."""
    root = tmp_path_factory.mktemp("own")
    with desk(root, tiny_base, server=prefect_api, environment=s3.environment) as found:
        write_tickets(found.root / "tickets.csv")
        write_parts(found.root / "parts.jsonl")
        config = own_config(tiny_base, found.root)
        (found.cwd / "base").symlink_to(tiny_base)
        config["model"]["name_or_path"] = "base"  # where the command is given; workers have other folders
        config["store"] = bucket
        found.config.write_text(yaml.safe_dump(config))
        (found.root / "store.yaml").write_text(yaml.safe_dump({"store": bucket}))
        ended = found.watch("run", found.config)
        assert ended.code == 0, ended
        (found.root / "out.txt").write_text(ended.out)
        yield found


def at_bucket(place: Desk) -> tuple[str, Path]:
    """Return the options by which a command finds the store."""
    return "--config", place.root / "store.yaml"


def finished(store: Store) -> Manifest:
    (done,) = store.list("run")
    return done


def test_own_subtasks_are_trained_merged_and_scored(store: Store) -> None:
    assert {one.name for one in store.list("expert")} == {
        "expert sent2",
        "expert tickets",
        "expert parts",
        "joint LoRA",
        "weak LoRA",
    }
    unified = read_json(store, manifest(store, "search", "search unified"), "search.json")
    assert set(unified["coefficients"]) == {"sent2", "tickets", "parts"}
    results = read_json(store, finished(store), "results.json")
    scored = {(score["model"], score["subtask"]): score for score in results["scores"]}
    assert scored["unified", "tickets"]["metric"] == "macro_f1"
    assert scored["unified", "parts"]["metric"] == "tuple_f1"
    assert {"tickets", "parts"} <= set(results["curriculum"]["order"])
    rows = from_table(store.read(manifest(store, "split", "tickets train"), "rows.parquet"))
    assert {str(row.gold) for row in rows} == set(LABELS.values())
    assert all("\n" in row.text and row.fields["place"].startswith("room ") for row in rows)


def test_another_merge_method_goes_through_all_stages(store: Store) -> None:
    searches = {one.name: read_json(store, one, "search.json") for one in store.list("search")}
    assert searches.pop("search task arithmetic")["recipe"]["method"] == "linear"
    assert searches.pop("search tsv")["recipe"]["method"] == "tsv"
    for name, found in searches.items():
        assert found["genes"][-1] == "density", name
        if found["winner"] is not None:
            winner = found["candidates"][found["winner"]]["genome"]
            assert found["recipe"]["parameters"] == {"scale": 1.2, "density": winner[-1]}
        seen = {entry["genome"][-1] for entry in found["candidates"]}
        assert 0.5 in seen, "seeds start at the method's default"
        assert all(0.1 <= density <= 0.9 for density in seen)
    joint = {entry["genome"][-1] for entry in searches["search unified"]["joint"]["candidates"]}
    assert len(joint) > 1, "the density was searched"
    (unified,) = store.list("unified")
    assert unified.metrics["method"] == searches["search unified"]["recipe"]["method"]
    if unified.metrics["method"] == "ties":
        errors = unified.metrics["relative_errors"]
        assert errors, "a compressed adapter tells how near it is"
        assert all(0 <= error < 1 for error in errors.values())
    results = read_json(store, finished(store), "results.json")
    assert results["merge"]["method"].startswith(unified.metrics["method"])


def test_searches_race_prune_and_decide_on_rows_that_they_never_saw(store: Store) -> None:
    searches = {one.name.removeprefix("search "): read_json(store, one, "search.json") for one in store.list("search")}
    assert set(searches) == {"SC", "ABSA", "MAST", "unified", "task arithmetic", "tsv"}
    unified = searches["unified"]
    for name, found in searches.items():
        fixed = found["spec"]["fixed"]
        assert fixed == (name in ("task arithmetic", "tsv"))
        assert all(one["stopped"] is False for one in found["candidates"] if fixed)
        assert (found["joint"] is not None) == (name == "unified")
        assert all((one["selection"] is None) == fixed for one in found["finalists"])
        assert sum(one["wins"] for one in found["finalists"]) == 1
    joint = unified["joint"]
    assert len(joint["candidates"]) <= JOINT
    assert joint["genes"][:2] == ["parts/0", "parts/1"], "coefficients of experts, not of groups"
    assert all(gene in (0.0, 1.0) for one in joint["candidates"] for gene in one["genome"][6:12])
    scores = [one["selection"] for one in unified["finalists"]]
    assert next(one["selection"] for one in unified["finalists"] if one["wins"]) == max(scores)
    assert {"task arithmetic", "tsv"} <= {one["search"] for one in unified["finalists"]}
    entries = [one for found in (unified, joint) for one in found["candidates"]]
    assert all(one["rows"] == 24 for one in entries if not one["stopped"]), "eight rows of three subtasks"
    assert all(one["rows"] in (9, 15) for one in entries if one["stopped"])
    assert any(one["stopped"] for one in entries)
    assert any(one["parents"] for one in entries)
    weak, kept = (
        from_table(store.read(manifest(store, "split", f"tickets {part}"), "rows.parquet"))
        for part in ("weak", "selection")
    )
    assert len(kept) == 3
    assert not {row.text for row in weak} & {row.text for row in kept}


def test_a_run_can_be_looked_at_and_gone_on_with_by_its_id(place: Desk, store: Store) -> None:
    run_id = finished(store).key[:8]
    ended = place.run("search", "show", run_id, "--top", "2", *at_bucket(place))
    assert ended.code == 0, ended
    assert "unified joint" in ended.out
    assert "unified final" in ended.out
    told = json.loads(place.run("search", "show", run_id, "--json", *at_bucket(place)).out)
    assert {one["search"]: one["of"] for one in told}["unified joint"] == JOINT
    again = place.run("search", "resume", run_id, *at_bucket(place))
    assert again.code == 0, again
    assert f"run {run_id} is finished" in again.out
    wrong = place.run("search", "show", "ffff", *at_bucket(place))
    assert wrong.code != 0
    assert "no run 'ffff' was started" in wrong.err


def test_own_subtasks_stand_in_table_report_and_answers(place: Desk, store: Store) -> None:
    done = finished(store)
    assert "tickets" in (place.root / "out.txt").read_text()
    page = store.read(done, "report.html").decode()
    assert "Urgency of a ticket" in page
    assert "Say how urgent the ticket is" in page
    ended = place.run("predict", "The lift is on fire.", "--target", "room 3", *at_bucket(place))
    assert ended.code == 0, ended
    (line,) = [line for line in ended.out.splitlines() if line.strip().startswith("Urgency of a ticket")]
    assert "room 3" in line
    assert any(label in line for label in LABELS.values())
    assert any(line.strip().startswith("parts") for line in ended.out.splitlines())


def test_another_instruction_is_another_expert(place: Desk, tiny_base: Path) -> None:
    """What was trained for the old question is no answer to the new one."""
    config = own_config(tiny_base, place.root)
    config["data"]["custom"][0]["instruction"] = "How soon must someone come? Say urgent, can wait or spam."
    from memmcl.config import parse_config
    from memmcl.suite.configured import read_splits

    before, after = (read_splits(parse_config(one)) for one in (own_config(tiny_base, place.root), config))
    assert before.digest("tickets", "train") != after.digest("tickets", "train")
    assert before.digest("sent2", "train") == after.digest("sent2", "train")


# ------------------------------------------------------------------------------------------ in a bucket


def test_nothing_of_the_store_lies_in_a_local_directory(place: Desk, store: Store) -> None:
    assert [path.name for path in place.cwd.iterdir()] == ["base"]
    assert list(store.verify().problems) == []
    contents = {path.rpartition("/")[2] for path in store.objects.sizes("blobs")}
    assert len(contents) > 10
    local = [path for top in (place.root, place.ray_folder) for path in top.rglob("*") if path.is_file()]
    assert local, "caches and Ray's logs, at least"
    for path in local:
        assert hashlib.sha256(path.read_bytes()).hexdigest() not in contents, f"{path} is a copy of a blob"
    folders = {path.name for path in place.root.rglob("*") if path.is_dir()}
    assert folders.isdisjoint({"blobs", "manifests", "pointers", "memmcl-store", "memmcl-runs"})


def test_a_run_in_a_bucket_is_shown_and_copied(place: Desk, store: Store, tmp_path: Path) -> None:
    done = finished(store)
    assert f"memmcl report {done.key[:8]}" in (place.root / "out.txt").read_text()
    ended = place.run("report", done.key[:8], *at_bucket(place), "--out", tmp_path / "copy")
    assert ended.code == 0, ended
    assert (tmp_path / "copy" / "report.html").read_bytes() == store.read(done, "report.html")


def test_a_wrong_secret_is_one_line(
    tmp_path: Path, tiny_base: Path, s3: S3Server, prefect_api: str, place: Desk, store: Store
) -> None:
    wrong = "wrong" + s3.secret_key[5:]
    environment = {**s3.environment, "AWS_SECRET_ACCESS_KEY": wrong}
    before = store.objects.sizes("")
    with desk(tmp_path, tiny_base, server=prefect_api, environment=environment) as other:
        (other.cwd / "base").symlink_to(tiny_base)
        ended = other.run("run", place.config)
        assert [path.name for path in other.cwd.iterdir()] == ["base"]
    assert ended.code == 1, ended
    assert "AWS_SECRET_ACCESS_KEY" in one_line(ended)
    for secret in (wrong, s3.secret_key, s3.access_key):
        assert secret not in ended.out + ended.err
    assert store.objects.sizes("") == before


def test_no_credential_is_in_anything_the_run_wrote(
    place: Desk, store: Store, s3: S3Server, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Nor in the terminal: what commands printed lies below the desk too."""
    assert list((place.root / "output").rglob("err"))
    for path in store.objects.sizes(""):
        assert s3.secret_key.encode() not in (store.objects.read(path) or b""), path
    histories = tmp_path_factory.getbasetemp().glob("prefect-server[0-9]*")
    assert traces([s3.secret_key], place.root, place.ray_folder, *histories) == []


# ------------------------------------------------------------------------------------- weak rows without labels


@pytest.mark.campaign
def test_weak_rows_need_no_labels(tmp_path: Path, tiny_base: Path, prefect_api: str) -> None:
    """Weak texts without a label column: the experts label them, and the whole run goes through."""
    with desk(tmp_path, tiny_base, server=prefect_api) as found:
        write_tickets(found.root / "tickets.csv")
        with (found.root / "tickets.csv").open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file, delimiter=";"))
        (found.root / "plain.jsonl").write_text(
            "".join(
                json.dumps({"subject": f"{row['subject']} Again.", "room": row["room"]}) + "\n" for row in rows[:30]
            )
        )
        for name, chosen in (("train", rows[:40]), ("test", rows[40:])):
            (found.root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chosen))
        config = own_config(tiny_base, found.root)
        tickets = config["data"]["custom"][0]
        parts = {"train": "train.jsonl", "weak": "plain.jsonl", "test": "test.jsonl"}
        del tickets["data"]["path"]
        tickets["data"] |= {part: str(found.root / name) for part, name in parts.items()}
        config["data"] |= {
            "subtasks": ["sent2", "tickets"],
            "custom": [tickets],
            "weak_source": "pseudo",
            "weak_rows": 6,
            "pseudo_pool": 3,
        }
        config["evaluation"]["joint_lora"] = False
        found.config.write_text(yaml.safe_dump(config))
        ended = found.run("run", found.config)
        assert ended.code == 0, ended
        store = found.store
        texts = from_table(store.read(manifest(store, "split", "tickets weak"), "rows.parquet"))
        assert {row.gold for row in texts} == {""}, "nobody saw a label"
        labelled = from_table(store.read(manifest(store, "weak", "weak tickets"), "rows.parquet"))
        assert manifest(store, "weak", "weak tickets").ref in manifest(store, "expert", "weak LoRA").inputs
        assert len(labelled) == 6
        assert {row.text for row in labelled} <= {row.text for row in texts}
        assert {str(row.gold) for row in labelled} <= set(LABELS.values())
        gate = manifest(store, "gate", "context gate tickets")
        assert manifest(store, "weak", "weak tickets").ref in gate.inputs
        notes = " ".join(read_json(store, finished(store), "results.json")["notes"])
        assert "no labels" in notes
