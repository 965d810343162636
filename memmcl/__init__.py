"""memmcl: one sentiment model out of many LoRA experts, merged by evolution and kept retrained.

    import memmcl

    memmcl.merge_experts("org/base", {"a": "lora-a", "b": "org/b"}, method="ties", rank=32).save("out")
    found = memmcl.search_merge("org/base", {"a": "lora-a", "b": "org/b"}, weak="weak.jsonl", evaluations=40)
    found.save("merged")
    run = memmcl.open_run("memmcl-store", "latest")
    memmcl.load_model("memmcl-store").predict(["The food was great."], subtasks=["sent2", "uabsa"])

Whatever is named here is loaded when it is first used: `import memmcl` loads no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from memmcl.version import __version__

if TYPE_CHECKING:
    from memmcl.api.anchoring import AnchorSettings as AnchorSettings
    from memmcl.api.anchoring import anchor_expert as anchor_expert
    from memmcl.api.merging import Merge as Merge
    from memmcl.api.merging import MergeOptions as MergeOptions
    from memmcl.api.merging import merge_experts as merge_experts
    from memmcl.api.model import Prediction as Prediction
    from memmcl.api.model import SentimentModel as SentimentModel
    from memmcl.api.model import load_model as load_model
    from memmcl.api.runs import FinishedRun as FinishedRun
    from memmcl.api.runs import open_run as open_run
    from memmcl.api.search_result import SearchResult as SearchResult
    from memmcl.api.searching import search_merge as search_merge

_MODULES = {
    "anchoring": ("AnchorSettings", "anchor_expert"),
    "merging": ("Merge", "MergeOptions", "merge_experts"),
    "model": ("Prediction", "SentimentModel", "load_model"),
    "runs": ("FinishedRun", "open_run"),
    "search_result": ("SearchResult",),
    "searching": ("search_merge",),
}
_HOMES = {name: f"memmcl.api.{module}" for module, names in _MODULES.items() for name in names}
"""Public name -> the module that it is loaded from (PEP 562)."""
__all__ = ["__version__", *sorted(_HOMES)]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
