"""A seeded slice of the campaign of faults, one of each kind on a disk and on a real S3 server; and its instruments."""

from __future__ import annotations

import gc
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from disk_faults import DISK_FAULTS
from fault_proxy import FAULTS, Fault, FaultProxy, fault_proxy, without_newest
from injections import (
    LASTING,
    MASKED,
    REPEATED,
    DiskPlace,
    Injection,
    Outcome,
    S3Place,
    campaign,
    scratch,
    short_pauses,
)
from reliability_page import PAGE, PARTS, general, read_parts, table, write_part
from seaweed import REGION
from store_workload import STEPS, Work

from memmcl.errors import StoreError
from memmcl.store import Store
from memmcl.store.objects import Objects

SEED = 25


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    """Warnings of what is damaged are not what these tests are about."""
    caplog.set_level(logging.ERROR)


@pytest.fixture
def proxy(s3: Any) -> Iterator[FaultProxy]:
    with fault_proxy(s3.endpoint_url) as running:
        yield running


def wrong(outcomes: list[Outcome]) -> list[str]:
    return [f"{one.injection}: {one.what}" for one in outcomes if not one.good]


def test_one_fault_of_each_kind_on_a_disk() -> None:
    outcomes = campaign(DiskPlace("disk", SEED), len(DISK_FAULTS))
    assert {one.injection.kind for one in outcomes} == DISK_FAULTS.keys()
    assert wrong(outcomes) == []


def test_one_fault_of_each_kind_between_client_and_s3_server(s3: Any, proxy: FaultProxy) -> None:
    outcomes = campaign(S3Place("s3", SEED, server=s3, proxy=proxy), len(FAULTS))
    assert {one.injection.kind for one in outcomes} == FAULTS.keys()
    assert wrong(outcomes) == []


@pytest.mark.parametrize(("times", "what"), [(1, MASKED), (LASTING, REPEATED)])
def test_a_content_that_arrives_damaged_is_asked_for_again(s3: Any, proxy: FaultProxy, times: int, what: str) -> None:
    place = S3Place("s3", SEED, server=s3, proxy=proxy)
    with short_pauses():
        place.learn()
        outcome = place.inject(Injection("s3", "flipped bit", place.calls["flipped bit"] // 2, times))
    assert outcome.what == what
    assert all("arrive damaged: their checksums do not match" in line for line in outcome.lines)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", ["reset within the answer", "answer truncated", "flipped bit"])
def test_broken_answers_keep_no_connection(s3: Any, proxy: FaultProxy, kind: str) -> None:
    """Whoever reads twenty of them still gets through to the server, whenever memory is collected."""
    store = Store.open(f"s3://{s3.bucket}/broken", endpoint_url=proxy.endpoint_url, region=REGION)
    store.objects.write("pointers/a.json", b"content" * 1000)
    gc.disable()
    try:
        with short_pauses():
            for _ in range(4):
                proxy.arm(Fault(kind, times=5))
                with pytest.raises(StoreError):
                    store.objects.read("pointers/a.json")
        proxy.arm(None)
        assert store.objects.read("pointers/a.json") == b"content" * 1000
    finally:
        gc.enable()


def test_a_plan_is_drawn_from_its_seed_and_reaches_all_of_the_work() -> None:
    calls = {"ENOSPC": 100, "fsync fails": 10}
    plan = DiskPlace("disk", 1, calls=calls).plan(40)
    assert plan == DiskPlace("disk", 1, calls=calls).plan(40) != DiskPlace("disk", 2, calls=calls).plan(40)
    firsts = [one.first for one in plan if one.kind == "ENOSPC"]
    assert len(firsts) == 20
    assert firsts == sorted(firsts)
    assert firsts[0] < 10 < 90 < firsts[-1] < 100
    assert all(one.first < 10 for one in plan if one.kind == "fsync fails")


@pytest.mark.parametrize("fault", ["forgets", "accepts anything"])
def test_the_campaign_notices_a_store_that_does_not_keep_its_word(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    place = DiskPlace("disk", SEED)
    place.learn()
    calm = Injection("disk", "fsync fails", first=10**6, times=1)
    assert place.inject(calm).good
    if fault == "forgets":  # says that a manifest is stored, and stores none
        monkeypatch.setattr(Objects, "write_once", lambda self, path, data, accept: data)
    else:  # reads without looking at digests, of blobs that it damages
        read = Objects.read
        monkeypatch.setattr(Objects, "read", lambda self, path: (read(self, path) or b"x")[:-1] + b"?")
    assert not place.inject(calm).good


def test_steps_can_be_repeated() -> None:
    """What was done in an earlier attempt is found, and the results are the same."""
    with scratch() as folder:
        work = Work(Store.open(str(folder / "store")), SEED, folder)
        first = {name: step(work) for name, step in STEPS.items()}
        assert {name: step(work) for name, step in STEPS.items()} == first


def test_a_listing_without_its_newest_object() -> None:
    old = b"<Contents><Key>a</Key><LastModified>2026-01-01T00:00:02Z</LastModified></Contents>"
    new = b"<Contents><Key>b</Key><LastModified>2026-01-01T00:00:03Z</LastModified></Contents>"
    assert without_newest(b"<r>" + new + old + b"</r>") == b"<r>" + old + b"</r>"
    assert without_newest(b"<r></r>") == b"<r></r>"


def test_a_part_of_the_page_is_replaced_and_the_others_stay(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    write_part(page, "disk", "## Disk\n\n" + table(["a", "b"], [["1", "x | y\nz"]]))
    write_part(page, "s3", "## S3")
    write_part(page, "s3", "## S3, again")
    assert read_parts(page.read_text()) == {
        "s3": "## S3, again",
        "disk": "## Disk\n\n| a | b |\n|---|---|\n| 1 | x \\| y z |",
    }


def test_the_page_in_the_documentation_shows_nothing_wrong() -> None:
    parts = read_parts(PAGE.read_text())
    assert parts.keys() == {*PARTS}
    assert parts["kills"].count(" killed |") >= 20
    assert "WRONG" not in PAGE.read_text()
    assert "* Injection" not in PAGE.read_text()
    assert sum(int(re.findall(r"(\d+) injections in", parts[part])[0]) for part in ("s3", "disk")) >= 200


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ("cannot reach s3://memmcl/0f3a at http://127.0.0.1:4000; check it", "cannot reach STORE; check it"),
        ("no permission for /tmp/mmx1/store/tmp/a.part; change", "no permission for STORE/FILE; change"),
        ("Ray's raylet died (/var/folders/x/ray/logs); pid 17", "Ray's raylet died (PATH); pid N"),
        (
            "no server answers at http://127.0.0.1:81/api; 3/4 of it",
            "no server answers at http://127.0.0.1:PORT/api; 3/4 of it",
        ),
    ],
)
def test_lines_are_shown_without_what_differs_between_machines(line: str, shown: str) -> None:
    assert general(line) == shown
