"""Every error memmcl raises on purpose, in one tree.

    MemmclError                     something the user can act on; shown as one line, exit code 1
    |-- UsageError                  the request itself is wrong; exit code 2
    |   |-- ConfigError             unknown key, wrong type, value out of bounds
    |   `-- GenomeError             a genome that does not fit the experts, blocks or bounds it is used with
    |-- DataError                   rows, splits, labels
    |-- ModelError                  base model, tokenizer, adapters
    |-- TrainingError               a training that cannot go on (non-finite loss, no rows)
    |-- SearchError                 a merge search that cannot go on
    |-- ServiceError                Prefect server, Ray, a port
    |   `-- ServiceDied             one that was there, and is gone
    `-- StoreError                  object storage
        |-- ArtifactNotFound        no manifest, or a blob it names is missing
        |-- CorruptArtifact         bytes that do not match their digest
        |-- StoreAccessError        wrong credentials, no such bucket, endpoint out of reach
        |-- StoreFull               no space left
        |-- Conflict                a compare-and-swap that lost
        `-- LeaseHeld               another live process works on the same run

A message says what was expected, what came, and what to do. Anything that is not a `MemmclError` is a bug.
"""

from __future__ import annotations


class MemmclError(Exception):
    """Base of all errors that memmcl raises on purpose."""

    exit_code = 1


class UsageError(MemmclError):
    """The request itself is wrong."""

    exit_code = 2


class ConfigError(UsageError):
    """The configuration has an unknown key, a wrong type, or a value out of bounds."""


class GenomeError(UsageError):
    """A genome does not fit the experts, blocks or bounds it is used with."""


class DataError(MemmclError):
    """Rows, labels or splits that cannot be used."""


class ModelError(MemmclError):
    """A base model, tokenizer or adapter that cannot be used."""


class TrainingError(MemmclError):
    """A training that cannot go on."""


class SearchError(MemmclError):
    """A merge search that cannot go on."""


class ServiceError(MemmclError):
    """A Prefect server, a Ray cluster or a port that cannot be used."""


class ServiceDied(ServiceError):
    """A Prefect server or a Ray that was there, and is gone."""


class StoreError(MemmclError):
    """Object storage that does not do what was asked."""


class ArtifactNotFound(StoreError):
    """No manifest, or a blob it names is missing."""


class CorruptArtifact(StoreError):
    """Bytes that do not match their digest."""


class StoreAccessError(StoreError):
    """Wrong credentials, no such bucket, or an endpoint out of reach."""


class StoreFull(StoreError):
    """No space left where the store lies."""


class Conflict(StoreError):
    """A compare-and-swap that lost: the pointer moved since it was read."""


class LeaseHeld(StoreError):
    """Another live process works on the same run."""
