"""Train one LoRA adapter: answers only, anchored, the trunk's activations computed once, resumed exactly.

An expert pays, beside its own loss, mu * KL(base || expert) at the answer positions of rows from the other subtasks,
so that its task vector acts on its own prompts and leaves the rest alone (weight disentanglement; in the manner of
Yoshida et al. 2025, "Mastering Task Arithmetic: tau-Jp"; the KL form is our own). A finished adapter is anchored after
the fact by the same loop: its own loss is then KL(itself before || itself now).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from memmcl import seeds
from memmcl.adapters.format import Adapter, Factors
from memmcl.backbone.activations import Activations
from memmcl.backbone.batches import TokenizedRow
from memmcl.backbone.forward import Backbone
from memmcl.errors import TrainingError
from memmcl.experts import checkpoint
from memmcl.experts.checkpoint import Progressed
from memmcl.experts.lora import (
    ADAPTER,
    Layers,
    adapted,
    check_shape,
    factors_of,
    initial_factors,
    parameters_of,
    switched_off,
)
from memmcl.experts.objective import cross_entropy, divergence
from memmcl.experts.sampling import Sampler, Turns
from memmcl.experts.settings import Anchoring, LoraShape, Optimisation, Stopping, Teacher
from memmcl.experts.trunk import Trunk

STAGE_VERSION = 3
RowsBySubtask = Mapping[str, Sequence[TokenizedRow]]
"""Rows by subtask: those of a subtask share their instruction."""


@dataclass(frozen=True)
class TrainedAdapter:
    """A trained adapter and how the training went.

    factors: those of the best look at the validation rows, or of the last step. loss: mean own loss per answer token
    (nats), by step; anchor: mean KL per answer position (nats), None on steps without. tokens: answer and prompt tokens
    that went through the adapted layers. micro_batch: rows run at once, at most. gpu_bytes: the most that the GPU held.
    """

    factors: dict[str, Factors]
    loss: tuple[float, ...]
    anchor: tuple[float | None, ...]
    validation: tuple[tuple[int, float], ...]
    best_step: int | None
    stopped_early: bool
    parameters: int
    tokens: int
    seconds: float
    micro_batch: int
    gpu_bytes: int | None


class Moved(NamedTuple):
    """What a progress callback is told after each step."""

    step: int
    steps: int
    loss: float
    tokens_per_second: float


StepCallback = Callable[[Moved], None]
Save = Callable[[bytes], None]


def train_adapter(
    backbone: Backbone,
    rows: RowsBySubtask,
    anchors: RowsBySubtask,
    *,
    lora: LoraShape,
    optimisation: Optimisation,
    anchoring: Anchoring | None,
    seed: int,
    activations: Activations | None = None,
    validation: RowsBySubtask | None = None,
    stopping: Stopping | None = None,
    start: Adapter | None = None,
    teacher: Teacher = "gold",
    save: Save | None = None,
    save_every: int = 0,
    resume: bytes | None = None,
    progress: StepCallback | None = None,
) -> TrainedAdapter:
    """Train LoRA on the backbone's top layers, and leave the backbone as it was.

    rows, validation: one continuation each, the answer with its end token. anchors: rows of other subtasks, their
    continuation forced text only. start: the adapter that training starts from; its modules and ranks replace those of
    `lora`. teacher: "gold" learns the continuations, "self" holds to the outputs of `start` at their positions.
    save: is given a checkpoint after every `save_every` steps; resume: such a checkpoint, to go on from. The same
    arguments give the same bits, in one session or many.

    Raises:
        TrainingError: no rows, a target module that no layer has, a loss that is not finite, memory that ran out
            twice, or a checkpoint of another training.
    """
    if not any(rows.values()):
        raise TrainingError("expected rows to train on, got none; check data.train_rows and the data source")
    if teacher == "self" and start is None:
        raise TrainingError('teacher "self" holds an adapter to itself: give the adapter as `start`')
    trunk = Trunk(
        backbone,
        activations or Activations(backbone),
        [*rows.values(), *anchors.values(), *(validation or {}).values()],
    )
    if start is not None:
        check_shape(start, backbone)
    initial = dict(start) if start is not None else initial_factors(backbone, lora, seed, trunk, anchors)
    with adapted(backbone, lora, initial) as layers:
        training = _Training(backbone, layers, trunk, lora, optimisation, anchoring, seed)
        training.prepare(rows, anchors, teacher)
        return training.run(validation or {}, stopping, save, save_every, resume, progress)


class _Training:
    """The loop and what it holds."""

    def __init__(
        self,
        backbone: Backbone,
        layers: Layers,
        trunk: Trunk,
        lora: LoraShape,
        optimisation: Optimisation,
        anchoring: Anchoring | None,
        seed: int,
    ) -> None:
        self._backbone = backbone
        self._layers = layers
        self._trunk = trunk
        self._dropout = lora.dropout
        self._plan = optimisation
        self._anchoring = anchoring if anchoring is not None and anchoring.weight > 0 else None
        self._seed = seed
        self._parameters = parameters_of(layers)
        self._optimiser = torch.optim.AdamW(
            self._parameters.values(), lr=optimisation.learning_rate, weight_decay=optimisation.weight_decay, fused=True
        )
        self._best: dict[str, Tensor] = {}
        self._own: dict[TokenizedRow, Tensor] = {}
        self._base: dict[TokenizedRow, Tensor] = {}
        self._done = Progressed(micro_batch=optimisation.micro_batch)

    def prepare(self, rows: RowsBySubtask, anchors: RowsBySubtask, teacher: Teacher) -> None:
        """Compute what rows are held to: the base's outputs at anchors, the adapter's own at its own prompts."""
        pooled = [row for name in sorted(rows) for row in rows[name]]
        self._sampler = Sampler(pooled, self._plan.batch_size, seeds.derive(self._seed, "rows"))
        self._turns: Turns | None = None
        self._train_mode(False)
        if self._anchoring is not None and any(anchors.values()):
            self._turns = Turns(anchors, self._anchoring.batch_size, seeds.derive(self._seed, "anchor"))
            with switched_off(self._layers):
                self._base = self._trunk.outputs(anchors)
        if teacher == "self":
            self._own = self._trunk.outputs(rows)

    def run(
        self,
        validation: RowsBySubtask,
        stopping: Stopping | None,
        save: Save | None,
        save_every: int,
        resume: bytes | None,
        progress: StepCallback | None,
    ) -> TrainedAdapter:
        """Take all steps that are left."""
        if resume is not None:
            self._restore(resume)
        done, steps = self._done, self._plan.steps
        on_gpu = self._backbone.device.type == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(self._backbone.device)
        session, tokens = time.perf_counter(), done.tokens
        earlier = done.seconds
        looking = stopping if stopping is not None and any(validation.values()) else None
        with ExitStack() as stack:
            if self._plan.recompute:
                stack.enter_context(self._backbone.recomputing())
            while done.step < steps and not self._stopped(looking):
                self._train_mode(True)
                self._step(done.step)
                self._train_mode(False)
                done.step += 1
                seconds = time.perf_counter() - session
                done.seconds = earlier + seconds
                if looking is not None and (done.step % looking.every == 0 or done.step == steps):
                    self._look(validation)
                if save is not None and save_every > 0 and done.step % save_every == 0 and done.step < steps:
                    save(self._checkpoint())
                if progress is not None:
                    progress(Moved(done.step, steps, done.loss[-1], (done.tokens - tokens) / seconds))
        stopped = done.step < steps
        if done.best_step not in (None, done.step):
            checkpoint.restore(self._best, "best", self._parameters)
        return TrainedAdapter(
            factors=factors_of(self._layers),
            loss=tuple(done.loss),
            anchor=tuple(done.anchor),
            validation=tuple(done.validation),
            best_step=done.best_step,
            stopped_early=stopped,
            parameters=sum(parameter.numel() for parameter in self._parameters.values()),
            tokens=done.tokens,
            seconds=done.seconds,
            micro_batch=self._rows_at_once(),
            gpu_bytes=torch.cuda.max_memory_allocated(self._backbone.device) if on_gpu else None,
        )

    def _step(self, step: int) -> None:
        """Take one step; where memory runs out, halve the rows that are run at once, a single time."""
        values = self._attempt(step)
        if values is None:  # here, where nothing holds what did not fit any more
            if self._backbone.device.type == "cuda":
                torch.cuda.empty_cache()
            values = self._attempt(step)
        assert values is not None, "a second time is an error"
        loss, anchor, tokens = values
        for group in self._optimiser.param_groups:
            group["lr"] = self._plan.learning_rate * rate(self._plan, step)
        norm = torch.nn.utils.clip_grad_norm_(self._parameters.values(), self._plan.clip)
        self._check(float(norm), "gradient", step)
        self._optimiser.step()
        self._done.loss.append(loss)
        self._done.anchor.append(anchor)
        self._done.tokens += tokens

    def _attempt(self, step: int) -> tuple[float, float | None, int] | None:
        """Return what `_gradients` returns; None where memory ran out, and fewer rows shall be run at once."""
        try:
            return self._gradients(step)
        except RuntimeError as error:
            self._done.micro_batch = self._smaller_batch(error)
            return None

    def _smaller_batch(self, error: RuntimeError) -> int:
        out_of_memory = isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
        if not out_of_memory:
            raise error
        at_once = self._rows_at_once()
        if self._done.micro_batch != self._plan.micro_batch or at_once == 1:
            raise TrainingError(
                f"memory ran out with {at_once} rows at once; lower experts.micro_batch_size or "
                "data.max_prompt_tokens, adapt fewer layers, or set experts.gradient_checkpointing"
            ) from error
        return max(1, at_once // 2)

    def _rows_at_once(self) -> int:
        """Return how many rows run at once at most; anchors may come in larger batches than own rows."""
        largest = max(self._plan.batch_size, self._anchoring.batch_size if self._anchoring is not None else 0)
        return min(self._done.micro_batch or largest, largest)

    def _gradients(self, step: int) -> tuple[float, float | None, int]:
        """Leave the step's gradient in the parameters; return own loss, anchor, tokens that were run."""
        self._optimiser.zero_grad()
        loss, tokens = self._add(self._sampler.batch(step), self._own, 1.0, step, "loss")
        anchor, turn = None, None
        if self._turns is not None and self._anchoring is not None:
            turn = self._anchoring.turn(step, self._plan.steps)
        if turn is not None:
            assert self._turns is not None
            assert self._anchoring is not None
            weight = self._anchoring.weight * self._anchoring.every
            anchor, more = self._add(self._turns.batch(turn), self._base, weight, step, "anchor")
            tokens += more
        return loss, anchor, tokens

    def _add(
        self, rows: Sequence[TokenizedRow], held_to: Mapping[TokenizedRow, Tensor], weight: float, step: int, what: str
    ) -> tuple[float, int]:
        """Add the gradient of weight * the mean loss per answer token of `rows`; return the mean and the tokens run.

        Parts run backward one by one: gradients add up, and only one part's activations live at a time.
        """
        answers = sum(len(row.continuations[0]) for row in rows)
        size = self._done.micro_batch or len(rows)
        total, tokens = 0.0, 0
        project, matrix = self._backbone.logits, self._backbone.output_weight
        for number, start in enumerate(range(0, len(rows), size)):
            part = rows[start : start + size]
            hidden, batch = self._trunk.packed(part)
            with self._random(step, what, number):
                outputs = self._backbone.top(hidden, batch)
            if held_to:
                reference = torch.cat([held_to[row] for row in part])
                loss = divergence(outputs, reference, project, matrix) / answers
            else:
                loss = cross_entropy(outputs, batch.targets, project, matrix) / answers
            total += float(loss.detach())
            self._check(total, what, step)
            (weight * loss).backward()  # type: ignore[no-untyped-call]
            tokens += int(batch.lengths)
        return total, tokens

    def _random(self, step: int, what: str, number: int) -> ExitStack:
        """Seed what dropout draws from by the step alone, and give the global generators back as they were."""
        stack = ExitStack()
        if self._dropout > 0:
            device = self._backbone.device
            stack.enter_context(torch.random.fork_rng(devices=[device] if device.type == "cuda" else []))
            torch.manual_seed(seeds.derive(self._seed, "dropout", what, step, number))
        return stack

    def _train_mode(self, on: bool) -> None:
        for layer in self._layers.values():
            layer.lora_dropout[ADAPTER].train(on)

    @torch.no_grad()
    def _look(self, validation: RowsBySubtask) -> None:
        """Measure the mean cross-entropy per answer token of the validation rows; remember the best adapter."""
        total, answers = 0.0, 0
        for row, outputs in self._trunk.outputs(validation).items():
            targets = torch.tensor(row.continuations[0], device=outputs.device)
            loss = cross_entropy(outputs, targets, self._backbone.logits, self._backbone.output_weight)
            total, answers = total + float(loss), answers + len(targets)
        self._check(total, "validation loss", self._done.step - 1)
        self._done.validation.append((self._done.step, total / answers))
        if self._done.best_step == self._done.step:
            self._best = {f"best.{name}": value.detach().clone() for name, value in self._parameters.items()}

    def _stopped(self, stopping: Stopping | None) -> bool:
        return stopping is not None and 0 < stopping.patience <= self._done.looks_since_best

    def _check(self, value: float, what: str, step: int) -> None:
        if not math.isfinite(value):
            raise TrainingError(
                f"the {what} became {value} at step {step + 1} of {self._plan.steps}; "
                "lower experts.learning_rate, or look for broken rows or weights"
            )

    def _checkpoint(self) -> bytes:
        tensors = {f"adapter.{name}": value for name, value in self._parameters.items()} | self._best
        for name, parameter in self._parameters.items():
            for key in ("exp_avg", "exp_avg_sq"):
                tensors[f"{key}.{name}"] = self._optimiser.state[parameter][key]
        return checkpoint.encode(self._done, tensors)

    def _restore(self, data: bytes) -> None:
        self._done, tensors = checkpoint.decode(data)
        checkpoint.restore(tensors, "adapter", self._parameters)
        for key in ("exp_avg", "exp_avg_sq"):
            moments = {name: torch.zeros_like(value) for name, value in self._parameters.items()}
            checkpoint.restore(tensors, key, moments)
            for name, parameter in self._parameters.items():
                self._optimiser.state[parameter][key] = moments[name]
        for parameter in self._parameters.values():
            step = torch.tensor(float(self._done.step), device=parameter.device)
            self._optimiser.state[parameter]["step"] = step
        self._best = {
            name: tensor.to(self._backbone.device) for name, tensor in tensors.items() if name.startswith("best.")
        }


def rate(plan: Optimisation, step: int) -> float:
    """Return the share of the peak rate at a step (0, 1, ...): a linear rise, then the curve."""
    rising = max(1, round(plan.steps * plan.warmup))
    if step < rising:
        return (step + 1) / rising
    left = 1 - (step - rising) / max(1, plan.steps - rising)
    return {"cosine": 0.5 * (1 - math.cos(math.pi * left)), "linear": left, "constant": 1.0}[plan.curve]
