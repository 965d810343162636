"""Hundreds of faults in the work on a store: what came of each goes into `docs/reliability.md`."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from disk_faults import DISK_FAULTS
from fault_proxy import FAULTS, fault_proxy
from injections import DiskPlace, Outcome, S3Place, campaign
from reliability_page import injections_part, write_part
from store_workload import IN_PARTS

pytestmark = [pytest.mark.campaign, pytest.mark.timeout(3500)]
SEED = 7
EACH = 10
"""Injections of each kind; of those that strike S3, three more where a file is sent in parts."""
WORK = """Each injection has a store of its own, on which what a run, a search and a retrain do is done in small:
publish artifacts with several files, save checkpoints, tell and read candidates, hold a lease, promote and roll back a
champion, swap a pointer, list and verify (`tests/helpers/store_workload.py`). The fault strikes one request or
call, or, in one case of three, so many that trying again does not help. What must hold: an error is one line of our
own; the same step succeeds when it is done again; all results are those of an undisturbed store; nothing that was
acknowledged is lost; `verify` finds no problem."""
NAMES = """A listing of names has no digest: what it leaves out counts as not there, and is made or told again, to the
same result. Over a network that others can write to, use https."""


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    """Warnings are not what is counted here."""
    caplog.set_level(logging.CRITICAL)


def wrong(outcomes: list[Outcome]) -> list[str]:
    return [f"{one.injection}: {one.what}" for one in outcomes if not one.good]


def test_faults_between_client_and_s3_server(s3: Any, page: Path) -> None:
    with fault_proxy(s3.endpoint_url) as proxy:
        outcomes = campaign(S3Place("s3", SEED, server=s3, proxy=proxy), EACH * len(FAULTS))
        parts = S3Place("s3, in parts", SEED, server=s3, proxy=proxy, large=IN_PARTS)
        outcomes += campaign(parts, 3 * len(FAULTS))
    words = f"A proxy stands between memmcl and a real S3 server (SeaweedFS). {WORK}\n\n{NAMES}"
    kinds = {name: kind.what for name, kind in FAULTS.items()}
    write_part(page, "s3", injections_part("Faults between client and S3 server", words, kinds, outcomes, SEED))
    assert len(outcomes) >= 13 * len(FAULTS)
    assert wrong(outcomes) == []


def test_faults_on_a_disk(page: Path) -> None:
    outcomes = campaign(DiskPlace("disk", SEED), EACH * len(DISK_FAULTS))
    words = "System calls of a store in a directory fail, or the process is killed in between; the work is the same."
    kinds = {name: kind.what for name, kind in DISK_FAULTS.items()}
    write_part(page, "disk", injections_part("Faults on a disk", words, kinds, outcomes, SEED))
    assert len(outcomes) >= EACH * len(DISK_FAULTS)
    assert wrong(outcomes) == []
