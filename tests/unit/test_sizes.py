"""The product stays readable: small files, short functions, few parameters, formatted by the formatter alone."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted(path for package in ("memmcl", "tasks", "flows") for path in (ROOT / package).rglob("*.py"))
LINES, BODY, PARAMETERS = 350, 60, 8


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[ast.arg]:
    every = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
    return every[1:] if every and every[0].arg in ("self", "cls") else every


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_functions_and_signatures_are_small(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") <= LINES
    assert "# fmt:" not in text
    long = [one.name for one in functions(path) if (one.end_lineno or 0) - one.lineno + 1 > BODY]
    wide = [one.name for one in functions(path) if len(parameters(one)) > PARAMETERS]
    if "cli" in path.parts:  # Typer reads a command's options off its signature
        wide = [name for name in wide if name.startswith("_")]
    assert (long, wide) == ([], [])


def test_a_long_function_and_a_wide_one_are_seen(tmp_path: Path) -> None:
    path = tmp_path / "planted.py"
    path.write_text("def long():\n" + "    pass\n" * 60 + f"def wide({', '.join('abcdefghi')}):\n    pass\n")
    long, wide = functions(path)
    assert (long.end_lineno or 0) - long.lineno + 1 > BODY
    assert len(parameters(wide)) > PARAMETERS
