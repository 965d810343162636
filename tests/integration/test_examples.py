"""The examples run, on the tiny base: the scripts in this process, the notebook in a kernel of its own."""

from __future__ import annotations

import json
import re
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import nbformat
import pyarrow.parquet as pq
import pytest
from nbclient import NotebookClient
from tiny import corpus, labelled_rows, write_adapter

if TYPE_CHECKING:
    from e2e_driver import Desk

EXAMPLES = Path(__file__).parents[2] / "examples"
DOCS = EXAMPLES.parent / "docs"
NOTEBOOK = EXAMPLES / "tour.ipynb"
TEXTS = [row.text for row in corpus("sent2", 60)]


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> dict[str, str]:
    """The folders of two adapters; to read, not to change."""
    root = tmp_path_factory.mktemp("experts")
    return {name: str(write_adapter(root / name, tiny_base, seed=seed)) for seed, name in enumerate(("sent2", "irony"))}


@pytest.fixture(scope="module")
def weak(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("weak") / "weak.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in labelled_rows("sent2", "irony")))
    return str(path)


def main_of(name: str) -> Callable[..., None]:
    main: Callable[..., None] = runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"]
    return main


def test_every_example_is_run_here() -> None:
    text = Path(__file__).read_text()
    names = sorted(path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".ipynb"))
    assert len(names) == 5
    assert [name for name in names if f'"{name.removesuffix(".py")}"' not in text] == []


def test_two_adapters_are_merged(
    tiny_base: Path, experts: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main_of("merge_two_adapters")(str(tiny_base), *experts.values(), str(tmp_path))
    assert "Merge(linear of first=1, second=0.5" in capsys.readouterr().out
    for folder, rank in (("sum", 6), ("ties", 16)):
        assert json.loads((tmp_path / folder / "adapter_config.json").read_text())["r"] == rank


def test_a_search_on_weak_rows(
    tiny_base: Path, experts: dict[str, str], weak: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    named = [f"{name}={folder}" for name, folder in experts.items()]
    main_of("search_on_weak_rows")(str(tiny_base), *named, weak, str(tmp_path))
    assert capsys.readouterr().out.startswith("SearchResult(fitness ")
    assert pq.read_table(tmp_path / "merged" / "candidates.parquet").num_rows == 20


def test_a_subtask_of_ones_own(
    tiny_base: Path, experts: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main_of("own_subtask")(str(tiny_base), *experts.values(), str(tmp_path))
    assert "'tickets': " in capsys.readouterr().out
    assert (tmp_path / "merged" / "merge.json").is_file()


def test_a_run_is_opened_and_plotted(reference: Desk, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plot = tmp_path / "plot.png"
    main_of("look_at_a_run")(str(reference.cwd / "memmcl-store"), str(plot), "The food was great.")
    printed = capsys.readouterr().out
    assert printed.startswith("FinishedRun(")
    assert "The food was great. | sent2: " in printed
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_the_notebook_runs(
    tiny_base: Path, experts: dict[str, str], weak: str, reference: Desk, tmp_path: Path
) -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    values = {
        "base": str(tiny_base),
        "experts": experts,
        "weak": weak,
        "store": str(reference.cwd / "memmcl-store"),
        "texts": TEXTS,
        "out": str(tmp_path),
    }
    (parameters,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())]
    assert all(f"{name} = " in parameters.source for name in values)
    parameters.source = "\n".join(f"{name} = {value!r}" for name, value in values.items())
    NotebookClient(notebook, timeout=240, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()
    shown = [output.data for cell in notebook.cells for output in cell.get("outputs", ()) if "data" in output]
    assert any("<svg" in data.get("text/html", "") for data in shown), "a search shows its curve"
    assert {path.name for path in tmp_path.iterdir()} >= {"ties", "searched", "anchored"}


def test_the_notebook_is_stored_without_outputs() -> None:
    cells = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    assert [cell for cell in cells if cell["outputs"] or cell["execution_count"]] == []


@pytest.mark.parametrize(("page", "written"), [("api", ["merged", "searched", "anchored"]), ("python", ["report"])])
def test_the_lines_of_a_page_run(
    page: str,
    written: list[str],
    tiny_base: Path,
    experts: dict[str, str],
    weak: str,
    reference: Desk,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As they stand: what they name is there, in the working directory. Ray's driver is tested beside the other one."""
    blocks = re.findall(r"^```python\n(.*?)^```", (DOCS / f"{page}.md").read_text(), re.DOTALL | re.MULTILINE)
    (tmp_path / "org").mkdir()
    places = {
        "org/base": tiny_base,
        "lora-a": experts["sent2"],
        "org/b": experts["irony"],
        "org/lora-b": experts["irony"],
        "weak.jsonl": weak,
        "memmcl-store": reference.cwd / "memmcl-store",
    }
    for name, place in places.items():
        (tmp_path / name).symlink_to(place)
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS))
    monkeypatch.chdir(tmp_path)
    names = {"base": "org/base", "experts": {"a": "lora-a", "b": "org/b"}, "adapter": "lora-a", "texts": TEXTS}
    for block in blocks:
        if "RayDriver" not in block and "s3://" not in block:
            exec(compile(block, f"docs/{page}.md", "exec"), names)
    assert [folder for folder in written if not any((tmp_path / folder).rglob("adapter_model.safetensors"))] == []
