"""Work folders: nobody's but the owner's while it lives, gone once it is dead, however it died."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from memmcl.errors import ServiceError
from tasks.run import local_ray
from tasks.run.leftovers import home, keep_error, tidy, work_folder

OWNER = """
import subprocess, sys
from pathlib import Path
from tasks.run.leftovers import MARK, work_folder
with work_folder(sys.argv[1], Path(sys.argv[2])) as folder:
    (folder / "part").write_text("of a model")
    left = subprocess.Popen(["sleep", "600"], env={MARK: str(folder)}, start_new_session=True)
    print(folder, left.pid, flush=True)
    sys.stdin.read()
"""


@contextmanager
def owner(base: Path, kind: str = "ray") -> Iterator[tuple[subprocess.Popen[str], Path, int]]:
    """Start a process that owns a folder; yield it, the folder, and a process that carries the folder's mark."""
    command = [sys.executable, "-c", OWNER, kind, str(base)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        folder, left = process.stdout.readline().split()
        try:
            yield process, Path(folder), int(left)
        finally:
            process.kill()
            if alive(int(left)):
                os.kill(int(left), signal.SIGKILL)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_what_a_killed_process_left_is_removed_by_the_next_and_what_a_live_one_has_is_not(tmp_path: Path) -> None:
    with ExitStack() as stack:
        dead, its_folder, its_child = stack.enter_context(owner(tmp_path))
        _, others_folder, others_child = stack.enter_context(owner(tmp_path, "tune"))
        dead.kill()
        dead.wait()
        assert its_folder.is_dir()
        assert alive(its_child)
        with work_folder("export", tmp_path) as mine:
            assert not its_folder.exists()
            assert not alive(its_child)
            assert (others_folder / "part").read_text() == "of a model"
            assert alive(others_child)
            tidy(mine.parent)
            assert mine.is_dir(), "its own is held, too"
        assert not mine.exists()


def test_what_is_not_a_work_folder_of_ours_is_left_alone(tmp_path: Path) -> None:
    ours, elsewhere = tmp_path / "ours", tmp_path / "elsewhere"
    ours.mkdir()
    elsewhere.mkdir()
    names = ("ray", "ray-short", "ray-12345678-more", "ray-no_owner", "session_2026", "notes-abcdefgh", ".new-justmade")
    for name in names:
        (ours / name).mkdir()
    (ours / "ray-12345678").mkdir()
    (ours / "ray-12345678" / "owner").symlink_to(elsewhere / "file")
    (elsewhere / "file").touch()
    tidy(ours)
    assert {path.name for path in ours.iterdir()} == {*names, "ray-12345678"}
    assert (elsewhere / "file").exists()
    os.utime(ours / ".new-justmade", (0, 0))
    tidy(ours)
    assert not (ours / ".new-justmade").exists(), "its maker died before it was held"


def test_logs_can_be_read_after_an_error_until_the_next_start(tmp_path: Path) -> None:
    def fail(keep: bool) -> None:
        with work_folder("ray", tmp_path / "ray", keep=keep) as folder:
            (folder / "log").touch()
            raise ZeroDivisionError

    for keep in (True, False):
        with pytest.raises(ZeroDivisionError):
            fail(keep)
        assert len(list((tmp_path / "ray").glob("ray-*/log"))) == keep
        tidy(tmp_path / "ray")
        assert not list((tmp_path / "ray").iterdir())
    with work_folder("ray", tmp_path, keep=True) as folder:
        pass
    assert not folder.exists(), "nothing went wrong"


def test_the_folder_is_this_users_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    ours = home()
    ours.chmod(0o755)
    assert home() == ours
    assert ours.stat().st_mode & 0o777 == 0o700
    with work_folder("tune") as folder:
        assert folder.parent == ours
        assert folder.stat().st_mode & 0o777 == 0o700
    ours.rmdir()
    ours.symlink_to(tmp_path)
    with pytest.raises(ServiceError, match="is not a folder of this user's; name another place as TMPDIR"):
        home()
    monkeypatch.setattr(tempfile, "tempdir", "/proc")
    with pytest.raises(ServiceError, match=r"cannot make the folder .*; name a place that can be written as TMPDIR"):
        home()


def test_tracebacks_are_kept_for_a_while(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    old, new = keep_error("old"), keep_error("new")
    assert old.stat().st_mode & 0o777 == 0o600
    os.utime(old, (0, 0))
    with work_folder("tune"):
        assert not old.exists()
        assert new.read_text() == "new"


def test_ray_s_folder_is_short_enough_for_its_sockets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", "/tmp")
    assert local_ray._place() == home()
    long = tmp_path / "var-folders-zz-zyxvpxvq6csfxvn_n0000000000000-T"
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    assert local_ray._place() == Path("/tmp")
    monkeypatch.setenv("RAY_TMPDIR", "/tmp/mm12345678")
    assert local_ray._place() == Path("/tmp/mm12345678")
    monkeypatch.setenv("RAY_TMPDIR", "/a/path/that/is/too/long/for/sockets")
    with pytest.raises(ServiceError, match=r"RAY_TMPDIR is too long .*: expected at most \d+ characters, got /a/path"):
        local_ray._place()
