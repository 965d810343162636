"""Anchoring a finished LoRA adapter: it stays itself, and no longer works against the experts of other subtasks."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from memmcl import seeds
from memmcl.adapters.format import CONFIG_FILE, WEIGHTS_FILE, files_like
from memmcl.adapters.load import read_adapter, read_folder
from memmcl.api.notebook import html_table
from memmcl.backbone.forward import Backbone
from memmcl.backbone.load import BaseRef, load_base, load_tokenizer, read_layers, resolve_base, resolve_dtype
from memmcl.config import DataConfig
from memmcl.errors import ModelError, UsageError, shown
from memmcl.experts import after, train
from memmcl.experts.forced import OWN_SHARES, PLACE, TemplatePrompter, TextSplit, forced_rows, split_texts
from memmcl.experts.settings import Anchoring, Optimisation
from memmcl.experts.train import StepCallback
from memmcl.files.folder import made_before, new_folder, put, seal
from memmcl.merge.build import lowest_layer
from memmcl.suite.prompts import Prompter
from memmcl.suite.subtasks import SUBTASKS, Subtask

ALL = "all"
DEFAULT_OTHERS: tuple[str, ...] = DataConfig.model_fields["subtasks"].default
Say = Callable[[str], None]


@dataclass(frozen=True)
class AnchorSettings:
    """How an adapter is anchored.

    steps: of the optimiser. weight: mu in mu * KL(base || adapter). batch_size: rows a step of its own subtask, and as
    many of another. learning_rate: the peak of AdamW. every: one step in so many has the KL term, with a weight as many
    times larger. rows: texts for each other subtask, at most; its own prompts get four times as many.
    max_prompt_tokens: a longer text is cut at its end.
    """

    steps: int = 60
    weight: float = 1.0
    batch_size: int = 8
    learning_rate: float = 5e-4
    every: int = 1
    rows: int = 32
    seed: int = 0
    dtype: str = "auto"
    max_prompt_tokens: int = 192

    def __post_init__(self) -> None:
        for name in ("weight", "learning_rate"):
            value = getattr(self, name)
            if not 0 < value < float("inf"):
                raise UsageError(f"{name} must be a number above 0, got {value:g}; leave it out for the default")


@dataclass(frozen=True)
class AnchoredExpert:
    """An adapter that is to be anchored; `save` does it and writes the result. Of subtask and template one is None."""

    base: BaseRef
    files: Mapping[str, bytes]
    texts: Sequence[str]
    subtask: Subtask | None
    template: str | None
    others: Sequence[Subtask]
    dealt: TextSplit
    settings: AnchorSettings
    device: str = "auto"

    def provenance(self) -> dict[str, Any]:
        """Return all that decides the result, as plain values and digests."""
        own = self.template if self.subtask is None else asdict(self.subtask)
        return {
            "base": {"name": self.base.name, "digest": self.base.digest},
            "adapter": {name: hashlib.sha256(data).hexdigest() for name, data in self.files.items()},
            "texts": {"count": len(self.texts), "digest": seeds.digest(list(self.texts))},
            "own": None if self.subtask is None else self.subtask.name,
            "others": [other.name for other in self.others],
            "prompts": seeds.digest([own, *(asdict(other) for other in self.others)]),
            "settings": asdict(self.settings),
            "versions": [after.STAGE_VERSION, train.STAGE_VERSION],
        }

    def saved(self, folder: str | Path) -> dict[str, Any] | None:
        """Return the record of a folder that the same was saved to; None for one that is new or empty.

        Raises:
            UsageError: something else is there.
        """
        return made_before(Path(folder).absolute(), after.RECORD, self.provenance())

    def save(
        self, folder: str | Path, *, progress: StepCallback = lambda moved: None, say: Say = lambda words: None
    ) -> dict[str, Any]:
        """Anchor the adapter and write it into a new or empty folder, as PEFT reads it; return its record.

        The record holds, under "kl", the mean KL in nats per answer token before and after, on texts held out.
        progress: called with every step. say: called with how the texts were dealt.

        Raises:
            MemmclError: the adapter or the base cannot be used, or the disk refuses.
        """
        earlier = self.saved(folder)
        if earlier is not None:
            return earlier
        with new_folder(Path(folder).absolute()) as scratch:
            anchored, files = self._anchor(progress, say)
            for name, data in files.items():
                put(scratch, name, data)
            kl = {"before": asdict(anchored.before), "after": asdict(anchored.after)}
            facts = {"made_from": self.provenance(), "held_out": len(self.dealt.held_out), "kl": kl}
            return seal(scratch, after.RECORD, facts)

    def _anchor(self, progress: StepCallback, say: Say) -> tuple[after.Anchored, dict[str, bytes]]:
        cfg, dealt = self.settings, self.dealt
        try:
            factors = read_adapter(weights=self.files[WEIGHTS_FILE], config=self.files[CONFIG_FILE])
        except ModelError as error:
            raise ModelError(f"adapter: {error}") from error
        lowest, layers = lowest_layer([factors]), read_layers(self.base)
        if lowest >= layers:
            raise ModelError(
                f"adapter: it changes layer {lowest}, this base has {layers} layers; was it trained on another?"
            )
        device = _device(self.device)
        say(
            f"{len(dealt.own)} for its own prompts, {len(dealt.own) // OWN_SHARES} for each of {len(dealt.others)} "
            f"other subtasks, {len(dealt.held_out)} held out"
        )
        tokenizer = load_tokenizer(self.base)
        model = load_base(self.base, resolve_dtype(cfg.dtype, device), device)
        backbone = Backbone(model, pad=tokenizer.pad_token_id or 0, split=lowest)
        prompter = Prompter(tokenizer, cfg.max_prompt_tokens)
        prompts = self._own_prompts(tokenizer, prompter)
        for other in self.others:
            prompter.check(other)
        own = after.answered_rows(backbone, factors, prompts, end=tokenizer.eos_token_id)
        cut, held_out = len(dealt.own), dict.fromkeys(dealt.others, dealt.held_out)
        anchored = after.anchor_adapter(
            backbone,
            factors,
            *(
                after.AnchoringRows(rows, after.anchor_rows(prompter, self.others, texts, cfg.seed))
                for rows, texts in ((own[:cut], dealt.others), (own[cut:], held_out))
            ),
            optimisation=Optimisation(cfg.steps, cfg.batch_size, cfg.learning_rate),
            anchoring=Anchoring(cfg.weight, cfg.batch_size, cfg.every),
            seed=cfg.seed,
            progress=progress,
        )
        return anchored, files_like(self.files[CONFIG_FILE], anchored.trained.factors, self.base.name)

    def _own_prompts(self, tokenizer: Any, prompter: Prompter) -> list[tuple[int, ...]]:
        """Return the adapter's own prompts: those to train on, then those that are held out."""
        texts = [*self.dealt.own, *self.dealt.held_out]
        if self.subtask is None:
            assert self.template is not None
            return TemplatePrompter(tokenizer, self.settings.max_prompt_tokens, self.template).prompts(texts)
        prompter.check(self.subtask)
        return [prompter.prompt(self.subtask, row) for row in forced_rows(self.subtask, texts, self.settings.seed)]

    def __repr__(self) -> str:
        own = "its own prompt" if self.subtask is None else self.subtask.name
        return f"AnchoredExpert({own} on {self.base.name}, against {len(self.others)} other subtasks)"

    def _repr_html_(self) -> str:
        rows = [("base", self.base.name), ("texts", len(self.texts)), *asdict(self.settings).items()]
        return html_table(("setting", "value"), rows, caption=repr(self))


def anchor_expert(
    base: str,
    adapter: str | Path,
    texts: Sequence[str],
    *,
    subtask: str | None = None,
    template: str | None = None,
    others: Sequence[str] | None = None,
    settings: AnchorSettings | None = None,
    device: str = "auto",
) -> AnchoredExpert:
    """Disentangle a finished LoRA adapter, from unlabelled texts alone, so that it can be added to others.

    It stays close to itself on its own prompts, and to the base on those of other subtasks (ours; docs/method.md).
    Ranks, modules and scales stay as they are.

    Args:
        base: hub id, directory, GGUF file, or pypi:NAME of the base model.
        adapter: folder of the adapter, as PEFT saves it.
        texts: unlabelled texts, best of the kind that the adapter is for.
        subtask: the adapter's own subtask in the catalogue; or:
        template: its own prompt, to the last character, with {text} where the text goes.
        others: subtasks on which it shall be like the base, or ["all"]; None: the six of the defaults, less its own.
        settings: of the optimiser and the anchor.
        device: auto, cpu or cuda.

    Raises:
        MemmclError: arguments that do not go together, or an adapter or base that cannot be read.
    """
    if (subtask is None) == (template is None):
        raise UsageError(
            f"expected one of subtask and template, got {'neither' if subtask is None else 'both'}; "
            "name the adapter's subtask, or give its prompt with {text} in it"
        )
    if template is not None and PLACE not in template:
        raise UsageError(f"template: expected {PLACE} in it, found none; write it where the text goes")
    cfg = settings or AnchorSettings()
    own = None if subtask is None else _known_subtasks([subtask], "subtask")[0]
    asked_of = _other_subtasks(others, own)
    try:
        files = read_folder(Path(adapter))
    except ModelError as error:
        raise ModelError(f"adapter: {error}") from error
    dealt = split_texts(list(texts), [other.name for other in asked_of], cfg.rows, cfg.seed)
    return AnchoredExpert(resolve_base(base), files, texts, own, template, asked_of, dealt, cfg, device)


def _known_subtasks(names: Sequence[str], argument: str) -> list[Subtask]:
    unknown = [name for name in names if name not in SUBTASKS]
    if unknown:
        raise UsageError(f"{argument}: unknown subtask {shown(unknown[0])}; known ones: {', '.join(SUBTASKS)}")
    return [SUBTASKS[name] for name in names]


def _other_subtasks(names: Sequence[str] | None, own: Subtask | None) -> list[Subtask]:
    """Return the other subtasks, in the catalogue's order."""
    if names is not None and list(names) == [ALL]:
        return [subtask for subtask in SUBTASKS.values() if subtask != own]
    if names is not None and own is not None and own.name in names:
        raise UsageError(f"others names {own.name}, which is the adapter's own subtask; leave it out")
    asked = _known_subtasks(DEFAULT_OTHERS if names is None else names, "others")
    chosen = [subtask for subtask in SUBTASKS.values() if subtask in asked and subtask != own]
    if not chosen:
        raise UsageError(f"others names no subtask; give some as {','.join(DEFAULT_OTHERS[:3])}, or {ALL}")
    return chosen


def _device(device: str) -> str:
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise ModelError("device: expected a GPU, this process sees none; leave it out, or install torch with CUDA")
    return device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
