"""What all tests share: the marker of a test is its folder, and the session-scoped servers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from servers import S3Server, prefect_api_server, s3_server
from xdist.scheduler import LoadFileScheduling

if TYPE_CHECKING:
    from e2e_driver import Desk

FOLDERS = ("unit", "property", "golden", "integration", "e2e")
TESTS = Path(__file__).parent
READ_REFERENCE = ("tests/e2e/test_kills.py", "tests/e2e/test_damage.py", "tests/e2e/test_pipeline.py")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let `make campaign` write what came of it into the documentation."""
    parser.addoption("--reliability-page", type=Path, help="the page that campaigns write their outcomes to")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give each test the marker that its folder is named after."""
    for item in items:
        folder = item.path.relative_to(TESTS).parts[0] if item.path.is_relative_to(TESTS) else ""
        if folder in FOLDERS:
            item.add_marker(folder)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadFileScheduling | None:
    """Give the files that read the run of `reference` to one process: it takes minutes, and each makes its own."""
    return _Scheduling(config, log) if config.getvalue("dist") == "loadfile" else None


class _Scheduling(LoadFileScheduling):
    def _split_scope(self, nodeid: str) -> str:
        file: str = super()._split_scope(nodeid)
        return READ_REFERENCE[0] if file in READ_REFERENCE else file


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

    return make_tiny_base(tmp_path_factory.mktemp("tiny") / "base")


@pytest.fixture(scope="session")
def plain_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same tiny base model without a chat template; to read, not to change."""
    from tiny import make_tiny_base

    return make_tiny_base(tmp_path_factory.mktemp("tiny") / "plain", chat_template=False)


@pytest.fixture(scope="session")
def prefect_api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The API URL of a real Prefect server for the session, with a history of its own."""
    with prefect_api_server(tmp_path_factory.mktemp("prefect-server")) as url:
        yield url


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Iterator[Desk]:
    """A desk at which `memmcl run` went through once, uninterrupted, among secrets; to read, not to change."""
    from e2e_driver import OVERRIDDEN, SECRETS, desk

    root = tmp_path_factory.mktemp("reference")
    (root / "tmp").mkdir()
    with desk(root, tiny_base, environment={**SECRETS, "TMPDIR": str(root / "tmp")}) as place:
        ended = place.watch("run", place.config, *OVERRIDDEN)
        assert ended.code == 0, ended
        (place.root / "out.txt").write_text(ended.out)
        (place.root / "err.txt").write_text(ended.err)
        yield place
