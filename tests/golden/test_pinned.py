"""What must not change unnoticed: a store written by an earlier version stays readable by these numbers.

Whoever changes one of them on purpose raises the version of the stages it decides, and pins the new value here.
"""

from __future__ import annotations

from memmcl import seeds
from memmcl.store import ArtifactRef, cache_key
from memmcl.suite.splits import load_splits
from memmcl.suite.subtasks import SUBTASKS

SIZES = {
    "sent2": (117, 24, 51),
    "asc": (201, 24, 119),
    "uabsa": (126, 24, 75),
    "aste": (119, 24, 69),
    "irony": (104, 24, 61),
    "emotion": (95, 24, 72),
}
TEST_DIGESTS = {
    "sent2": "fd226dbb91c8b88c",
    "asc": "3ff2ef0b71f56b21",
    "uabsa": "6c2f00cd8db1f806",
    "aste": "05901f80301e2da6",
    "irony": "daca1f6287d92234",
    "emotion": "4fbfad28a2787a58",
}


def test_derived_seeds() -> None:
    assert seeds.derive(0, "stage1", "SC", 3) == 9070778233729650319
    assert seeds.derive(7, "expert", "irony") == 3836414121908111845


def test_cache_keys() -> None:
    split = ArtifactRef(kind="split", key="ab" * 32, name="irony train")
    config = {"steps": 40, "rate": 5e-4, "layers": ["q_proj"]}
    key = cache_key("expert", inputs=[split], config=config, stage_version=1, seed=0)
    assert key == "6920fe39865e606fddf44e53592c4f1b467ce4545a3e6889470cfbe3186b0a12"


def test_splits_of_the_embedded_corpus() -> None:
    splits = load_splits(
        [SUBTASKS[name] for name in SIZES], train_rows=None, weak_rows=24, selection_rows=0, test_rows=None
    )
    sizes = {
        name: tuple(len(parts[part]) for part in ("train", "weak", "test")) for name, parts in splits.parts.items()
    }
    assert sizes == SIZES
    assert {name: splits.digest(name, "test")[:16] for name in splits.parts} == TEST_DIGESTS
