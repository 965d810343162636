"""What all tests share: the marker of a test is its folder, and the session-scoped servers."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from servers import S3Server, prefect_api_server, s3_server

if TYPE_CHECKING:
    from e2e_driver import Desk

FOLDERS = ("unit", "property", "golden", "integration", "e2e")
TESTS = Path(__file__).parent


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let `make campaign` write what came of it into the documentation."""
    parser.addoption("--reliability-page", type=Path, help="the page that campaigns write their outcomes to")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give each test the marker that its folder is named after."""
    for item in items:
        folder = item.path.relative_to(TESTS).parts[0] if item.path.is_relative_to(TESTS) else ""
        if folder in FOLDERS:
            item.add_marker(folder)


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """Return a folder that the first of all xdist workers to get here fills, while the others wait."""
    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "whole").exists():
            shutil.rmtree(folder, ignore_errors=True)  # of one that failed
            folder.mkdir()
            make(folder)
            (folder / "whole").touch()
    return folder


@pytest.fixture(scope="session")
def s3() -> Iterator[S3Server]:
    """A real S3 server for the session; its credentials are in the environment while it runs."""
    with s3_server() as server, pytest.MonkeyPatch.context() as patch:
        for variable in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL"):
            patch.delenv(variable, raising=False)
        for variable, value in server.environment.items():
            patch.setenv(variable, value)
        yield server


@pytest.fixture
def page(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The page that a campaign writes its outcomes to: that of the option, else one that nobody keeps."""
    chosen: Path | None = request.config.getoption("--reliability-page")
    return chosen or tmp_path / "reliability.md"


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a tiny base model with a chat template; to read, not to change."""
    from tiny import make_tiny_base

    return made_once(tmp_path_factory, "tiny", lambda folder: make_tiny_base(folder / "base")) / "base"


@pytest.fixture(scope="session")
def plain_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same tiny base model without a chat template; to read, not to change."""
    from tiny import make_tiny_base

    make = partial(make_tiny_base, chat_template=False)
    return made_once(tmp_path_factory, "plain", lambda folder: make(folder / "base")) / "base"


@pytest.fixture(scope="session")
def prefect_api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The API URL of a real Prefect server for the session, with a history of its own."""
    with prefect_api_server(tmp_path_factory.mktemp("prefect-server")) as url:
        yield url


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Desk:
    """A desk at which `memmcl run` went through once, uninterrupted, among secrets; to read, not to change."""
    from e2e_driver import open_reference, run_reference

    return open_reference(made_once(tmp_path_factory, "reference", lambda folder: run_reference(folder, tiny_base)))
