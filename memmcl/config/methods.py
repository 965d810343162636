"""The merge methods by name: what each takes, what of it a search may vary, and where it comes from.

Plain data, so that settings and the command line know it before torch is loaded. The functions have the same names; see
`memmcl.merge.table`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field


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
    and gives the same in the small basis of their factors. exact: its merges lie in the span of the experts' factors,
    so that an adapter holds them exactly. grams: it needs second moments of inputs. rival: `search.rivals` offers it.
    """

    reference: str
    genes: Mapping[str, Gene] = field(default_factory=dict)
    switches: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    normalises: bool = False
    seeded: bool = False
    matrices: bool = False
    exact: bool = False
    grams: bool = False
    rival: bool = False

    @property
    def defaults(self) -> dict[str, float | str]:
        """The default of every parameter."""
        numbers = {name: gene.default for name, gene in self.genes.items()}
        return {**numbers, **{name: values[0] for name, values in self.switches.items()}}


DENSITY = Gene(0.0, 1.0, 0.5)
SCALE = Gene(0.0, 20.0, 1.0)
"""up to more than the experts that an average may be of"""
RESCALE = ("kept", "l1", "none")
ELECTION = {"election": ("weighted", "unweighted"), "majority": ("sum", "count")}

METHODS: Mapping[str, Method] = {
    "linear": Method("Ilharco et al. 2023, arXiv 2212.04089", exact=True),
    "ties": Method(
        "Yadav et al. 2023, arXiv 2306.01708",
        genes={"density": DENSITY, "scale": SCALE},
        switches={**ELECTION, "divide_by": ("weights", "count", "none")},
        normalises=True,
        rival=True,
    ),
    "dare_linear": Method(
        "Yu et al. 2024, arXiv 2311.03099", genes={"density": DENSITY}, switches={"rescale": RESCALE}, seeded=True
    ),
    "dare_ties": Method(
        "Yu et al. 2024, arXiv 2311.03099",
        genes={"density": DENSITY, "scale": SCALE},
        switches={"rescale": RESCALE, **ELECTION, "divide_by": ("none", "weights", "count")},
        seeded=True,
    ),
    "della": Method(
        "Deep et al. 2024, arXiv 2406.11617",
        genes={"density": DENSITY, "epsilon": Gene(0.0, 0.5, 0.15), "scale": SCALE},
        switches={"rescale": RESCALE, **ELECTION, "divide_by": ("weights", "count", "none")},
        normalises=True,
        seeded=True,
    ),
    "breadcrumbs": Method(
        "Davari and Belilovsky 2024, arXiv 2312.06795",
        genes={"density": Gene(0.0, 1.0, 0.9), "gamma": Gene(0.0, 0.5, 0.01)},
    ),
    "slerp": Method("Shoemake 1985", genes={"scale": SCALE}, normalises=True),
    "tsv": Method("Gargiulo et al. 2025, arXiv 2412.00081", matrices=True, exact=True, rival=True),
    "iso_cts": Method(
        "Marczak et al. 2025, arXiv 2502.04959", genes={"common": Gene(0.0, 1.0, 0.8)}, matrices=True, exact=True
    ),
    "regmean": Method(
        "Jin et al. 2023, arXiv 2212.09849",
        genes={"shrink": Gene(0.0, 1.0, 0.9), "scale": SCALE},
        normalises=True,
        grams=True,
    ),
}
SEARCHED = tuple(name for name, method in METHODS.items() if not method.grams)
"""Methods that a search may merge by: those that need no texts."""
RIVALS = tuple(name for name, method in METHODS.items() if method.rival)
