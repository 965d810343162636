"""A configuration read from a YAML file and `key=value` overrides, and what is wrong with one in words."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from memmcl.config.run import RunConfig
from memmcl.errors import VALUE, ConfigError, brief, shown
from memmcl.files.untrusted import YAML_BYTES, parse_yaml, read_within
from memmcl.urls import redact, redacted, secret_in

PROBLEMS = 20
"""So many mistakes of one configuration are named in a message; all are counted."""


def read_yaml(path: Path, advice: str) -> Any:
    """Return what a YAML file holds; `advice` ends the message when it cannot be read.

    Raises:
        ConfigError: no such file, not YAML, or beyond the bounds of `memmcl.files.untrusted`.
    """
    try:
        return parse_yaml(read_within(path, YAML_BYTES).decode())
    except OSError as error:
        raise ConfigError(f"cannot read {brief(path)}: {error.strerror}; {advice}") from error
    except ValueError as error:
        reason = redact(str(error))
        raise ConfigError(f"{brief(path)} is not YAML that memmcl reads: {reason}; correct the file") from error


def load_config(path: Path | None, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file and apply `key.subkey=value` overrides (values in YAML).

    Raises:
        ConfigError: no such file, not YAML, an unknown key, a wrong type or a value out of bounds.
    """
    tree: dict[str, Any] = {}
    if path is not None:
        loaded = read_yaml(path, "give the path of a YAML file")
        if not isinstance(loaded, dict | None):
            raise ConfigError(
                f"{path}: expected a mapping of settings, got {type(loaded).__name__}; write lines of key: value"
            )
        tree = loaded or {}
    for override in overrides:
        _apply(tree, override)
    return parse_config(tree, str(path or "config"))


def parse_config(tree: Mapping[str, Any], source: str = "config") -> RunConfig:
    """Check a tree of plain values; `source` names it in errors."""
    try:
        return RunConfig.model_validate(tree)
    except ConfigError as error:
        raise ConfigError(f"{source}: {next(_secrets(tree), 'config')}: {error}") from None
    except ValidationError as error:
        problems = [redact(_explain(dict(problem))) for problem in error.errors()[:PROBLEMS]]
        beyond = error.error_count() - len(problems)
        more = [f"and {beyond:,} more"] if beyond else []
        raise ConfigError(f"{brief(source)}: " + "; ".join([*problems, *more])) from None  # its cause repeats values


def _secrets(value: object, where: str = "") -> Iterator[str]:
    """Yield where in a tree of plain values a URL holds a credential."""
    if isinstance(value, str) and secret_in(value):
        yield where
    inner = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list | tuple) else ()
    for key, child in inner:
        yield from _secrets(child, f"{where}.{key}" if where else str(key))


def _apply(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    names = key.strip().split(".")
    key = key[:VALUE]
    if not equals or not all(names):
        raise ConfigError(f"--set expects key=value, as in --set experts.steps=40; got {shown(redact(override))}")
    try:
        value = parse_yaml(text)
    except ValueError as error:
        reason = redact(str(error))
        raise ConfigError(f"--set {key}: {shown(redact(text))} is not a YAML value: {reason}") from error
    for name in names[:-1]:
        if tree.get(name) is None:  # a section with nothing in it
            tree[name] = {}
        child = tree[name]
        if not isinstance(child, dict):
            raise ConfigError(f"--set {key}: {name[:VALUE]} is a value, not a section")
        tree = child
    tree[names[-1]] = value


def _explain(problem: Mapping[str, Any]) -> str:
    where = ".".join(str(name)[:VALUE] for name in problem["loc"]) or "config"
    if problem["type"] == "extra_forbidden":
        return f"unknown key {shown(where)}; known here: {', '.join(_siblings(problem['loc']))}"
    message = str(problem["msg"]).removeprefix("Value error, ")
    value = problem["input"]
    got = "" if isinstance(value, dict) else f" (got {shown(redacted(value))})"
    return f"{where}: {message[0].lower()}{message[1:]}{got}"


def _siblings(location: Sequence[str | int]) -> list[str]:
    section: type[BaseModel] = RunConfig
    for name in location[:-1]:
        if name not in section.model_fields:  # the place in a list, or the name in a mapping, of sections
            continue
        annotation = section.model_fields[str(name)].annotation
        inner = [one for one in (annotation, *get_args(annotation)) if isinstance(one, type)]
        # a field without a section has no keys below it: then the name was one in a mapping
        section = next((one for one in inner if issubclass(one, BaseModel)), section)
    return list(section.model_fields)
