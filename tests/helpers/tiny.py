"""A real but tiny base model, and invented rows for all 16 subtasks: always the same."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from memmcl.adapters.format import Factors, to_files
from memmcl.backbone.batches import TokenizedRow
from memmcl.backbone.forward import Backbone
from memmcl.backbone.load import BaseRef, load_base, load_tokenizer, quiet_transformers, resolve_base
from memmcl.errors import DataError
from memmcl.experts.lora import adapted
from memmcl.experts.settings import LoraShape
from memmcl.suite.embedded import corpus_rows
from memmcl.suite.examples import Example
from memmcl.suite.prompts import Prompter
from memmcl.suite.rows import RowError, example_of
from memmcl.suite.subtasks import POLARITIES, SUBTASKS, Subtask

EMBEDDED = ("sent2", "asc", "uabsa", "aste", "irony", "emotion")
"""The subtasks that the embedded corpus has rows for."""

SENTIEVAL = Path(os.environ.get("MEMMCL_SENTIEVAL", Path(__file__).resolve().parents[3] / "shared/data/sentieval"))
"""Development files of SentiEval, where they are at hand."""
needs_sentieval = pytest.mark.skipif(not SENTIEVAL.is_dir(), reason="set MEMMCL_SENTIEVAL to SentiEval's files")

VOCABULARY = 600
PAD, BOS, EOS = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def make_tiny_base(directory: Path, *, layers: int = 4, chat_template: bool = True, seed: int = 0) -> Path:
    """Save a tiny Llama and its tokenizer as a Hugging Face directory; the same arguments, the same bytes."""
    quiet_transformers()
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        initializer_range=0.15,  # far from the usual .02, whose logits are all alike
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        LlamaForCausalLM(config).save_pretrained(directory)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_train_tokenizer(), pad_token=PAD, bos_token=BOS, eos_token=EOS
    )
    if chat_template:
        tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(directory)
    return directory


def make_tiny_gguf(path: Path, directory: Path) -> Path:
    """Write the tiny base in `directory` as a GGUF file of float32 weights."""
    from gguf import GGUFWriter, TokenType

    model, tokenizer = plain_model(directory), load_tokenizer(base_ref(directory))
    config = model.config
    writer = GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    vocabulary = json.loads((directory / "tokenizer.json").read_text())["model"]
    tokens = sorted(vocabulary["vocab"], key=vocabulary["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([TokenType.CONTROL] * 3 + [TokenType.NORMAL] * (len(tokens) - 3))
    writer.add_token_merges([" ".join(pair) for pair in vocabulary["merges"]])
    writer.add_pad_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(tokenizer.chat_template)
    for name, weight in model.state_dict().items():
        if name != "lm_head.weight":  # tied
            writer.add_tensor(_gguf_name(name), _gguf_order(name, weight, config).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


_GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "model.layers.": "blk.",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "post_attention_layernorm": "ffn_norm",
    "input_layernorm": "attn_norm",
}


def _gguf_name(name: str) -> str:
    for ours, theirs in _GGUF_NAMES.items():
        name = name.replace(ours, theirs)
    return name


def _gguf_order(name: str, weight: torch.Tensor, config: LlamaConfig) -> torch.Tensor:
    # llama.cpp pairs neighbouring dimensions for the rotary embedding, transformers the two halves of a head.
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
    if heads is None:
        return weight
    return weight.reshape(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape).contiguous()


def _train_tokenizer() -> Tokenizer:
    texts = [example.text for name in ("sent2", "uabsa", "irony", "emotion") for example in corpus(name, 30)]
    instructions = [SUBTASKS[name].instruction for name in EMBEDDED]
    # The blank lines teach it a token for two line breaks, which splits differently at the end of a text.
    turns = [f"Text: {text}\nAspect: service\nAnswer: positive\n\n" for text in texts[:20]]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*texts, *instructions * 3, *turns * 3], trainer)
    return tokenizer


def corpus(subtask: str, count: int) -> list[Example]:
    """Return the first rows of a subtask in the embedded corpus."""
    return read_corpus(SUBTASKS[subtask])[:count]


def read_corpus(subtask: Subtask, folder: Path | None = None) -> list[Example]:
    """Return all rows of a subtask in the embedded corpus, or in another folder, before they are split."""
    rows = []
    for row in corpus_rows(subtask, folder):
        try:
            rows.append(example_of(row, subtask, f"embedded_{subtask.name}"))
        except RowError as error:
            raise DataError(str(row.fault(error))) from error
    return rows


def base_ref(directory: Path) -> BaseRef:
    """Return the reference by which memmcl loads the tiny base."""
    return resolve_base(str(directory))


def backbone_of(directory: Path, split: int, dtype: str = "float32", device: str = "cpu") -> Backbone:
    """Load the tiny base as memmcl does."""
    return Backbone(load_base(base_ref(directory), dtype, device), pad=0, split=split)


def plain_model(directory: Path) -> LlamaForCausalLM:
    """Load the tiny base with transformers alone, in float32: the oracle's model."""
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


@cache
def tokenizer_of(directory: Path) -> PreTrainedTokenizerBase:
    """Load the tiny base's tokenizer, once; nobody changes it."""
    return load_tokenizer(base_ref(directory))


def prompter_of(directory: Path, max_tokens: int = 512) -> Prompter:
    """Return a prompter with the tiny base's tokenizer."""
    return Prompter(tokenizer_of(directory), max_tokens)


def training_rows(prompter: Prompter, subtask: str, count: int) -> list[TokenizedRow]:
    """Return rows with one continuation, the gold answer."""
    return [
        TokenizedRow(prompter.prompt(SUBTASKS[subtask], example), (prompter.answer(example.answer),))
        for example in corpus(subtask, count)
    ]


def answer_logits(model: torch.nn.Module, prompt: Sequence[int], answer: Sequence[int]) -> torch.Tensor:
    """Return the logits (answer, vocabulary) that predict `answer`, from one plain pass over one row."""
    logits = model(torch.tensor([[*prompt, *answer[:-1]]])).logits[0]
    return logits[len(prompt) - 1 :].float()


@torch.no_grad()
def naive_logprob(model: torch.nn.Module, prompt: Sequence[int], answer: Sequence[int]) -> float:
    """Return the log-probability of `answer` behind `prompt`, from one plain pass over one row."""
    logprobs = answer_logits(model, prompt, answer).log_softmax(-1)
    return float(logprobs[range(len(answer)), list(answer)].double().sum())


@torch.no_grad()
def probe_logits(model: torch.nn.Module) -> torch.Tensor:
    """Return the logits of a fixed sequence of tokens: a fingerprint of a model's function."""
    tokens = torch.randint(3, VOCABULARY, (1, 24), generator=torch.Generator().manual_seed(1))
    return model(tokens).logits.float()


@contextmanager
def in_lora_layers(backbone: Backbone, factors: Mapping[str, Factors]) -> Iterator[None]:
    """Within the block the model is W_0 x + s B (A x) with the base's W_0: a merge that no weight is rebuilt for."""
    rank = max(len(pair.a) for pair in factors.values())
    with adapted(backbone, LoraShape((), rank, float(rank)), factors), torch.no_grad():
        yield


def write_adapter(folder: Path, base: Path, *, seed: int, layers: Sequence[int] = (2, 3)) -> Path:
    """Write an adapter of random factors as PEFT does; return its folder."""
    folder.mkdir(parents=True)
    factors = random_factors(base, layers=layers, seed=seed)
    for file, data in to_files(factors, base_name=str(base), rank=3, alpha=6.0).items():
        (folder / file).write_bytes(data)
    return folder


def labelled_rows(*subtasks: str, count: int = 6) -> list[dict[str, Any]]:
    """Return rows of the corpus as a file of weak rows has them."""
    return [{"subtask": name, "text": row.text, "label": row.gold} for name in subtasks for row in corpus(name, count)]


def random_factors(
    directory: Path,
    *,
    layers: Sequence[int],
    modules: Sequence[str] = MODULES,
    rank: int = 3,
    alpha: float = 6.0,
    seed: int,
) -> dict[str, Factors]:
    """Return an adapter of random factors, large enough to change the tiny base's outputs."""
    model = plain_model(directory)
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for name, module in model.named_modules():
        adapted = name.startswith("model.layers.") and name.rpartition(".")[2] in modules
        if adapted and int(name.split(".")[2]) in layers:
            a = torch.randn(rank, module.in_features, generator=generator) * 0.1
            b = torch.randn(module.out_features, rank, generator=generator) * 0.1
            factors[name] = Factors(a, b, alpha / rank)
    return factors


_CUES = {
    "positive": "lovely",
    "negative": "awful",
    "neutral": "usual",
    "very positive": "superb",
    "very negative": "vile",
    "better": "ahead of",
    "worse": "behind",
    "irony": "oh so great",
    "non_irony": "rather late",
    "anger": "maddening",
    "joy": "delightful",
    "optimism": "promising",
    "sadness": "gloomy",
    "hate": "not wanted",
    "non-hate": "welcome",
    "offensive": "stupid",
    "non-offensive": "polite",
    "against": "a bad idea",
    "favor": "a good idea",
    "none": "on the agenda",
}
"""Label -> what its texts say, so that rows of one label have something in common."""

_THINGS = ("soup", "screen", "ferry", "choir", "garden", "ticket", "lamp", "tunnel", "recipe", "museum")
_WHEN = ("today", "again", "on Monday", "after lunch", "since spring", "at the fair", "in the rain")


def make_sixteen(directory: Path, rows: int = 24, seed: int = 0) -> Path:
    """Write invented rows in SentiEval's layout, one data set for each of the 16 subtasks; return `directory`.

    Every file has `rows` rows: labels in turn, or tuples, of which one row in six of uabsa has none. No text occurs
    twice in the directory. The same arguments, the same bytes.
    """
    number = count(1)
    for subtask in SUBTASKS.values():
        folder = directory / subtask.group.lower() / subtask.datasets[0]
        folder.mkdir(parents=True)
        for part in ("train", "dev", "test"):
            draw = random.Random(f"{seed} {subtask.name} {part}")
            made = [_invented(subtask, draw, index, f"note {next(number)}") for index in range(rows)]
            (folder / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    return directory


def _invented(subtask: Subtask, draw: random.Random, index: int, note: str) -> dict[str, Any]:
    """Return one row; `note` makes its text unique."""
    (first, second), when = draw.sample(_THINGS, 2), draw.choice(_WHEN)
    if not subtask.is_tuple:
        label = subtask.labels[index % len(subtask.labels)]
        text = f"The {first} is {_CUES[label]} {'the ' + second + ' ' if label in ('better', 'worse') else ''}{when}"
        known = {"aspect": first, "target": first, "object_a": first, "object_b": second}
        return {"text": f"{text}, {note}.", **{name: known[name] for name in subtask.needs}, "label": label}
    if subtask.name == "uabsa" and index % 6 == 5:
        return {"text": f"We went home {when}, {note}.", "label": []}
    polarities = [draw.choice(POLARITIES) for _ in range(1 + index % 2)]
    named = list(zip((first, second), polarities, strict=False))
    text = " and ".join(f"the {aspect} was {_CUES[polarity]}" for aspect, polarity in named)
    if subtask.name == "asqp" and index % 6 == 4:  # an aspect that is not named
        named, text = [("NULL", polarities[0])], f"all in all {_CUES[polarities[0]]}"
    values = [
        {"category": "food quality", "aspect": aspect, "opinion": _CUES[polarity], "polarity": polarity}
        for aspect, polarity in named
    ]
    label = [[value[field] for field in subtask.tuple_fields] for value in values]
    return {"text": f"{text.capitalize()} {when}, {note}.", "label": label}
