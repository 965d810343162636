"""The benchmarks, which no test runs: whatever they import exists, in functions and child processes too."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BENCHMARKS = sorted((ROOT / "benchmarks").glob("*.py"))
PACKAGES = ("memmcl", "tasks", "flows")


def imported(code: str) -> Iterator[tuple[str, str]]:
    """Yield (module, name) of what code imports from this project, that in functions and in strings of code as well."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in PACKAGES:
            yield from ((str(node.module), alias.name) for alias in node.names)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and "\nfrom " in node.value:
            with suppress(SyntaxError):  # it is prose
                yield from imported(node.value)


@pytest.mark.parametrize("path", BENCHMARKS, ids=lambda path: path.stem)
def test_what_a_benchmark_imports_exists(path: Path) -> None:
    for module, name in imported(path.read_text()):
        found = importlib.import_module(module)
        assert hasattr(found, name) or importlib.util.find_spec(f"{module}.{name}"), f"{module} has no {name}"


def test_every_benchmark_is_imported() -> None:
    """As its own process does it, where a benchmark sees the others beside it."""
    names = ", ".join(path.stem for path in BENCHMARKS)
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, 'benchmarks'); import {names}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
