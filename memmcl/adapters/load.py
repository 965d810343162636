"""A user's LoRA adapters: read from a folder, a URL or the hub, checked, and identified by their digests."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from memmcl.adapters.format import CONFIG_FILE, WEIGHTS_FILE, Adapter, from_files, read_file
from memmcl.adapters.options import read_options
from memmcl.backbone.shapes import Shapes
from memmcl.errors import VALUE, ConfigError, DataError, ModelError, brief, shown
from memmcl.files import allowed
from memmcl.files.places import existing_path, open_file, open_place, reading
from memmcl.store import ArtifactRef, Store
from memmcl.urls import first_line, public, refuse_secret

FILES = (CONFIG_FILE, WEIGHTS_FILE)
_PICKLED = "adapter_model.bin"
_HUB = re.compile(r"^(?P<name>[\w-][\w.-]*/[\w.-]+)(@(?P<revision>[\w./-]+))?$")
_SUPPORTED_INITS = (None, True, False, "gaussian", "orthogonal", "eva")
_UNSUPPORTED = (
    "use_dora",
    "modules_to_save",
    "layer_replication",
    "alora_invocation_tokens",
    "use_qalora",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
    "velora_config",
    "monteclora_config",
    "trainable_token_indices",
    "target_parameters",
    "lora_bias",
)


@dataclass(frozen=True)
class UserAdapter:
    """One adapter. place: where it was read; files: the two of a PEFT folder; base_name: the base that they name."""

    name: str
    place: str
    files: Mapping[str, bytes]
    factors: Adapter
    base_name: str | None

    @property
    def digests(self) -> dict[str, str]:
        """The sha256 of each file."""
        return {name: hashlib.sha256(data).hexdigest() for name, data in self.files.items()}

    @property
    def rank(self) -> int:
        """The largest rank of its modules."""
        return max(len(pair.a) for pair in self.factors.values())


def read_user_adapter(name: str, place: str) -> UserAdapter:
    """Read the adapter at `place`: a folder, the URL of one, or ORG/NAME on the hub, with @REVISION if need be.

    Raises:
        ConfigError: a place that may not be opened, or a URL with credentials in it.
        ModelError: there is none, it cannot be read, or it is no LoRA adapter whose task vectors add up.
    """
    try:
        files = _fetch(place)
        factors = read_adapter(weights=files[WEIGHTS_FILE], config=files[CONFIG_FILE])
    except (ModelError, DataError) as error:
        raise ModelError(f"expert {name}: {error}") from error
    except ConfigError as error:
        raise ConfigError(f"expert {name}: {public(place)}: {error}") from error
    options = read_options(files[CONFIG_FILE])
    return UserAdapter(name, public(place), files, factors, options.base_model_name_or_path)


def check_fit(expert: UserAdapter, base: Shapes) -> None:
    """Refuse an adapter of another base.

    Raises:
        ModelError: a module that the base has not, or of another shape.
    """
    for module, pair in expert.factors.items():
        shape, actual = (len(pair.b), pair.a.shape[1]), base.linear.get(module)
        if shape != actual:
            has = f"{actual[0]} x {actual[1]}" if actual else f"no such linear layer ({base.layers} layers in all)"
            raise ModelError(
                f"expert {expert.name} changes {module} of {shape[0]} x {shape[1]}, {base.name} has {has}; it was "
                "trained on another base"
            )
        if not module.startswith("model.layers."):
            raise ModelError(
                f"expert {expert.name} changes {module}; memmcl merges linear layers inside model.layers, retrain it "
                "without that one"
            )


def other_base(expert: UserAdapter, base: Shapes) -> str | None:
    """Return a warning where the adapter names another base than `base`, else None.

    Only the last component of a name counts: the same model has other paths on other machines and on the hub.
    """
    if not expert.base_name or _last(expert.base_name) in {_last(base.name), _last(str(base.directory))}:
        return None
    return (
        f"expert {expert.name} says that it was trained on {expert.base_name[:VALUE]}; its shapes fit {base.name}, "
        "but if that is another model, the merge is worth nothing"
    )


def _last(name: str) -> str:
    return re.split(r"[/\\:]", name.rstrip("/\\"))[-1].lower()


def _fetch(place: str) -> dict[str, bytes]:
    if "://" in place:
        return _from_url(place)
    if folder := existing_path(place):
        return read_folder(folder)
    match = _HUB.match(place)
    if match is None:
        raise ModelError(
            f"there is no {brief(place)}; give the folder of an adapter, its URL (s3://bucket/folder), or ORG/NAME on "
            "the hub"
        )
    allowed.require_hub(match["name"])
    return _from_hub(match["name"], match["revision"])


def read_folder(folder: Path) -> dict[str, bytes]:
    """Return the two files of a PEFT folder on this machine.

    Raises:
        ConfigError: a place that may not be opened.
        ModelError: they are not there, cannot be read, or are larger than any adapter.
    """
    for file in (folder, *(folder / name for name in FILES)):
        allowed.require(str(file))
    try:
        if folder.is_file():
            raise ModelError(f"{brief(folder)} is a file; give the folder that PEFT's save_pretrained wrote")
        return _read_both(
            brief(folder), lambda name: (folder / name).is_file(), lambda name: (folder / name).open("rb")
        )
    except OSError as error:
        raise ModelError(f"cannot read {brief(folder)} ({error.strerror}); check its permissions") from error


def _from_url(url: str) -> dict[str, bytes]:
    refuse_secret(url)
    with reading(url):
        fs, path = open_place(url.rstrip("/"))
        return _read_both(
            public(url), lambda name: fs.exists(f"{path}/{name}"), lambda name: open_file(fs, f"{path}/{name}")
        )


def _read_both(
    place: str, exists: Callable[[str], bool], opened: Callable[[str], AbstractContextManager[BinaryIO]]
) -> dict[str, bytes]:
    """Return the two files of an adapter; exists, opened: whether a file is there, and the file open for reading."""
    missing = [name for name in FILES if not exists(name)]
    if missing:
        raise ModelError(_lacks(place, missing[0], pickled=exists(_PICKLED)))
    files = {}
    for name in FILES:
        with opened(name) as file:
            files[name] = read_file(name, file)
    return files


def _from_hub(name: str, revision: str | None) -> dict[str, bytes]:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    files = {}
    for file in FILES:
        try:
            with Path(hf_hub_download(name, file, revision=revision)).open("rb") as opened:
                files[file] = read_file(file, opened)
        except (EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
            if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
                raise ModelError(_lacks(f"{name} on the hub", file, pickled=False)) from error
            raise ModelError(
                f"{shown(name)} is neither a folder here nor an adapter of the hub that can be had "
                f"({first_line(error)}); check the spelling, the revision and the network"
            ) from error
    return files


def _lacks(place: str, file: str, *, pickled: bool) -> str:
    if file == WEIGHTS_FILE and pickled:
        return f"{place} has {_PICKLED}, and memmcl reads safetensors only; load it with PEFT and save_pretrained again"
    return f"{place} has no {file}; give a folder that PEFT's save_pretrained wrote, with {' and '.join(FILES)}"


def read_adapter(weights: bytes, config: bytes) -> dict[str, Any]:
    """Read a PEFT LoRA adapter whose task vector is scale * B A on the base as it is.

    Raises:
        ModelError: another kind of adapter, or a broken one.
    """
    factors = from_files(weights, config)
    options = read_options(config).model_dump()
    unsupported = [name for name in _UNSUPPORTED if options.get(name)]
    if options.get("init_lora_weights") not in _SUPPORTED_INITS:  # the others start from a changed base
        unsupported.append("init_lora_weights")
    if unsupported:
        problem = f"{unsupported[0]}: {shown(options[unsupported[0]])}"
        raise ModelError(f"expected plain LoRA, got {problem}; convert the adapter, or retrain it without")
    return factors


def load_published(store: Store, ref: ArtifactRef) -> Adapter:
    """Return the LoRA factors of an adapter in the store."""
    manifest = store.load(ref)
    return from_files(store.read(manifest, WEIGHTS_FILE), store.read(manifest, CONFIG_FILE))
