"""What is loaded when: importing memmcl is light, and so is every command until it has work to do."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = ("torch", "prefect", "ray", "transformers", "peft", "datasets", "matplotlib", "pyarrow", "s3fs", "boto3")
LIGHT = ("memmcl", "memmcl.config", "memmcl.errors", "memmcl.seeds", "memmcl.store", "memmcl.suite")
SERVERS = ("torch", "prefect", "ray", "transformers", "peft", "matplotlib")


def loaded(code: str, cwd: Path) -> set[str]:
    """Return the top-level modules that are loaded after `code` ran in a fresh interpreter."""
    probe = f"import json, sys\n{code}\njson.dump(sorted({{n.partition('.')[0] for n in sys.modules}}), sys.stderr)"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True, cwd=cwd)
    return set(json.loads(done.stderr.splitlines()[-1]))


def command(*arguments: str) -> str:
    return (
        f"sys.argv = ['memmcl', *{list(arguments)!r}]\nfrom flows.cli import main\n"
        "try: main()\nexcept SystemExit as ended: pass\n"
    )


@pytest.mark.parametrize("module", LIGHT)
def test_importing_memmcl_is_light(module: str, tmp_path: Path) -> None:
    found = loaded(f"import {module}", tmp_path)
    assert "memmcl" in found
    assert found.isdisjoint(HEAVY)


@pytest.mark.parametrize("module", ["memmcl.evolve", "memmcl.curriculum", "memmcl.report", "memmcl.backbone.load"])
def test_what_the_command_line_imports_is_light_enough(module: str, tmp_path: Path) -> None:
    assert loaded(f"import {module}", tmp_path).isdisjoint(SERVERS)


def test_who_starts_a_run_loads_no_models(tmp_path: Path) -> None:
    """Workers do; transformers' models take seconds."""
    assert loaded("import flows.pipeline", tmp_path).isdisjoint(("transformers", "peft"))


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["version"], ["run", "--help"], ["store", "ls"], ["search", "show", "f"], ["report"], ["merge"]],
)
def test_light_commands(arguments: list[str], tmp_path: Path) -> None:
    found = loaded(command(*arguments), tmp_path)
    assert {"memmcl", "flows", "typer"} <= found
    assert found.isdisjoint(HEAVY)


@pytest.mark.parametrize(
    "wrong", ["experts.steps=0", "data.source=/no/such/data", "model.name_or_path=pypi:no-such-llm", "store.url=file"]
)
def test_mistakes_show_before_anything_heavy_is_loaded(wrong: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "run.yaml").write_text("data: {subtasks: [sent2]}")
    assert loaded(command("run", "run.yaml", "--set", wrong), tmp_path).isdisjoint(SERVERS)


def test_the_probe_sees_what_is_loaded(tmp_path: Path) -> None:
    assert "pyarrow" in loaded("import memmcl.store, pyarrow", tmp_path)


@pytest.mark.parametrize("first", ["", "import prefect_ray"])
def test_ray_is_loaded_once(first: str) -> None:
    """A second `ray.exceptions` would make the error of a dead actor one that Ray Tune does not know."""
    code = (
        f"{first}\nimport tasks.run.ray_tasks\nfrom ray.exceptions import RayActorError\n"
        "from ray._private.serialization import ActorDiedError\nassert issubclass(ActorDiedError, RayActorError)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
