"""The section `search`."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from memmcl.config.methods import RIVALS, SEARCHED
from memmcl.config.section import OneOf, Section
from memmcl.config.strategies import STRATEGIES, UPDATES

FitnessKind = Literal["loglik", "choice", "metric", "agree"]


class SearchConfig(Section):
    """The two-stage merge search."""

    strategy: Annotated[str, OneOf(STRATEGIES)] = Field(
        "bayesian",
        description=f"What proposes genomes: {'; '.join(f'{name}, {row.about}' for name, row in STRATEGIES.items())}",
    )
    update: Annotated[str, OneOf(UPDATES)] = Field(
        "generational", description="Genetic and nsga2: a population is replaced as a whole, or child by child"
    )
    restarts: bool = Field(False, description="CMA-ES that has converged restarts with twice the population")
    objectives: Literal["groups", "subtasks"] = Field(
        "groups", description="What nsga2 trades off: the mean retention of each group, or that of each subtask"
    )
    method: Annotated[str, OneOf(SEARCHED)] = Field("linear", description="How task vectors are merged (docs/merge.md)")
    parameters: dict[str, float | str] = Field({}, description="Parameters of the method; its defaults for the others")
    genes: dict[str, tuple[float, float]] = Field(
        {}, description="Parameters of the method that the search varies, each with its lowest and highest value"
    )
    mask: bool = Field(False, description="Also search, for every coefficient, whether it counts at all")
    rivals: tuple[Annotated[str, OneOf(RIVALS)], ...] = Field(
        (), description="Other methods whose scale is tuned beside the search; the best of each is among the finalists"
    )
    adapter_rank: int = Field(
        64, ge=1, description="Rank of the unified adapter where the method's merges have no exact one (as ties)"
    )
    stage1_evaluations: int = Field(
        40, ge=1, title="Stage 1 evaluations", description="Candidates per group in stage 1, seeds included, at most"
    )
    stage2_evaluations: int = Field(
        40, ge=1, title="Stage 2 evaluations", description="Candidates in stage 2, seeds included, at most"
    )
    joint_evaluations: int = Field(
        0,
        ge=0,
        title="Joint evaluations",
        description="Candidates of a third search, over all coefficients at once, from where stage 2 ended; 0: none",
    )
    stagnation: int | None = Field(
        None, ge=1, description="A search ends after so many candidates that brought nothing better; empty: its budget"
    )
    minutes: float | None = Field(
        None, gt=0, description="A stage asks for no more after so many minutes; results then depend on the machine"
    )
    blocks: int = Field(1, ge=1, description="Layer blocks with a coefficient of their own")
    bounds: tuple[float, float] = Field((0.0, 1.5), description="Lowest and highest coefficient")
    lambdas: tuple[float, ...] = Field(
        (0.3, 0.5, 0.7, 1.0, 1.3), min_length=1, description="Grid of the task-arithmetic seeds and baseline"
    )
    population: int = Field(6, ge=4, description="Candidates a generation")
    sigma: float = Field(0.15, gt=0, le=1, description="First step size, as a share of the bounds' width")
    fitness: FitnessKind = Field(
        "loglik",
        description="What is kept of each expert: its likelihood of the gold answers, the gold label's share of the "
        "probability of all labels (choice; of tuples, loglik), its metric, or what it expects at its own answers "
        "(agree; needs no labels)",
    )
    blend: dict[FitnessKind, float] = Field({}, description="Weights of kinds of fitness; empty: `fitness` alone")
    shrink: float = Field(0.0, ge=0, description="Penalty on the mean squared coefficient, against over-fitting")
    rungs: tuple[float, ...] = Field(
        (0.15, 0.4),
        description="Shares of the weak rows after which candidates that are clearly worse are stopped; none: no race",
    )
    keep: float = Field(0.3, gt=0, le=1, description="Share of candidates that go on at a rung")
    finalists: int = Field(4, ge=1, description="Best candidates of a search that selection rows decide between")
    lookahead: int = Field(4, ge=1, description="Candidates asked ahead of the last one told; at least the workers")

    @property
    def weights(self) -> dict[str, float]:
        """The weight of each kind of fitness; they add up to 1."""
        kinds = self.blend or {self.fitness: 1.0}
        total = sum(kinds.values())
        return {kind: weight / total for kind, weight in sorted(kinds.items())}

    @property
    def labelled(self) -> bool:
        """Whether the fitness needs labels of the weak rows."""
        return set(self.weights) != {"agree"}

    @model_validator(mode="after")
    def _check(self) -> Self:
        low, high = self.bounds
        if not low < high:
            raise ValueError(f"bounds must rise; got {low}, {high}")
        if not low <= 0 <= 1 <= high:
            raise ValueError(f"bounds must hold 0 (the base) and 1 (an expert); got {low}, {high}")
        outside = [value for value in self.lambdas if not low <= value <= high]
        if outside:
            raise ValueError(f"lambdas must lie within bounds [{low}, {high}]; got {outside[0]}")
        if any(weight <= 0 for weight in self.blend.values()):
            raise ValueError("the weights of a blend must be above 0; leave a kind out instead")
        if list(self.rungs) != sorted(set(self.rungs)) or not all(0 < rung < 1 for rung in self.rungs):
            raise ValueError(f"rungs must be rising shares between 0 and 1; got {list(self.rungs)}")
        if self.update not in STRATEGIES[self.strategy].updates:
            able = " and ".join(name for name, row in STRATEGIES.items() if self.update in row.updates)
            raise ValueError(f"update: {self.update} is for {able}; {self.strategy} has nothing to replace")
        if self.restarts and not STRATEGIES[self.strategy].restarts:
            able = " and ".join(name for name, row in STRATEGIES.items() if row.restarts)
            raise ValueError(f"restarts is for {able}; {self.strategy} does not converge to a point")
        return self
