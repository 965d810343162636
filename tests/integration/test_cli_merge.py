"""`memmcl merge` as a user runs it, on adapters that PEFT wrote: what it makes, what it says, what it refuses."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import corpus, make_tiny_base, make_tiny_gguf, plain_model, probe_logits, tokenizer_of
from transformers import AutoModelForCausalLM, AutoTokenizer

from memmcl.adapters.format import CONFIG_FILE, WEIGHTS_FILE
from memmcl.api.merging import RECORD
from memmcl.api.writing import CARD
from memmcl.files import folder as folders
from memmcl.merge import METHODS, merge_task_vectors

Call = Callable[..., tuple[int, str, str]]
Deltas = dict[str, dict[str, torch.Tensor]]
WEIGHTS = {"plain": 1.0, "stable": -0.5, "mixed": 0.25}
SHAPES: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "layers_to_transform": [2, 3]},
    "stable": {"r": 3, "lora_alpha": 9, "target_modules": ["q_proj", "down_proj"], "use_rslora": True},
    "mixed": {
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["o_proj", "q_proj"],
        "rank_pattern": {"o_proj": 5},
        "alpha_pattern": {"layers.1.self_attn.o_proj": 3},
    },
}


def write_adapter(base: Path, folder: Path, seed: int, **shape: Any) -> Path:
    """Have PEFT save an adapter of random numbers."""
    model = get_peft_model(plain_model(base), LoraConfig(task_type="CAUSAL_LM", **shape))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def brought(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> dict[str, Path]:
    """The folders of three adapters of different shapes; to read, not to change."""
    root = tmp_path_factory.mktemp("brought")
    return {
        name: write_adapter(tiny_base, root / name, seed, **shape) for seed, (name, shape) in enumerate(SHAPES.items())
    }


@pytest.fixture(scope="module")
def deltas(brought: dict[str, Path], tiny_base: Path) -> Deltas:
    """By module and expert, the task vector that PEFT itself makes of an adapter, float64."""
    found: Deltas = {}
    for name, place in brought.items():
        model = PeftModel.from_pretrained(plain_model(tiny_base), place)
        for module, layer in model.get_base_model().named_modules():
            if hasattr(layer, "get_delta_weight"):
                found.setdefault(module, {})[name] = layer.get_delta_weight("default").detach().double()
    return found


@pytest.fixture
def call(command_line: Call) -> Call:
    """Run the command in this process, in an empty directory; what it leaves there is checked by the test."""
    return partial(command_line, "merge")


@pytest.fixture
def given(tiny_base: Path, brought: dict[str, Path]) -> list[object]:
    """The arguments of a call that would be right, but for --out."""
    return arguments(tiny_base, brought)


def arguments(base: object, places: Mapping[str, object]) -> list[object]:
    return ["--base", base, *(word for name, place in places.items() for word in ("--expert", f"{name}={place}"))]


def weights() -> str:
    return ",".join(f"{name}={value}" for name, value in WEIGHTS.items())


def merged_model(base: Path, added: Mapping[str, torch.Tensor]) -> torch.nn.Module:
    """Return the plain model with what is added to its weights: the oracle."""
    model = plain_model(base)
    for module, delta in added.items():
        weight = model.get_submodule(module).weight
        weight.data = (weight.data.double() + delta).float()
    return model


def summed(deltas: Deltas) -> dict[str, torch.Tensor]:
    return {module: sum(WEIGHTS[name] * delta for name, delta in parts.items()) for module, parts in deltas.items()}


def by_method(deltas: Deltas, method: str, **parameters: Any) -> dict[str, torch.Tensor]:
    """Return a merge of dense task vectors, module by module, of the experts that change it."""
    return {
        module: merge_task_vectors(
            method, torch.stack(list(parts.values())), torch.tensor([WEIGHTS[name] for name in parts]), **parameters
        )
        for module, parts in deltas.items()
    }


def refused(call: Call, code: int, words: Sequence[object], *expected: str) -> None:
    """One line, the exit code, nothing on stdout, nothing left behind."""
    before = sorted(Path.cwd().rglob("*"))
    ended, out, err = call(*words)
    assert ended == code, err
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    for part in expected:
        assert part in err
    assert sorted(Path.cwd().rglob("*")) == before


# --- what it makes


def test_the_sum_of_all_shapes_of_adapters_is_exact(
    call: Call, given: list[object], brought: dict[str, Path], deltas: Deltas, tiny_base: Path
) -> None:
    code, out, err = call(*given, "--weights", weights(), "--out", "merged")
    assert (code, err) == (0, "")
    rows = [line.split() for line in out.splitlines()]
    assert rows[0] == ["expert", "weight", "rank", "modules", "from"]
    assert rows[1:4] == [
        ["plain", "1", "4", "4", str(brought["plain"])],
        ["stable", "-0.5", "3", "8", str(brought["stable"])],
        ["mixed", "0.25", "5", "8", str(brought["mixed"])],
    ]
    assert out.splitlines()[4:] == ["method         linear", "adapter        merged (rank 9, exact)"]
    made = PeftModel.from_pretrained(plain_model(tiny_base), "merged").eval()
    expected = probe_logits(merged_model(tiny_base, summed(deltas)))
    assert (probe_logits(made) - expected).abs().max() < 2e-4
    assert (expected - probe_logits(plain_model(tiny_base))).abs().max() > 1
    assert json.loads(Path("merged", CONFIG_FILE).read_text())["base_model_name_or_path"] == str(tiny_base)


def test_record_and_card_tell_what_it_was_made_from(
    call: Call, given: list[object], brought: dict[str, Path], tmp_path: Path
) -> None:
    base = shutil.copytree(given[1], tmp_path / "licensed")  # type: ignore[arg-type]
    (base / "README.md").write_text("---\nlicense: Apache-2.0\ntags: [x]\n---\n# base\n")
    code, _, err = call("--base", base, *given[2:], "--out", "merged")
    assert code == 0
    assert err.count("warning: expert") == 3
    assert "warning: expert plain says that it was trained on" in err
    record = json.loads(Path("merged", RECORD).read_text())
    assert {one["name"]: one["coefficients"] for one in record["experts"]} == {name: [1.0] for name in brought}
    for one in record["experts"]:
        files = {name: folders.file_digest(brought[one["name"]] / name) for name in (CONFIG_FILE, WEIGHTS_FILE)}
        assert one["sha256"] == files
    assert record["method"] == {
        "name": "linear",
        "parameters": {},
        "seed": None,
        "reference": METHODS["linear"].reference,
    }
    assert record["base"] == {"name": str(base), "licence": "apache-2.0"}
    assert record["files"] == {
        name: folders.file_digest(Path("merged", name)) for name in (CARD, CONFIG_FILE, WEIGHTS_FILE)
    }
    assert set(record["versions"]) == {"memmcl", "torch", "transformers", "peft", "safetensors"}
    assert len(record["warnings"]) == 3
    _, front, text = Path("merged", CARD).read_text().split("---\n", 2)
    fields = yaml.safe_load(front)
    assert fields["base_model"] == str(base)
    assert (fields["license"], fields["library_name"]) == ("apache-2.0", "peft")
    assert {"merge", "lora"} <= set(fields["tags"])
    for one in record["experts"]:
        assert one["sha256"][WEIGHTS_FILE] in text
    code_block = text.split("```python\n")[1].split("```")[0]
    compile(code_block, "card", "exec")
    assert f"base = '{base}'" in code_block
    words = text.split("Made by:\n\n    memmcl merge ")[1].splitlines()[0].split()
    assert call(*words[:-1], "again")[0] == 0
    made, again = (Path(folder, WEIGHTS_FILE).read_bytes() for folder in ("merged", "again"))
    assert made == again


@pytest.mark.parametrize("method", ["tsv", "iso_cts"])
def test_methods_of_matrices_have_an_exact_adapter(
    call: Call, given: list[object], deltas: Deltas, tiny_base: Path, method: str
) -> None:
    code, out, err = call(*given, "--weights", weights(), "--method", method, "--out", "merged")
    assert (code, err) == (0, "")
    assert "exact)" in out
    made = PeftModel.from_pretrained(plain_model(tiny_base), "merged").eval()
    expected = probe_logits(merged_model(tiny_base, by_method(deltas, method)))
    assert (probe_logits(made) - expected).abs().max() < 5e-3


def test_a_whole_model_loads_without_memmcl(call: Call, given: list[object], deltas: Deltas, tiny_base: Path) -> None:
    words = [*given, "--weights", weights(), "--method", "ties", "--param", "density=0.3", "--full", "--out", "merged"]
    code, out, err = call(*words)
    assert (code, err) == (0, "")
    assert out.splitlines()[-2:] == [
        "method         ties, density 0.3, scale 1, election weighted, majority sum, divide_by weights",
        "model          merged (float32)",
    ]
    made = AutoModelForCausalLM.from_pretrained("merged")
    assert made.dtype == torch.float32  # as the base's own files are
    expected = probe_logits(merged_model(tiny_base, by_method(deltas, "ties", density=0.3)))
    assert (probe_logits(made) - expected).abs().max() < 1e-3
    tokenizer, own = AutoTokenizer.from_pretrained("merged"), tokenizer_of(tiny_base)
    assert tokenizer("So good.")["input_ids"] == own("So good.")["input_ids"]
    assert tokenizer.chat_template == own.chat_template
    record = json.loads(Path("merged", RECORD).read_text())
    assert record["output"] == {"form": "full", "dtype": "float32"}
    assert record["made_from"]["base"]["weights"]
    assert yaml.safe_load(Path("merged", CARD).read_text().split("---\n")[1])["library_name"] == "transformers"
    code, out, _ = call(*words)
    assert (code, out.splitlines()[0]) == (0, "merged is there already, made with the same arguments; it is:")
    assert call(*words[:-1], "small", "--dtype", "bfloat16")[0] == 0
    assert load_file("small/model.safetensors")["model.norm.weight"].dtype == torch.bfloat16


def test_a_compressed_adapter_tells_what_is_lost(
    call: Call, given: list[object], deltas: Deltas, tiny_base: Path
) -> None:
    words = [*given, "--weights", weights(), "--method", "dare_linear", "--seed", 3]
    code, out, err = call(*words, "--rank", 12, "--out", "small")
    assert (code, err) == (0, "")
    assert call(*words, "--full", "--out", "whole")[0] == 0
    whole = AutoModelForCausalLM.from_pretrained("whole")
    small = PeftModel.from_pretrained(plain_model(tiny_base), "small").merge_and_unload()
    errors = {}
    for module in deltas:
        start, *ends = (model.get_submodule(module).weight.data for model in (plain_model(tiny_base), whole, small))
        exact, near = (end - start for end in ends)
        assert torch.linalg.matrix_rank(exact) > 12
        errors[module] = float((near - exact).norm() / exact.norm())
    worst = max(errors, key=lambda module: errors[module])
    mean = sum(errors.values()) / len(errors)
    assert f"relative error {mean:.4f} in the mean, {errors[worst]:.4f} in the worst ({worst})" in out
    assert "adapter        small (rank 12)" in out
    assert f"{mean:.4f} in the mean over {len(deltas)} modules" in Path("small", CARD).read_text()
    assert json.loads(Path("small", RECORD).read_text())["errors"]["modules"] == pytest.approx(errors, abs=1e-4)


def test_regmean_looks_at_what_each_expert_sees(
    call: Call,
    given: list[object],
    brought: dict[str, Path],
    deltas: Deltas,
    tiny_base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("memmcl.api.merging.resolve_dtype", lambda *_: "float32")
    texts = {
        name: [row.text for row in corpus(subtask, 5)]
        for name, subtask in zip(("plain", "mixed"), ("sent2", "irony"), strict=True)
    }
    (tmp_path / "plain.txt").write_text("\n".join(texts["plain"]))
    (tmp_path / "mixed.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts["mixed"]))
    two = [*given, "--weights", "plain=1,mixed=0.25,stable=0", "--method", "regmean", "--full", "--out", "merged"]
    files = ["--texts", f"plain={tmp_path / 'plain.txt'}", "--texts", f"mixed={tmp_path / 'mixed.jsonl'}"]
    code, _, err = call(*two, *files, "--text-tokens", 9)
    assert (code, err) == (0, "")
    moments = {name: naive_moments(tiny_base, brought[name], rows, deltas, 9) for name, rows in texts.items()}
    expected = {}
    for module, parts in deltas.items():
        names = [name for name in parts if name in texts]
        if names:
            grams = [moments[name][module] for name in names]
            vectors, factors = torch.stack([parts[name] for name in names]), [WEIGHTS[name] for name in names]
            expected[module] = merge_task_vectors("regmean", vectors, torch.tensor(factors).double(), grams=grams)
    made = AutoModelForCausalLM.from_pretrained("merged")
    assert (probe_logits(made) - probe_logits(merged_model(tiny_base, expected))).abs().max() < 2e-3
    record = json.loads(Path("merged", RECORD).read_text())
    assert [one["texts"] for one in record["experts"]] == [5, None, 5]


@torch.no_grad()
def naive_moments(
    base: Path, adapter: Path, texts: Sequence[str], deltas: Deltas, tokens: int
) -> dict[str, torch.Tensor]:
    """Return second moments by a hook on PEFT's own model, text by text, float64."""
    model = PeftModel.from_pretrained(plain_model(base), adapter).eval()
    found: dict[str, torch.Tensor] = {}

    def watch(name: str) -> Callable[..., None]:
        def hook(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            features = inputs[0][0].double()
            found[name] = found.get(name, 0) + features.T @ features  # type: ignore[arg-type]

        return hook

    for module in deltas:
        model.get_base_model().get_submodule(module).register_forward_pre_hook(watch(module))
    for text in texts:
        model(torch.tensor([tokenizer_of(base)(text)["input_ids"][:tokens]]))
    return found


# --- where adapters come from


def test_urls_the_hub_and_a_gguf_base(
    call: Call,
    brought: dict[str, Path],
    deltas: Deltas,
    tiny_base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import fsspec

    fs = fsspec.filesystem("memory")
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        fs.pipe_file(f"/brought/mixed/{name}", (brought["mixed"] / name).read_bytes())
    snapshot = tmp_path / "hub" / "models--some--stable" / "snapshots" / "abc"
    snapshot.parent.mkdir(parents=True)
    shutil.copytree(brought["stable"], snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    places = {"plain": f"file://{brought['plain']}/", "stable": "some/stable", "mixed": "memory://brought/mixed"}
    code, out, err = call(*arguments(tiny_base, places), "--weights", weights(), "--out", "merged")
    assert (code, err) == (0, "")
    assert all(f" {place} " in out for place in places.values())
    made = PeftModel.from_pretrained(plain_model(tiny_base), "merged").eval()
    assert (probe_logits(made) - probe_logits(merged_model(tiny_base, summed(deltas)))).abs().max() < 2e-4
    gguf = make_tiny_gguf(tmp_path / "tiny.gguf", tiny_base)
    assert call(*arguments(gguf, brought), "--weights", weights(), "--out", "other")[0] == 0
    assert Path("other", WEIGHTS_FILE).read_bytes() == Path("merged", WEIGHTS_FILE).read_bytes()
    assert "resolve_base(" in Path("other", CARD).read_text()


def test_the_base_s_config_is_enough_for_an_adapter(
    call: Call, given: list[object], tiny_base: Path, tmp_path: Path
) -> None:
    (tmp_path / "base").mkdir()
    shutil.copy(tiny_base / "config.json", tmp_path / "base")
    code, _, err = call("--base", tmp_path / "base", *given[2:], "--out", "merged")
    assert (code, err) == (0, "")
    refused(
        call,
        1,
        ["--base", tmp_path / "base", *given[2:], "--full", "--out", "whole"],
        "--base: ",
        "holds no config.json with *.safetensors weights",
    )


# --- folders


def test_a_folder_is_the_result_or_is_left_alone(call: Call, given: list[object], tmp_path: Path) -> None:
    first = call(*given, "--out", "merged")
    assert first[0] == 0
    before = {path.name: (path.stat().st_ino, path.read_bytes()) for path in Path("merged").iterdir()}
    code, out, err = call(*given, "--out", "merged")
    assert (code, err) == (0, "")
    assert out == f"merged is there already, made with the same arguments; it is:\n{first[1]}"
    assert {path.name: (path.stat().st_ino, path.read_bytes()) for path in Path("merged").iterdir()} == before
    for more in (["--weights", "1,1,2"], ["--method", "tsv"], ["--rank", 2]):
        refused(call, 2, [*given, *more, "--out", "merged"], "merged holds what other arguments made; name a new")
    swapped = [*given[:2], *given[4:6], *given[2:4], *given[6:]]  # some methods heed the order
    refused(call, 2, [*swapped, "--out", "merged"], "merged holds what other arguments made")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").write_text("mine")
    refused(call, 2, [*given, "--out", tmp_path / "mine"], "mine holds other files")
    refused(call, 2, [*given, "--out", tmp_path / "mine" / "notes"], "is a file, not a folder")
    refused(call, 1, [*given, "--out", tmp_path / "mine" / "notes" / "x"], "cannot write", "Not a directory")
    Path("merged", WEIGHTS_FILE).write_bytes(b"torn")
    refused(call, 2, [*given, "--out", "merged"], "merged holds other files, or some that changed since")


def test_a_killed_merge_leaves_nothing_that_looks_whole(call: Call, given: list[object]) -> None:
    script = (
        "import os, signal, sys\nfrom memmcl.files import folder\n"
        "folder.seal = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "from flows.cli import main\nmain()\n"
    )
    words = ["merge", *map(str, given), "--out", "merged"]
    done = subprocess.run(
        [sys.executable, "-c", script, *words], env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False
    )
    assert done.returncode == -9
    (left,) = Path.cwd().iterdir()
    assert left.name.startswith(".merged.")
    assert left.name.endswith(".part")
    os.utime(left, (0, 0))  # as if it were old
    assert call(*given, "--out", "merged")[0] == 0
    assert [path.name for path in Path.cwd().iterdir()] == ["merged"]


def test_a_full_disk_is_one_line(call: Call, given: list[object], monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, 1000))
        refused(call, 1, [*given, "--full", "--out", "m"], "/m will take 0.7 MB, and its disk has 0.0 MB free")
        refused(call, 1, [*given, "--out", "m"], "and its disk has 0.0 MB free; make room")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        refused(call, 1, [*given, "--full", "--out", "m"], "cannot write the model (", "make room")
        refused(call, 1, [*given, "--out", "m"], "/m (File too large); make room")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# --- mistakes


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["--expert", "plain=x"], "--expert names plain twice; give each a name of its own"),
        (["--expert", "x"], "--expert expects NAME=PLACE, got 'x'"),
        (["--expert", "a b=x"], "--expert expects NAME=PLACE, got 'a b=x'"),
        (["--weights", "1,2"], "--weights has 2 numbers for 3 experts (plain, stable, mixed)"),
        (["--weights", "plain=1,2"], "in the order of the experts, or NAME=NUMBER each; got 'plain=1,2'"),
        (["--weights", "other=1"], "--weights names other, which is no expert; known ones: plain, stable, mixed"),
        (["--weights", "plain=1,plain=2"], "--weights names an expert twice"),
        (["--weights", "1,2,much"], "--weights: expected a number, got 'much'"),
        (["--weights", "1,2,nan"], "--weights: expected a number, got 'nan'"),
        (["--weights", "0,0,0"], "all weights are zero"),
        (["--method", "glue"], "expected a merge method out of linear, ties"),
        (["--method", "ties", "--full", "--param", "density=2"], "--param: ties: density lies in [0, 1]; got 2.0"),
        (["--method", "ties", "--full", "--param", "density=x"], "--param density: expected a number, got 'x'"),
        (["--method", "ties", "--full", "--param", "election=both"], "election is one of weighted, unweighted; got"),
        (["--param", "density=0.5"], "--param: linear takes no parameter; got 'density'"),
        (["--param", "density"], "--param expects NAME=VALUE, got 'density'"),
        (["--method", "ties"], "give --rank R for the nearest adapter of that rank, or --full for the whole model"),
        (["--rank", 4, "--full"], "--rank makes an adapter and --full a whole model; give one of them"),
        (["--dtype", "bfloat16"], "--dtype goes with --full; adapters are written in float32"),
        (["--texts", "plain=x.txt"], "--texts is for regmean; linear needs none"),
        (["--method", "regmean", "--full"], "--texts NAME=FILE; got none for plain, stable, mixed"),
        (["--method", "regmean", "--full", "--texts", "x=t"], "got some for x, which takes no part"),
        (["--method", "slerp", "--full", "--weights", "1,-1,1"], "slerp needs weights of 0 and more, got -1"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_options_that_are_wrong(call: Call, given: list[object], more: list[object], expected: str) -> None:
    refused(call, 2, [*given, "--out", "merged", *more], expected)


def test_options_that_are_missing(call: Call, given: list[object]) -> None:
    refused(call, 2, given, "expected --base, --expert and --out, got no --out")
    refused(call, 2, ["--out", "m"], "got no --base and no --expert")
    refused(call, 2, [*given[:2], "search", "--out", "m"], "options of `memmcl merge search` go behind it")
    _, out, _ = call()
    assert "Usage: memmcl merge" in out


def changed(adapter: Path, folder: Path, **options: Any) -> Path:
    """Copy an adapter, with other options in its config."""
    shutil.copytree(adapter, folder)
    config = json.loads((folder / CONFIG_FILE).read_text()) | options
    (folder / CONFIG_FILE).write_text(json.dumps(config))
    return folder


def with_tensors(adapter: Path, folder: Path, **tensors: torch.Tensor) -> Path:
    shutil.copytree(adapter, folder)
    save_file({**load_file(folder / WEIGHTS_FILE), **tensors}, folder / WEIGHTS_FILE)
    return folder


BAD: dict[str, tuple[Callable[[Path, Path], object], str]] = {
    "nothing": (lambda good, at: at, "there is no"),
    "file": (lambda good, at: good / CONFIG_FILE, "adapter_config.json is a file; give the folder"),
    "no adapter": (lambda good, at: good.parent, "has no adapter_config.json; give a folder that PEFT's"),
    "no weights": (
        lambda good, at: (changed(good, at) / WEIGHTS_FILE).unlink() or at,
        "has no adapter_model.safetensors; give a folder",
    ),
    "pickle": (
        lambda good, at: (changed(good, at) / WEIGHTS_FILE).rename(at / "adapter_model.bin") and at,
        "has adapter_model.bin, and memmcl reads safetensors only",
    ),
    "url": (lambda good, at: f"file://{at}", "has no adapter_config.json"),
    "scheme": (lambda good, at: "nowhere://x/y", "cannot open nowhere://x/y"),
    "secret": (lambda good, at: "s3://me:secret@host/x", "s3://host/x: a URL with user or password in it would be"),
    "hub": (lambda good, at: "some/adapter", "'some/adapter' is neither a folder here nor an adapter of the hub"),
    "dora": (lambda good, at: changed(good, at, use_dora=True), "without modules_to_save and without DoRA"),
    "saved": (lambda good, at: changed(good, at, modules_to_save=["lm_head"]), "without modules_to_save"),
    "pissa": (lambda good, at: changed(good, at, init_lora_weights="pissa"), "got init_lora_weights: 'pissa'"),
    "ia3": (lambda good, at: changed(good, at, peft_type="IA3"), "expected a plain LoRA adapter"),
    "embedding": (
        lambda good, at: with_tensors(
            good, at, **{"base_model.model.model.embed_tokens.lora_embedding_A": torch.zeros(2, 600)}
        ),
        "expected only lora_A and lora_B weights of linear layers",
    ),
    "bias": (
        lambda good, at: with_tensors(
            good, at, **{"base_model.model.model.layers.2.self_attn.q_proj.bias": torch.zeros(64)}
        ),
        "expected only lora_A and lora_B weights of linear layers",
    ),
    "head": (
        lambda good, at: with_tensors(
            good,
            at,
            **{
                "base_model.model.lm_head.lora_A.weight": torch.zeros(4, 64),
                "base_model.model.lm_head.lora_B.weight": torch.zeros(600, 4),
            },
        ),
        "changes lm_head; memmcl merges linear layers inside model.layers",
    ),
    "shape": (
        lambda good, at: with_tensors(
            good, at, **{"base_model.model.model.layers.2.self_attn.q_proj.lora_A.weight": torch.zeros(4, 32)}
        ),
        "changes model.layers.2.self_attn.q_proj of 64 x 32, {base} has 64 x 64; it was trained on another base",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_adapters_that_cannot_be_merged(
    call: Call, given: list[object], brought: dict[str, Path], tiny_base: Path, tmp_path: Path, kind: str
) -> None:
    make, expected = BAD[kind]
    place = make(brought["plain"], tmp_path / "bad")
    code = 2 if kind in ("scheme", "secret") else 1
    refused(
        call, code, [*given, "--expert", f"bad={place}", "--out", "m"], "expert bad", expected.format(base=tiny_base)
    )


def test_bases_that_are_none_or_others(call: Call, given: list[object], tmp_path: Path) -> None:
    smaller = make_tiny_base(tmp_path / "smaller", layers=2)
    expected = "changes model.layers.2.self_attn.q_proj of 64 x 64, {} has no such linear layer (2 layers in all)"
    refused(call, 1, ["--base", smaller, *given[2:], "--out", "m"], "expert plain", expected.format(smaller))
    refused(call, 1, ["--base", "/none", *given[2:], "--out", "m"], "--base: '/none' is neither a directory here nor")
    (tmp_path / "base").mkdir()
    refused(call, 1, ["--base", tmp_path / "base", *given[2:], "--out", "m"], "holds no config.json")
    (tmp_path / "base" / "config.json").write_text('{"model_type": "gpt2", "n_layer": 1}')
    refused(call, 1, ["--base", tmp_path / "base", *given[2:], "--out", "m"], "GPT2LMHeadModel without `model.layers`")
    (tmp_path / "base" / "config.json").write_text('{"model_type": "none"}')
    refused(call, 1, ["--base", tmp_path / "base", *given[2:], "--out", "m"], "cannot read the config.json of")
    config = json.loads((given[1] / "config.json").read_text()) | {"quantization_config": {"quant_method": "gptq"}}  # type: ignore[operator]
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    words = ["--base", tmp_path / "base", *given[2:], "--out", "m", "--full"]
    code, _, err = call(*words)
    assert code == 1
    assert "is quantised, and memmcl writes plain weights" in err
