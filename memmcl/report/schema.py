"""The sections of a results document, `memmcl.report.results.Results`.

Numbers that may be missing are `None`; NaN and infinities become `None`, because JSON has no form for them.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict
from pydantic.types import AwareDatetime, FiniteFloat, JsonValue, NonNegativeFloat, NonNegativeInt


def _finite_or_none(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


FiniteOrNone = Annotated[float | None, BeforeValidator(_finite_or_none)]
"""A number, or None where there is none; NaN and infinities become None."""

ModelKind = Literal["baseline", "expert", "merge", "unified", "rival"]

BASE = "base"  # the name of the untouched base, as a model and as a row of the interference

RIVALS = ("joint", "weak")
"""rivals of a merge: one LoRA on the train rows of all subtasks, one on their pooled weak rows"""


class Section(BaseModel):
    """Base of all sections: frozen, no unknown keys; the docstring under a field is its description."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class BaseInfo(Section):
    name: str
    digest: str
    """sha256 of the weights"""
    licence: str


class Hardware(Section):
    cpus: NonNegativeInt
    memory_gb: NonNegativeFloat | None = None
    device: str


class RunInfo(Section):
    run_id: str
    name: str
    created: AwareDatetime
    command: str
    seed: int
    base: BaseInfo
    versions: dict[str, str]
    hardware: Hardware
    flow_run_id: str | None = None
    store_url: str
    config: dict[str, JsonValue]


class RowCounts(Section):
    train: NonNegativeInt
    weak: NonNegativeInt
    selection: NonNegativeInt
    test: NonNegativeInt


class SamplePrompt(Section):
    prompt: str
    answer: str


class SubtaskInfo(Section):
    name: str
    group: str
    title: str
    metric: str
    labels: tuple[str, ...] = ()
    """empty for tuple subtasks"""
    rows: RowCounts
    difficulty: FiniteOrNone = None
    example: SamplePrompt | None = None
    """one prompt as the model sees it and its gold answer; shown in the report and the model card"""


class Model(Section):
    name: str
    """short; "base" names the untouched base model"""
    title: str
    kind: ModelKind
    """expert: each expert on its own subtask, the ceiling; rival: trained another way at equal budget"""
    description: str = ""


class SubtaskScore(Section):
    """One model on the test rows of one subtask."""

    model: str
    subtask: str
    context: str
    metric: str
    score: FiniteFloat
    se: NonNegativeFloat
    """bootstrap standard error over rows"""
    n: NonNegativeInt
    balanced_accuracy: FiniteOrNone = None
    rejected: NonNegativeInt = 0
    """answers that could not be parsed"""
    strict_score: FiniteOrNone = None
    """tuple subtasks: the score without tolerant parsing"""


class Mean(Section):
    model: str
    mean: FiniteFloat
    """over subtasks"""
    se: NonNegativeFloat


class Comparison(Section):
    """Mean score of `a` minus mean score of `b`, paired on test rows."""

    a: str
    b: str
    difference: FiniteFloat
    se: NonNegativeFloat
    p: FiniteOrNone = None
    n: NonNegativeInt


class Retention(Section):
    """What a merged model keeps of one subtask's expert, on the test rows."""

    subtask: str
    model: str = "unified"
    retention: FiniteOrNone = None
    """merged / expert"""
    nai: FiniteOrNone = None
    """(merged - base) / (expert - base)"""


class Interference(Section):
    """The base, or one unmerged expert, on the test rows of any subtask."""

    expert: str
    """the subtask of the expert; "base" for the untouched base"""
    subtask: str
    score: FiniteFloat
    se: NonNegativeFloat
    n: NonNegativeInt
    """test rows; a cap may make them fewer than those of the scores"""


class VectorPair(Section):
    """The experts' task vectors in one layer, or in all together, in the order of `TaskVectors.experts`."""

    layer: NonNegativeInt | None = None
    """None: all layers"""
    norms: tuple[FiniteOrNone, ...]
    """Frobenius norm of each expert's task vector"""
    cosines: tuple[tuple[FiniteOrNone, ...], ...]
    """experts x experts; None where one of the two is zero"""
    conflict: FiniteOrNone = None
    """share of pairs of experts, over all entries where both are non-zero, that differ in sign"""
    cancelled: FiniteOrNone = None
    """share of the summed magnitude of all entries that cancels in the plain sum of all experts"""

    @property
    def mean_cosine(self) -> float | None:
        """Over all pairs of experts."""
        pairs = [value for place, row in enumerate(self.cosines) for value in row[:place] if value is not None]
        return sum(pairs) / len(pairs) if pairs else None


class TaskVectors(Section):
    """How the experts' task vectors relate, at the coefficient 1 and without the warm start."""

    experts: tuple[str, ...]
    overall: VectorPair
    layers: tuple[VectorPair, ...]


class CandidateSeconds(Section):
    merge: NonNegativeFloat = 0.0
    evaluate: NonNegativeFloat = 0.0
    wait: NonNegativeFloat = 0.0


class CandidateResult(Section):
    index: NonNegativeInt
    """position in ask order"""
    origin: str
    """where the genome came from: "seed:<name>" (evaluated first), or operator and generation ("bayesian:g3")"""
    parents: tuple[NonNegativeInt, ...] = ()
    """candidates that it descends from"""
    genome: tuple[FiniteFloat, ...]
    fitness: FiniteOrNone = None
    """None: the candidate failed"""
    values: dict[str, FiniteOrNone] = {}
    """retention by subtask"""
    objectives: tuple[FiniteOrNone, ...] = ()
    """in the order of `Search.objectives`; empty for one that failed, or where fitness alone counts"""
    seconds: CandidateSeconds = CandidateSeconds()
    rows: NonNegativeInt | None = None
    """weak rows that it was scored on"""
    stopped: bool = False
    """stopped early by the race: its fitness is an estimate from the first rows"""
    reused: bool = False
    """taken from the fitness cache"""

    @property
    def is_seed(self) -> bool:
        return self.origin.startswith("seed:")


class FinalistResult(Section):
    """A merge that might have been the winner."""

    title: str
    fitness: FiniteOrNone = None
    """on the weak rows"""
    selection: FiniteOrNone = None
    """on the selection rows, which decide; None where there are none and the weak rows do"""
    wins: bool = False


class SearchResult(Section):
    stage: Literal["stage1", "stage2", "joint"]
    group: str | None = None
    strategy: str
    genes: tuple[str, ...]
    candidates: tuple[CandidateResult, ...]
    winner: NonNegativeInt | None = None
    """index of the winning candidate; None when another search's won"""
    finalists: tuple[FinalistResult, ...] = ()
    objectives: tuple[str, ...] = ()
    """what a multi-objective search trades off; the winner is the point of the front with the highest mean"""
    seconds: NonNegativeFloat
    lookahead: NonNegativeInt
    workers: NonNegativeInt

    @property
    def title(self) -> str:
        titles = {"stage1": f"Stage 1, {self.group or 'all'}", "stage2": "Stage 2, unified", "joint": "Joint search"}
        return titles[self.stage]


class MergeInfo(Section):
    method: str
    experts: tuple[str, ...]
    blocks: tuple[str, ...]
    coefficients: tuple[tuple[FiniteFloat, ...], ...]
    """experts x blocks, the product of both stages"""
    adapted_layers: tuple[int, ...] = ()
    lambda_task_arithmetic: FiniteOrNone = None


class ValidationPoint(Section):
    step: NonNegativeInt
    """steps done when it was measured"""
    loss: FiniteOrNone


class ExpertResult(Section):
    """One training: of an expert, of a rival, or of the warm start."""

    subtask: str
    """a subtask; or "joint" or "weak", the rivals; or "warm", the warm start of all experts"""
    loss: tuple[FiniteOrNone, ...]
    """one per step"""
    anchor: tuple[FiniteOrNone, ...] = ()
    """KL(base || expert), one per step, None where a step had no anchor; empty without anchor"""
    anchor_every: NonNegativeInt = 1
    """steps from one anchor to the next"""
    validation: tuple[ValidationPoint, ...] = ()
    steps: NonNegativeInt
    best_step: NonNegativeInt | None = None
    """the step whose weights were kept; None: the last"""
    stopped_early: bool = False
    batch_size: NonNegativeInt
    rows_per_micro_batch: NonNegativeInt | None = None
    """rows at once; fewer than `batch_size` where gradients were accumulated or memory ran out"""
    rank: NonNegativeInt
    learning_rate: NonNegativeFloat
    seconds: NonNegativeFloat
    trainable_parameters: NonNegativeInt
    weak_score: FiniteOrNone = None
    base_weak_score: FiniteOrNone = None
    constant_weak_score: FiniteOrNone = None
    """the best constant answer on the same weak rows"""
    tokens_per_second: FiniteOrNone = None
    gpu_memory_gb: FiniteOrNone = None
    """at the peak"""


class Feature(Section):
    subtask: str
    feature: str
    raw: FiniteFloat
    scaled: FiniteFloat
    """scaled to [0, 1] over the suite"""


class ContextResult(Section):
    """One context of one subtask with the unified model; the gate reads the weak scores alone."""

    subtask: str
    context: str
    tokens: NonNegativeInt
    demonstrations: NonNegativeInt
    weak_score: FiniteOrNone = None
    weak_score_calibrated: FiniteOrNone = None
    test_score: FiniteOrNone = None
    test_se: FiniteOrNone = None
    chosen: bool
    calibrated: bool
    """whether the test score uses calibrated label scores"""


class Curriculum(Section):
    weights: dict[str, float] = {}
    order: tuple[str, ...] = ()
    """subtasks in ascending difficulty"""
    features: tuple[Feature, ...] = ()
    contexts: tuple[ContextResult, ...] = ()


class Timing(Section):
    stage: str
    name: str
    seconds: NonNegativeFloat


class Data(Section):
    source: str
    dropped: dict[str, NonNegativeInt] = {}
    """rows left out, by reason"""
    digests: dict[str, dict[str, str]] = {}
    """subtask -> split -> sha256"""
