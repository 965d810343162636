"""Merge methods called by name, with their parameters checked against the table `METHODS`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from memmcl import seeds
from memmcl.config.methods import METHODS, Method
from memmcl.errors import ConfigError, GenomeError, shown
from memmcl.merge import methods, spectral

_ELECTION = [field.name for field in fields(methods.Election)]


def run_method(method: str, vectors: methods.Vectors, weights: Tensor, **parameters: Any) -> Tensor:
    """Return a merge by the function that has the method's name; arguments are not checked.

    vectors: task vectors of one shape; weights: (experts,). parameters: flat, as the table lists them, and what the
    function takes beside them (`seeds`, `grams`, `rank`).
    """
    row = METHODS[method]
    function = getattr(spectral if row.matrices or row.grams else methods, method)
    if "divide_by" in row.switches:
        election = {name: parameters.pop(name, row.defaults[name]) for name in _ELECTION}
        parameters["election"] = methods.Election(**election)
    merged: Tensor = function(vectors, weights, **parameters)
    return merged


def merge_task_vectors(
    method: str, task_vectors: Tensor, weights: Tensor, *, seed: int = 0, **parameters: Any
) -> Tensor:
    """Return the merge of `task_vectors`, (experts, *shape) of a floating dtype, with `weights`, (experts,); (*shape).

    seed: of the masks of random methods, of which each expert has its own. parameters: those of the method
    (`METHODS[method]`); regmean takes `grams`, by expert the second moment (d_in, d_in) of the inputs.

    Raises:
        ConfigError: no such method or parameter, or one out of bounds.
        GenomeError: not one weight for each task vector, or weights that the method cannot take.
        ModelError: task vectors that are no matrices, for a method of matrices.
    """
    row = check_parameters(method, {name: value for name, value in parameters.items() if name != "grams"})
    if ("grams" in parameters) != row.grams:
        raise ConfigError(f"{method}: {'needs `grams`' if row.grams else 'takes no `grams`'}; see METHODS")
    if task_vectors.dim() < 1 or weights.shape != task_vectors.shape[:1] or not len(weights):
        raise GenomeError(
            f"expected one weight for each of one or more task vectors (experts, *shape); got weights "
            f"{tuple(weights.shape)} for task vectors {tuple(task_vectors.shape)}"
        )
    if not bool(torch.isfinite(weights).all()):
        raise GenomeError(f"expected finite weights, got {weights.tolist()}")
    masks = {"seeds": [seeds.derive(seed, index) for index in range(len(weights))]} if row.seeded else {}
    return run_method(method, task_vectors, weights, **masks, **parameters)


def check_search(
    method: str, parameters: Mapping[str, Any], genes: Mapping[str, tuple[float, float]], lowest: float
) -> None:
    """Refuse a search that could propose merges which the method cannot compute.

    parameters: fixed; genes: those that are searched, each between two values; lowest: the lowest coefficient.

    Raises:
        ConfigError: no such parameter, one out of bounds, one both fixed and searched, bounds that do not rise.
    """
    row = check_parameters(method, parameters)
    for name, (low, high) in genes.items():
        if name in row.switches:
            raise ConfigError(f"{method}: {name} is a choice, it cannot be searched; fix it as a parameter")
        check_parameters(method, {name: low})
        check_parameters(method, {name: high})
        if not low < high or name in parameters:
            raise ConfigError(
                f"{method}: {name} is searched in {[low, high]}: bounds must rise, and no value be given beside"
            )
    if method == "slerp" and lowest < 0:
        raise ConfigError(f"slerp takes no negative coefficients; set the lower bound to 0, it is {lowest:g}")


def check_parameters(method: str, parameters: Mapping[str, Any]) -> Method:
    """Return the method, if it takes these parameters.

    Raises:
        ConfigError: no such method or parameter, or one out of bounds.
    """
    if method not in METHODS:
        raise ConfigError(f"expected a merge method out of {', '.join(METHODS)}; got {shown(method)}")
    row = METHODS[method]
    for name, value in parameters.items():
        if name in row.switches:
            if value not in row.switches[name]:
                raise ConfigError(f"{method}: {name} is one of {', '.join(row.switches[name])}; got {shown(value)}")
        elif name in row.genes:
            gene = row.genes[name]
            if isinstance(value, bool) or not isinstance(value, int | float) or not gene.low <= value <= gene.high:
                raise ConfigError(f"{method}: {name} lies in [{gene.low:g}, {gene.high:g}]; got {shown(value)}")
        else:
            known = ", ".join([*row.genes, *row.switches]) or "no parameter"
            raise ConfigError(f"{method} takes {known}; got {shown(name)}")
    return row
