"""The merge methods by name: what each takes, what of it a search may vary, and where it comes from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from memmcl import seeds
from memmcl.errors import ConfigError, GenomeError, shown
from memmcl.merge import methods, spectral


@dataclass(frozen=True)
class Gene:
    """A number that a method takes, within bounds; a search may vary it."""

    low: float
    high: float
    default: float


@dataclass(frozen=True)
class Method:
    """One way to merge task vectors.

    genes: its numbers; switches: its conventions, the default first. normalises: a common factor of the weights
    vanishes, so that `scale` is a gene. seeded: it draws masks. matrices: it takes task vectors with two dimensions,
    and gives the same in the small basis of their factors. grams: it needs second moments of inputs.
    """

    merge: Callable[..., Tensor]
    reference: str
    genes: Mapping[str, Gene] = field(default_factory=dict)
    switches: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    normalises: bool = False
    seeded: bool = False
    matrices: bool = False
    grams: bool = False

    @property
    def exact(self) -> bool:
        """Whether its merges have an exact adapter: they lie in the span of the experts' factors."""
        return self.matrices or self.merge is methods.linear


DENSITY = Gene(0.0, 1.0, 0.5)
SCALE = Gene(0.0, 20.0, 1.0)
"""up to more than the experts that an average may be of"""
RESCALE = ("kept", "l1", "none")
ELECTION = {"election": ("weighted", "unweighted"), "majority": ("sum", "count")}

METHODS: Mapping[str, Method] = {
    "linear": Method(methods.linear, "Ilharco et al. 2023, arXiv 2212.04089"),
    "ties": Method(
        methods.ties,
        "Yadav et al. 2023, arXiv 2306.01708",
        genes={"density": DENSITY, "scale": SCALE},
        switches={**ELECTION, "divide_by": ("weights", "count", "none")},
        normalises=True,
    ),
    "dare_linear": Method(
        methods.dare_linear,
        "Yu et al. 2024, arXiv 2311.03099",
        genes={"density": DENSITY},
        switches={"rescale": RESCALE},
        seeded=True,
    ),
    "dare_ties": Method(
        methods.dare_ties,
        "Yu et al. 2024, arXiv 2311.03099",
        genes={"density": DENSITY, "scale": SCALE},
        switches={"rescale": RESCALE, **ELECTION, "divide_by": ("none", "weights", "count")},
        seeded=True,
    ),
    "della": Method(
        methods.della,
        "Deep et al. 2024, arXiv 2406.11617",
        genes={"density": DENSITY, "epsilon": Gene(0.0, 0.5, 0.15), "scale": SCALE},
        switches={"rescale": RESCALE, **ELECTION, "divide_by": ("weights", "count", "none")},
        normalises=True,
        seeded=True,
    ),
    "breadcrumbs": Method(
        methods.breadcrumbs,
        "Davari and Belilovsky 2024, arXiv 2312.06795",
        genes={"density": Gene(0.0, 1.0, 0.9), "gamma": Gene(0.0, 0.5, 0.01)},
    ),
    "slerp": Method(methods.slerp, "Shoemake 1985", genes={"scale": SCALE}, normalises=True),
    "tsv": Method(spectral.tsv, "Gargiulo et al. 2025, arXiv 2412.00081", matrices=True),
    "iso_cts": Method(
        spectral.iso_cts, "Marczak et al. 2025, arXiv 2502.04959", genes={"common": Gene(0.0, 1.0, 0.8)}, matrices=True
    ),
    "regmean": Method(
        spectral.regmean,
        "Jin et al. 2023, arXiv 2212.09849",
        genes={"shrink": Gene(0.0, 1.0, 0.9), "scale": SCALE},
        normalises=True,
        grams=True,
    ),
}


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
    return row.merge(task_vectors, weights, **masks, **parameters)


def check_search(
    method: str, parameters: Mapping[str, Any], genes: Mapping[str, tuple[float, float]], lowest: float
) -> None:
    """Refuse a search that would come upon merges that the method cannot make.

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
