"""Train one LoRA adapter: answers only, anchored, the trunk's activations computed once, resumed exactly.

An expert pays, beside its own loss, mu * KL(base || expert) at the answer positions of rows from the other subtasks,
so that its task vector acts on its own prompts and leaves the rest alone (weight disentanglement; in the manner of
Yoshida et al. 2025, "Mastering Task Arithmetic: tau-Jp"; the KL form is our own). A finished adapter is anchored by
the same loop: in place of the cross-entropy then stands KL(adapter before || adapter now).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
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
from memmcl.experts import checkpoint, lora
from memmcl.experts.checkpoint import Progressed
from memmcl.experts.objective import cross_entropy, divergence
from memmcl.experts.sampling import Sampler, Turns
from memmcl.experts.settings import Checkpointing, TrainingData, TrainingSettings
from memmcl.experts.trunk import Trunk

STAGE_VERSION = 3


@dataclass(frozen=True)
class TrainedAdapter:
    """A trained adapter and how the training went.

    factors: those of the best validation, or of the last step. loss: mean loss per answer token (nats), by step,
    without the anchor; anchor: mean KL per answer position (nats), None on steps without. tokens: answer and prompt
    tokens that went through the adapted layers. micro_batch: rows run at once, at most. gpu_bytes: the peak.
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
    """The argument of a progress callback, after each step."""

    step: int
    steps: int
    loss: float
    tokens_per_second: float


StepCallback = Callable[[Moved], None]


def train_adapter(
    backbone: Backbone,
    data: TrainingData,
    settings: TrainingSettings,
    *,
    start: Adapter | None = None,
    activations: Activations | None = None,
    checkpointing: Checkpointing | None = None,
    progress: StepCallback | None = None,
) -> TrainedAdapter:
    """Train LoRA on the backbone's top layers, and leave the backbone as it was.

    start: the adapter that training starts from; its modules and ranks replace those of `settings.lora`. activations:
    a cache of the trunk's outputs to share with other trainings. The same data, settings and start give the same bits,
    in one session or many.

    Raises:
        TrainingError: no rows, a target module that no layer has, a loss that is not finite, memory that ran out
            twice, or a checkpoint of another training.
    """
    if not any(data.rows.values()):
        raise TrainingError("expected rows to train on, got none; check data.train_rows and the data source")
    if settings.teacher == "self" and start is None:
        raise TrainingError('teacher "self" distils an adapter into itself: give the adapter as `start`')
    groups = [*data.rows.values(), *data.anchors.values(), *data.validation.values()]
    trunk = Trunk(backbone, activations or Activations(backbone), groups)
    if start is not None:
        lora.check_shape(start, backbone)
        initial = dict(start)
    else:
        initial = lora.initial_factors(backbone, settings.lora, settings.seed, trunk, data.anchors)
    with lora.adapted(backbone, settings.lora, initial) as layers:
        return _Training(backbone, layers, trunk, data, settings).run(checkpointing or Checkpointing(), progress)


class _Training:
    """The training loop and its state; all reference outputs are computed once, before the first step."""

    def __init__(
        self, backbone: Backbone, layers: lora.Layers, trunk: Trunk, data: TrainingData, settings: TrainingSettings
    ) -> None:
        self._backbone = backbone
        self._layers = layers
        self._trunk = trunk
        self._validation = data.validation
        self._dropout = settings.lora.dropout
        self._plan = settings.optimisation
        self._stopping = settings.stopping if any(data.validation.values()) else None
        self._seed = settings.seed
        self._parameters = lora.parameters_of(layers)
        self._optimiser = torch.optim.AdamW(
            self._parameters.values(), lr=self._plan.learning_rate, weight_decay=self._plan.weight_decay, fused=True
        )
        self._best: dict[str, Tensor] = {}
        self._done = Progressed(micro_batch=self._plan.micro_batch)
        pooled = [row for name in sorted(data.rows) for row in data.rows[name]]
        self._sampler = Sampler(pooled, self._plan.batch_size, seeds.derive(self._seed, "rows"))
        self._train_mode(False)
        anchoring = settings.anchoring
        self._anchoring = anchoring if anchoring is not None and anchoring.weight > 0 else None
        self._turns: Turns | None = None
        self._base_outputs: dict[TokenizedRow, Tensor] = {}
        if self._anchoring is not None and any(data.anchors.values()):
            self._turns = Turns(data.anchors, self._anchoring.batch_size, seeds.derive(self._seed, "anchor"))
            with lora.switched_off(layers):
                self._base_outputs = trunk.outputs(data.anchors)
        self._teacher_outputs = trunk.outputs(data.rows) if settings.teacher == "self" else {}

    def run(self, checkpointing: Checkpointing, progress: StepCallback | None) -> TrainedAdapter:
        """Take all steps that are left."""
        if checkpointing.resume is not None:
            self._restore(checkpointing.resume)
        done, steps, stopping = self._done, self._plan.steps, self._stopping
        on_gpu = self._backbone.device.type == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(self._backbone.device)
        started, tokens, earlier = time.perf_counter(), done.tokens, done.seconds
        with self._backbone.recomputing() if self._plan.recompute else nullcontext():
            while done.step < steps and not (stopping and 0 < stopping.patience <= done.validations_since_best):
                self._train_mode(True)
                self._step(done.step)
                self._train_mode(False)
                done.step += 1
                seconds = time.perf_counter() - started
                done.seconds = earlier + seconds
                if stopping is not None and (done.step % stopping.every == 0 or done.step == steps):
                    self._validate()
                if checkpointing.every > 0 and done.step % checkpointing.every == 0 and done.step < steps:
                    checkpointing.save(self._checkpoint())
                if progress is not None:
                    progress(Moved(done.step, steps, done.loss[-1], (done.tokens - tokens) / seconds))
        if done.best_step not in (None, done.step):
            checkpoint.restore(self._best, "best", self._parameters)
        return TrainedAdapter(
            factors=lora.factors_of(self._layers),
            loss=tuple(done.loss),
            anchor=tuple(done.anchor),
            validation=tuple(done.validation),
            best_step=done.best_step,
            stopped_early=done.step < steps,
            parameters=sum(parameter.numel() for parameter in self._parameters.values()),
            tokens=done.tokens,
            seconds=done.seconds,
            micro_batch=self._rows_at_once(),
            gpu_bytes=torch.cuda.max_memory_allocated(self._backbone.device) if on_gpu else None,
        )

    def _step(self, step: int) -> None:
        """Take one step; where memory runs out, halve the rows that are run at once, a single time."""
        values = self._attempt(step)
        if values is None:  # outside the except block, so that nothing refers to the failed step's tensors
            if self._backbone.device.type == "cuda":
                torch.cuda.empty_cache()
            values = self._attempt(step)
        assert values is not None, "a second time raises"
        loss, anchor, tokens = values
        for group in self._optimiser.param_groups:
            group["lr"] = self._plan.learning_rate * self._plan.rate(step)
        norm = torch.nn.utils.clip_grad_norm_(self._parameters.values(), self._plan.clip)
        self._check(float(norm), "gradient", step)
        self._optimiser.step()
        self._done.loss.append(loss)
        self._done.anchor.append(anchor)
        self._done.tokens += tokens

    def _attempt(self, step: int) -> tuple[float, float | None, int] | None:
        """Return what `_gradients` returns; None where memory ran out, with a smaller micro-batch set."""
        try:
            return self._gradients(step)
        except RuntimeError as error:
            if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
                raise
            at_once = self._rows_at_once()
            if self._done.micro_batch != self._plan.micro_batch or at_once == 1:
                raise TrainingError(
                    f"memory ran out with {at_once} rows at once; lower experts.micro_batch_size or "
                    "data.max_prompt_tokens, adapt fewer layers, or set experts.gradient_checkpointing"
                ) from error
            self._done.micro_batch = max(1, at_once // 2)
            return None

    def _rows_at_once(self) -> int:
        """Return how many rows run at once at most; an anchor's batch may be the larger one."""
        largest = max(self._plan.batch_size, self._anchoring.batch_size if self._anchoring is not None else 0)
        return min(self._done.micro_batch or largest, largest)

    def _gradients(self, step: int) -> tuple[float, float | None, int]:
        """Leave the step's gradient in the parameters; return its loss, its anchor and the tokens that were run."""
        self._optimiser.zero_grad()
        loss, tokens = self._add(self._sampler.batch(step), self._teacher_outputs, 1.0, step, "loss")
        turn = self._anchoring.turn(step, self._plan.steps) if self._anchoring is not None else None
        if turn is None or self._turns is None or self._anchoring is None:
            return loss, None, tokens
        weight = self._anchoring.weight * self._anchoring.every
        anchor, more = self._add(self._turns.batch(turn), self._base_outputs, weight, step, "anchor")
        return loss, anchor, tokens + more

    def _add(
        self, rows: Sequence[TokenizedRow], targets: Mapping[TokenizedRow, Tensor], weight: float, step: int, what: str
    ) -> tuple[float, int]:
        """Add the gradient of weight * the mean loss per answer token of `rows`; return the mean and the tokens run.

        targets: each row's outputs to stay close to by KL; empty: cross-entropy of the answers. Micro-batches run
        backward one by one: gradients add up, and only one micro-batch's activations live at a time.
        """
        answers = sum(len(row.continuations[0]) for row in rows)
        size = self._done.micro_batch or len(rows)
        total, tokens = 0.0, 0
        project, matrix = self._backbone.logits, self._backbone.output_weight
        for number, start in enumerate(range(0, len(rows), size)):
            micro_batch = rows[start : start + size]
            hidden, batch = self._trunk.packed(micro_batch)
            with self._random(step, what, number):
                outputs = self._backbone.top(hidden, batch)
            if targets:
                reference = torch.cat([targets[row] for row in micro_batch])
                loss = divergence(outputs, reference, project, matrix) / answers
            else:
                loss = cross_entropy(outputs, batch.targets, project, matrix) / answers
            total += float(loss.detach())
            self._check(total, what, step)
            (weight * loss).backward()  # type: ignore[no-untyped-call]
            tokens += int(batch.lengths)
        return total, tokens

    @contextmanager
    def _random(self, step: int, what: str, number: int) -> Iterator[None]:
        """Within the block, dropout draws from a seed of this step's; the global generators are as before after it."""
        if self._dropout == 0:
            yield
            return
        device = self._backbone.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seeds.derive(self._seed, "dropout", what, step, number))
            yield

    def _train_mode(self, on: bool) -> None:
        for layer in self._layers.values():
            layer.lora_dropout[lora.ADAPTER].train(on)

    @torch.no_grad()
    def _validate(self) -> None:
        """Measure the mean cross-entropy per answer token of the validation rows; remember the best adapter."""
        total, answers = 0.0, 0
        for row, outputs in self._trunk.outputs(self._validation).items():
            targets = torch.tensor(row.continuations[0], device=outputs.device)
            loss = cross_entropy(outputs, targets, self._backbone.logits, self._backbone.output_weight)
            total, answers = total + float(loss), answers + len(targets)
        self._check(total, "validation loss", self._done.step - 1)
        self._done.validation.append((self._done.step, total / answers))
        if self._done.best_step == self._done.step:
            self._best = {f"best.{name}": value.detach().clone() for name, value in self._parameters.items()}

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
        device, state = self._backbone.device, self._optimiser.state
        for parameter in self._parameters.values():
            state[parameter]["step"] = torch.tensor(float(self._done.step), device=device)
        for key in ("exp_avg", "exp_avg_sq"):
            for parameter in self._parameters.values():
                state[parameter][key] = torch.zeros_like(parameter)
            checkpoint.restore(tensors, key, {name: state[value][key] for name, value in self._parameters.items()})
        self._best = {name: tensor.to(device) for name, tensor in tensors.items() if name.startswith("best.")}
