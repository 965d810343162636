"""What the documentation names must exist: links, commands, settings and their defaults, paths, decisions."""

from __future__ import annotations

import ast
import pkgutil
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import yaml

import memmcl
from memmcl.config import RunConfig, parse_config
from memmcl.curriculum.difficulty import DEFAULT_WEIGHTS
from memmcl.evolve import STRATEGIES
from memmcl.merge import METHODS
from memmcl.merge.table import check_parameters

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
SETTINGS_OF_METHOD = ("data", "model", "experts", "search", "curriculum", "evaluation")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
CODE = re.compile(r"```(?!mermaid).*?```|`[^`\n]+`|^ {4}[^\n]*$", re.DOTALL | re.MULTILINE)
SPAN = re.compile(r"`([^`\n]+)`")
OURS = re.compile(r"(?:memmcl|tasks|flows|tests|docs|deployments|examples)/[\w./-]*")


def slug(heading: str) -> str:
    """Return the anchor that a Markdown heading gets: lower case, no punctuation, hyphens for spaces."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def anchors(page: Path) -> set[str]:
    return {slug(line.lstrip("#")) for line in page.read_text().splitlines() if line.startswith("#")}


def broken_links(page: Path) -> list[str]:
    broken = []
    for target in LINK.findall(page.read_text()):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        if not found.exists() or (anchor and anchor not in anchors(found)):
            broken.append(target)
    return broken


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def commands(text: str) -> set[str]:
    """Return what `make` is asked for in code: `make a && make b X=1` names a and b."""
    code = "\n".join(CODE.findall(text))
    return set(re.findall(r"\bmake ([a-z][\w-]*)", code))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_resolve(page: Path) -> None:
    assert broken_links(page) == []


def test_a_broken_link_or_anchor_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# One title\n[a](gone.md) [b](#one-title) [c](#two) [d](page.md#nothing) [e](https://x.org/#y)\n")
    assert broken_links(page) == ["gone.md", "#two", "page.md#nothing"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_make_commands_exist(page: Path) -> None:
    assert commands(page.read_text()) <= make_targets()


def test_commands_are_read_from_code_only() -> None:
    text = "we make nothing\n\n    make clean && make install X=1\n\n`make lint`\n```\n$ make docs\n```\n"
    assert commands(text) == {"clean", "install", "lint", "docs"}


def test_the_readme_names_commands() -> None:
    assert "quickstart" in commands((ROOT / "README.md").read_text())


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "log.md"], ids=lambda page: page.name)
def test_paths_exist(page: Path) -> None:
    """The log is history: it names paths as they were."""
    named = {span for span in SPAN.findall(page.read_text()) if OURS.fullmatch(span)}
    assert [path for path in sorted(named) if not (ROOT / path).exists()] == []


def settings(page: Path) -> dict[str, Any]:
    """Return the rows `| key | default | ...` of a page's settings tables, defaults read as YAML."""
    rows = re.findall(r"^\| `([a-z]\w*\.\w+)` \| `([^`]*)` \|", page.read_text(), re.MULTILINE)
    assert len(rows) == len({key for key, _ in rows}), "a setting is listed twice"
    return {key: yaml.safe_load(value) for key, value in rows}


def test_settings_and_defaults_of_the_method_are_those_of_the_code() -> None:
    defaults = RunConfig().model_dump(mode="json")
    expected = {f"{part}.{key}": value for part in SETTINGS_OF_METHOD for key, value in defaults[part].items()}
    assert settings(ROOT / "docs" / "method.md") == expected


def sections(page: Path) -> dict[str, str]:
    """Return what stands below each heading of the second level."""
    _, *found = re.split(r"^## ", page.read_text(), flags=re.MULTILINE)
    return {title: body for title, _, body in (section.partition("\n") for section in found)}


def python_blocks(text: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def check_call(python: str) -> None:
    """Check the method, its parameters, and the settings, that a call of a documented snippet names."""
    for call in [node for node in ast.walk(ast.parse(python)) if isinstance(node, ast.Call)]:
        arguments = {keyword.arg: keyword.value for keyword in call.keywords}
        if "method" in arguments:
            parameters = ast.literal_eval(arguments["parameters"]) if "parameters" in arguments else {}
            check_parameters(ast.literal_eval(arguments["method"]), parameters)
        if "settings" in arguments:
            parse_config(ast.literal_eval(arguments["settings"]), "settings")


def test_methods_and_defaults_of_the_methods_page_are_those_of_the_code() -> None:
    text = (ROOT / "docs" / "merge-methods.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| [^|]+ \|([^|]*)\| ([^|]+) \|$", text, re.MULTILINE)
    listed = {name: (dict(re.findall(r"`(\w+)` ([\w.]+)", defaults)), paper) for name, defaults, paper in rows}
    assert listed == {
        name: (
            {gene: f"{row.default:g}" for gene, row in method.genes.items()}
            | {switch: values[0] for switch, values in method.switches.items()},
            method.reference,
        )
        for name, method in METHODS.items()
    }


@pytest.mark.parametrize(
    ("page", "names", "command", "argument"),
    [
        ("merge-methods.md", METHODS, "--method {}", 'method="{}"'),
        ("strategies.md", STRATEGIES, "{}", '"strategy": "{}"'),
    ],
)
def test_every_row_of_a_table_has_a_section_with_a_command_and_python(
    page: str, names: Iterable[str], command: str, argument: str
) -> None:
    by_name = sections(ROOT / "docs" / page)
    assert list(by_name) == list(names)
    for name, text in by_name.items():
        (python,) = python_blocks(text)
        assert python.startswith("memmcl.")
        check_call(python)
        assert argument.format(name) in python
        (line,) = re.findall(r"^memmcl merge .*$", text, re.MULTILINE)
        assert re.search(rf"[ =]{command.format(name)}\b", line), line


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_of_the_pages_parses(page: Path) -> None:
    for block in python_blocks(page.read_text()):
        ast.parse(block)


def test_the_loop_over_a_strategy_runs() -> None:
    loop = python_blocks((ROOT / "docs" / "strategies.md").read_text())[0]
    names: dict[str, Any] = {}
    exec(compile(loop, "docs/strategies.md", "exec"), names)
    assert abs(names["a"] - 0.8) < 0.05


def test_the_api_page_names_what_is_there_and_all_that_is_public() -> None:
    named = re.findall(r"^::: ([\w.]+)$", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE)
    for name in named:
        pkgutil.resolve_name(name)
    assert {f"memmcl.{name}" for name in memmcl.__all__ if name != "__version__"} <= set(named)


def test_the_site_has_every_page() -> None:
    def pages(entry: Any) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        return [page for below in (entry.values() if isinstance(entry, dict) else entry) for page in pages(below)]

    docs = ROOT / "docs"
    listed = pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    assert sorted(listed) == sorted(path.relative_to(docs).as_posix() for path in docs.rglob("*.md"))


def test_difficulty_weights_of_the_method_are_those_of_the_code() -> None:
    text = (ROOT / "docs" / "method.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| (\d+\.\d+) \|", text, re.MULTILINE)
    assert {name: float(weight) for name, weight in rows} == DEFAULT_WEIGHTS


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_settings_that_pages_name_exist(page: Path) -> None:
    tree = RunConfig().model_dump()
    sections = [name for name, value in tree.items() if isinstance(value, dict)]
    named = re.findall(
        rf"(?<![\w./])({'|'.join(sections)})\.([a-z_]+)\b(?!\.)", "\n".join(SPAN.findall(page.read_text()))
    )
    files = {"py", "md", "json", "html", "parquet", "yaml"}
    assert [f"{part}.{key}" for part, key in named if key not in files and key not in tree[part]] == []


def test_every_decision_is_linked_from_the_architecture() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    decisions = {f"adr/{path.name}" for path in (ROOT / "docs" / "adr").glob("*.md")}
    assert len(decisions) >= 6
    assert decisions <= set(LINK.findall(text))


def test_every_package_and_every_flow_is_in_the_architecture_tree() -> None:
    tree = (ROOT / "docs" / "architecture.md").read_text().partition("\n## What is where\n")[2].partition("\n## ")[0]
    parts = iter(re.split(r"^ {4}(\w+)/(?= |$)", tree, flags=re.MULTILINE)[1:])
    below = dict(zip(parts, parts, strict=True))
    for layer in ("memmcl", "tasks", "flows"):
        names = {f"{path.parent.name}/" for path in (ROOT / layer).glob("*/**/__init__.py")}
        if layer == "flows":
            names |= {path.name for path in (ROOT / layer).glob("*.py")} - {"__init__.py"}
        assert len(names) > 3
        missing = [name for name in sorted(names) if not re.search(rf"(?<![\w/]){re.escape(name)}", below[layer])]
        assert missing == [], layer
