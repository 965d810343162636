"""The trunk's activations: computed once, kept in bounded memory and on disk, and never wrong."""

from __future__ import annotations

import os
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import VOCABULARY, backbone_of, base_ref
from train_fixture import assert_same_training, held_out_rows, other_rows, own_rows, train

from memmcl.backbone import activations
from memmcl.backbone.activations import Activations, activations_directory, disk_limit, prune_activations
from memmcl.backbone.forward import Backbone
from memmcl.errors import ConfigError
from memmcl.experts.settings import Stopping

LIMIT = "MEMMCL_ACTIVATIONS_GB"


@pytest.fixture(scope="module")
def backbone(tiny_base: Path) -> Backbone:
    return backbone_of(tiny_base, 2)


@pytest.fixture
def cache_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MEMMCL_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv(LIMIT, raising=False)
    return tmp_path


def sequences(count: int, length: int = 5) -> list[tuple[int, ...]]:
    rng = np.random.default_rng(3)
    return [tuple(int(token) for token in rng.integers(3, VOCABULARY, length)) for _ in range(count)]


def files_of(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file())


def test_memory_holds_what_was_used_last(backbone: Backbone) -> None:
    a, b, c, d = sequences(4)
    each = 5 * 64 * 4
    activations = Activations(backbone, memory_bytes=3 * each)
    first = activations.of(a)
    assert first.nbytes == each
    for tokens in (b, c, a, list(a)):  # a was used after b
        activations.of(tokens)
    assert activations.of(a) is first
    assert activations.computed == 3
    activations.of(d)  # b goes
    for tokens in (a, c, d):
        activations.of(tokens)
    assert activations.computed == 4
    activations.of(b)
    assert activations.computed == 5
    assert activations._bytes == sum(kept.nbytes for kept in activations._cache.values()) == 3 * each


def test_what_is_larger_than_the_memory_is_held_alone(backbone: Backbone) -> None:
    a, b = sequences(2)
    activations = Activations(backbone, memory_bytes=1)
    for tokens in (a, a, b, b):
        assert torch.equal(activations.of(tokens), backbone.sequence_hidden(tokens))
    assert activations.computed == 2
    assert len(activations._cache) == 1


def test_no_tokens_have_no_activations(backbone: Backbone, tmp_path: Path) -> None:
    empty = Activations(backbone, tmp_path).of(())
    assert (empty.shape, empty.dtype) == ((0, 64), torch.float32)
    assert files_of(tmp_path) == []


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_disk_gives_the_bits_that_were_computed(tiny_base: Path, tmp_path: Path, dtype: str) -> None:
    backbone = backbone_of(tiny_base, 2, dtype)
    shown = [*sequences(3), *sequences(2, 40)]
    first, second = Activations(backbone, tmp_path), Activations(backbone, tmp_path)
    computed = [first.of(tokens) for tokens in shown]
    assert (first.computed, len(files_of(tmp_path))) == (5, 5)
    for tokens, hidden in zip(shown, computed, strict=True):
        assert second.of(tokens).dtype == backbone.dtype
        assert torch.equal(second.of(tokens), hidden)
        assert torch.equal(hidden, backbone.sequence_hidden(tokens))
    assert second.computed == 0


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "another length", "another name", "zeros", "a folder"])
def test_a_damaged_file_is_computed_anew(backbone: Backbone, tmp_path: Path, damage: str) -> None:
    (tokens,) = sequences(1)
    expected = Activations(backbone, tmp_path).of(tokens)
    (path,) = files_of(tmp_path)
    data = path.read_bytes()
    if damage == "cut":
        path.write_bytes(data[:-1])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "text":
        path.write_text("nothing of the kind")
    elif damage == "another length":
        Activations(backbone, tmp_path / "other").of(tokens[:3])
        (shorter,) = files_of(tmp_path / "other")
        path.write_bytes(shorter.read_bytes())
    elif damage == "zeros":  # a name that reached the disk before the last block did
        path.write_bytes(data[:-8] + bytes(8))
    elif damage == "another name":
        save_file({"other": expected}, path)
    else:
        path.unlink()
        (path / "inside").mkdir(parents=True)
    again = Activations(backbone, tmp_path)
    assert torch.equal(again.of(tokens), expected)
    assert again.computed == 1
    if damage != "a folder":
        assert torch.equal(load_file(path)["hidden"], expected), "it was not written anew"
    assert not list(tmp_path.rglob("*.part"))


def test_a_directory_that_cannot_be_written_is_harmless(backbone: Backbone, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file" / "below", Path("/proc/nowhere"), Path("/dev/full")):
        activations = Activations(backbone, place)
        for tokens in sequences(2):
            assert torch.equal(activations.of(tokens), backbone.sequence_hidden(tokens))
        assert activations.computed == 2


def test_a_full_disk_is_harmless_and_leaves_nothing(
    backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tokens,) = sequences(1)
    write_bytes = Path.write_bytes

    def full(path: Path, data: bytes) -> int:
        write_bytes(path, data[:100])
        return write_bytes(Path("/dev/full"), data)

    monkeypatch.setattr(Path, "write_bytes", full)
    assert torch.equal(Activations(backbone, tmp_path).of(tokens), backbone.sequence_hidden(tokens))
    assert files_of(tmp_path) == []


def test_files_of_others_can_be_read(backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tokens,) = sequences(1)
    expected = Activations(backbone, tmp_path).of(tokens)

    def refused(path: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("memmcl.backbone.activations.os.utime", refused)
    reader = Activations(backbone, tmp_path)
    assert torch.equal(reader.of(tokens), expected)
    assert reader.computed == 0


def test_a_writer_that_was_killed_is_harmless(backbone: Backbone, tmp_path: Path) -> None:
    (tokens,) = sequences(1)
    expected = Activations(backbone, tmp_path).of(tokens)
    (path,) = files_of(tmp_path)
    path.rename(path.with_name(f".{path.name}.abc.part"))
    path.with_name(f".{path.name}.abc.part").write_bytes(b"half")
    again = Activations(backbone, tmp_path)
    assert torch.equal(again.of(tokens), expected)
    assert again.computed == 1
    assert torch.equal(load_file(path)["hidden"], expected)


def test_several_writers_at_once(tiny_base: Path, tmp_path: Path) -> None:
    shown = sequences(6)
    backbones = [backbone_of(tiny_base, 2) for _ in range(3)]
    start = threading.Barrier(len(backbones))
    found: dict[int, list[torch.Tensor]] = {}

    def work(number: int) -> None:
        activations = Activations(backbones[number], tmp_path)
        start.wait()
        found[number] = [activations.of(tokens) for tokens in shown]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(backbones))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in range(len(backbones)):
        assert all(torch.equal(one, two) for one, two in zip(found[number], found[0], strict=True))
    assert len(files_of(tmp_path)) == len(shown)
    reader = Activations(backbones[0], tmp_path)
    assert all(torch.equal(reader.of(tokens), kept) for tokens, kept in zip(shown, found[0], strict=True))
    assert reader.computed == 0


def test_what_changes_a_bit_changes_the_directory(
    tiny_base: Path, backbone: Backbone, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = base_ref(tiny_base)
    usual = activations_directory(base, backbone)
    assert usual is not None
    assert usual.parent == cache_dir / "activations"
    assert activations_directory(replace(base, name="elsewhere"), backbone_of(tiny_base, 2)) == usual
    others = [
        activations_directory(replace(base, digest="0" * 64), backbone),
        activations_directory(base, backbone_of(tiny_base, 1)),
        activations_directory(base, backbone_of(tiny_base, 2, "bfloat16")),
    ]
    changes: dict[str, Any] = {
        "torch.get_num_threads": lambda: 63,
        "torch.__version__": "0",
        "transformers.__version__": "0",
    }
    for name, value in changes.items():
        with monkeypatch.context() as patch:
            patch.setattr(name, value)
            others.append(activations_directory(base, backbone))
    assert None not in others
    assert len({usual, *others}) == 7


@pytest.mark.parametrize(("given", "limit"), [("0", 0), ("0.5", 2**29), ("4", 2**32), ("-1", -(2**30))])
def test_the_limit_on_disk_is_in_gib(
    tiny_base: Path, backbone: Backbone, cache_dir: Path, monkeypatch: pytest.MonkeyPatch, given: str, limit: int
) -> None:
    assert disk_limit() == 4 * 2**30
    monkeypatch.setenv(LIMIT, given)
    assert disk_limit() == limit
    assert (activations_directory(base_ref(tiny_base), backbone) is None) == (limit <= 0)


@pytest.mark.parametrize("given", ["a lot", "", "4 GB", "nan", "inf"])
def test_a_limit_that_is_no_number(
    tiny_base: Path, backbone: Backbone, cache_dir: Path, monkeypatch: pytest.MonkeyPatch, given: str
) -> None:
    monkeypatch.setenv(LIMIT, given)
    for ask in (disk_limit, prune_activations, lambda: activations_directory(base_ref(tiny_base), backbone)):
        with pytest.raises(ConfigError, match=f"^{LIMIT} must be a number of GiB, got '{given}'; 0 keeps no"):
            ask()


def test_pruning_removes_what_killed_writers_left(cache_dir: Path) -> None:
    """Not what is being written now."""
    folder = cache_dir / "activations" / "0123" / "ab"
    folder.mkdir(parents=True)
    for name, age in (("old", 4000.0), ("new", 0.0)):
        path = folder / f".{name}.part"
        path.write_bytes(b"half")
        os.utime(path, (time.time() - age,) * 2)
    assert prune_activations() == 0
    assert [path.name for path in folder.iterdir()] == [".new.part"]


def test_what_was_used_longest_ago_goes_first(
    tiny_base: Path, backbone: Backbone, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = activations_directory(base_ref(tiny_base), backbone)
    assert directory is not None
    assert prune_activations() == 0
    shown = sequences(5)
    activations = Activations(backbone, directory)
    paths = []
    for age, tokens in enumerate(shown):
        activations.of(tokens)
        (path,) = set(files_of(directory)) - set(paths)
        os.utime(path, (1000 + age, 1000 + age))
        paths.append(path)
    other = cache_dir / "other.safetensors"
    other.write_bytes(bytes(10_000))
    Activations(backbone, directory).of(shown[0])  # used now
    size = paths[0].stat().st_size
    assert prune_activations(5 * size) == 0
    assert prune_activations(3 * size + 1) == 2 * size
    assert files_of(directory) == sorted([paths[0], *paths[3:]])
    monkeypatch.setenv(LIMIT, str(size / 2**30))
    assert prune_activations() == 2 * size
    assert files_of(cache_dir) == sorted([paths[0], other])
    assert prune_activations(0) == size
    assert files_of(cache_dir) == [other]


def test_a_second_training_computes_nothing(tiny_base: Path, backbone: Backbone, tmp_path: Path) -> None:
    """Neither in the same process nor, with the disk, in a later one; and its bits are the same."""
    rows, anchors, held_out = own_rows(tiny_base), other_rows(tiny_base), held_out_rows(tiny_base)
    activations = Activations(backbone, tmp_path)

    def once(kept: Activations | None) -> object:
        return train(
            backbone, rows, anchors, steps=3, batch_size=6, activations=kept, validation=held_out, stopping=Stopping(2)
        )

    plain, first = once(None), once(activations)
    computed = activations.computed
    prefixes = 3  # one a subtask
    assert computed == sum(len(shown) for group in (rows, anchors, held_out) for shown in group.values()) + prefixes
    assert_same_training(plain, first)  # type: ignore[arg-type]
    assert_same_training(once(activations), first)  # type: ignore[arg-type]
    assert activations.computed == computed
    later = Activations(backbone, tmp_path)
    assert_same_training(once(later), first)  # type: ignore[arg-type]
    assert later.computed == 0


def test_a_file_that_cannot_be_removed_does_not_count_as_room(cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = cache_dir / "activations" / "0123" / "ab"
    folder.mkdir(parents=True)
    for number, name in enumerate(("old", "middle", "new")):
        path = folder / f"{name}.safetensors"
        path.write_bytes(bytes(1 << 20))
        os.utime(path, (1_000_000.0 + number,) * 2)
    unlink = Path.unlink

    def refuse(path: Path, missing_ok: bool = False) -> None:
        if path.stem == "old":
            raise PermissionError
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", refuse)
    monkeypatch.setattr(activations, "disk_limit", lambda: 2 << 20)
    assert prune_activations() == 1 << 20
    assert {path.stem for path in folder.iterdir()} == {"old", "new"}
