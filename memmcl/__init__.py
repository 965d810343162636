"""memmcl: one sentiment model out of many LoRA experts, merged by evolution and kept retrained.

    import memmcl

    memmcl.merge_experts("org/base", {"a": "lora-a", "b": "org/b"}, method="ties", rank=32).save("out")
    found = memmcl.search_merge("org/base", {"a": "lora-a", "b": "org/b"}, weak="weak.jsonl", evaluations=40)
    found.save("merged")

Whatever is named here is loaded when it is first used: `import memmcl` loads no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from memmcl.version import __version__

if TYPE_CHECKING:
    from memmcl.api.merging import Merge as Merge
    from memmcl.api.merging import merge_experts as merge_experts
    from memmcl.api.searching import SearchResult as SearchResult
    from memmcl.api.searching import search_merge as search_merge

_HOMES = {
    "Merge": "memmcl.api.merging",
    "SearchResult": "memmcl.api.searching",
    "merge_experts": "memmcl.api.merging",
    "search_merge": "memmcl.api.searching",
}
"""Public name -> the module that it is loaded from (PEP 562)."""
__all__ = ["__version__", *sorted(_HOMES)]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
