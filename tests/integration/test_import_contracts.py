"""import-linter keeps the layers: it passes, and it catches what is planted."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CLIENTS = "memmcl knows no orchestrator and no object store client"
INSIDE = "inside memmcl, left may import right, never back"
CIRCLES = "no circle between siblings, at any depth"
TASKS = "inside tasks, left may import right, never back"
LAZY = "prefect-ray is imported by tasks.run.ray_tasks alone, after Ray"
LAYERS = "flows use tasks, tasks use memmcl, never back"
LINT = Path(sys.executable).with_name("lint-imports")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the code and its contracts; to plant in."""
    for name in ("memmcl", "tasks", "flows"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def lint(tree: Path) -> tuple[int, str]:
    done = subprocess.run(
        [LINT, "--no-cache"], capture_output=True, text=True, cwd=tree, env={**os.environ, "COLUMNS": "200"}
    )
    return done.returncode, done.stdout + done.stderr


def plant(path: Path, line: str) -> None:
    path.write_text(f"{path.read_text()}\n\n{line}\n")


def test_the_contracts_are_kept(tree: Path) -> None:
    code, output = lint(tree)
    assert code == 0, output
    assert "Contracts: 6 kept, 0 broken." in output


@pytest.mark.parametrize(
    ("module", "line", "contract", "named"),
    [
        ("memmcl/evolve/strategy.py", "import prefect", CLIENTS, "memmcl.evolve.strategy -> prefect"),
        ("memmcl/store/objects.py", "import s3fs", CLIENTS, "memmcl.store.objects -> s3fs"),
        ("memmcl/seeds.py", "def late():\n    import ray", CLIENTS, "memmcl.seeds -> ray"),
        ("memmcl/config/run.py", "import memmcl.report", INSIDE, "memmcl.config.run -> memmcl.report"),
        ("tasks/stages/data.py", "import flows.cli", LAYERS, "tasks.stages.data -> flows.cli"),
        ("tasks/ui/history.py", "import tasks.run.runtime", TASKS, "tasks.ui.history -> tasks.run.runtime"),
        ("tasks/run/memory.py", "import tasks.search.queue", TASKS, "tasks.run.memory -> tasks.search.queue"),
        ("memmcl/suite/rows.py", "def late():\n    import memmcl.suite.sources", CIRCLES, "memmcl.suite"),
        ("flows/retrain.py", "import prefect_ray", LAZY, "flows.retrain -> prefect_ray"),
    ],
)
def test_a_planted_import_is_caught(tree: Path, module: str, line: str, contract: str, named: str) -> None:
    plant(tree / module, line)
    code, output = lint(tree)
    assert code == 1, output
    assert any(contract in row and "BROKEN" in row for row in output.splitlines())
    assert named in output
