"""Prompts as token ids: instruction, demonstrations, query; never a cut answer or instruction.

With a chat template the instruction is the system message (the top of the first user turn, where the template has no
system role), each demonstration a user and an assistant turn, the query the last user turn. Without a chat template, a
plain one does the same with line breaks. The tokenizer is passed in, so that this module loads no model library.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from memmcl.errors import ConfigError, DataError
from memmcl.suite.examples import Example
from memmcl.suite.subtasks import Pairs, Subtask

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Demonstration = tuple[Subtask, Example]


class Prompter:
    """Turns examples into token ids for one tokenizer.

    `max_tokens` bounds the query (instruction + text + fields, without demonstrations); a longer text is cut at its
    end, token by token. Truncation depends on the example alone.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> None:
        self._tokenizer = tokenizer
        self._max_tokens = max_tokens
        self._chat = bool(tokenizer.chat_template)
        self._system = self._chat and self._has_system_role()
        self._control = [str(token) for token in tokenizer.all_special_tokens if len(str(token)) > 1]

    def check(self, subtask: Subtask) -> None:
        """Raise ConfigError if `max_tokens` leaves no room for a text behind the instruction of `subtask`."""
        blank = Example.create("", "", "", dict.fromkeys(subtask.needs, ""))
        taken = self._length(subtask, "", blank)
        if taken >= self._max_tokens:
            raise ConfigError(
                f"data.max_prompt_tokens is {self._max_tokens}, but the instruction of {subtask.name} alone takes "
                f"{taken} tokens; raise it"
            )

    def prompt(
        self, subtask: Subtask, example: Example, demonstrations: Sequence[Demonstration] = ()
    ) -> tuple[int, ...]:
        """Return the ids of the whole prompt, up to where the answer starts."""
        if isinstance(subtask, Pairs):  # to the last character: nothing is put around it, and nothing cut
            ids = self._encode(example.text)
            if len(ids) > self._max_tokens:
                raise ConfigError(
                    f"data.max_prompt_tokens is {self._max_tokens}, but the prompt that begins {example.text[:40]!r} "
                    f"takes {len(ids)} tokens; raise it"
                )
            return tuple(ids)
        example = self._harmless(example)
        shown = [(other, self._harmless(shot)) for other, shot in demonstrations]
        return tuple(self._encode(self._render(subtask, self._fitted(subtask, example), example, shown)))

    def text(self, subtask: Subtask, example: Example) -> str:
        """Return the zero-shot prompt as text, the way the model sees it."""
        example = self._harmless(example)
        return self._render(subtask, self._fitted(subtask, example), example, ())

    def answer(self, answer: str, subtask: Subtask | None = None) -> tuple[int, ...]:
        """Return an answer's ids with its end token. subtask: needed for `Pairs`, whose answers are not changed."""
        if not isinstance(subtask, Pairs):
            answer = self._broken(answer) if self._chat else f" {self._broken(answer)}"
        return (*self._encode(answer), self._tokenizer.eos_token_id)

    def demonstration_tokens(self, subtask: Subtask, example: Example, reader: Subtask) -> int:
        """Return how many tokens one demonstration of `subtask` adds to a prompt of `reader`."""
        follows = "Text:"  # line breaks at the end of a text split differently from those before a word
        turn = self._turn(subtask, self._harmless(example), reader)
        return len(self._encode(turn + follows)) - len(self._encode(follows))

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of generated ids, special tokens left out."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True)).strip()

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False))

    def _harmless(self, example: Example) -> Example:
        """Return the example with a blank inside each special token that its texts spell out: no row ends a turn."""
        words = [example.text, *example.fields.values(), example.answer]
        if not any(token in word for token in self._control for word in words):
            return example
        fields = {name: self._broken(value) for name, value in example.fields.items()}
        gold = example.gold
        if not isinstance(gold, str):
            gold = tuple(tuple(map(self._broken, item)) for item in gold)
        return replace(example, text=self._broken(example.text), fields=fields, gold=gold)

    def _broken(self, text: str) -> str:
        for token in self._control:
            text = text.replace(token, f"{token[0]} {token[1:]}")
        return text

    def _length(self, subtask: Subtask, text: str, example: Example) -> int:
        return len(self._encode(self._render(subtask, text, example, ())))

    def _fitted(self, subtask: Subtask, example: Example) -> str:
        """Return the example's text, cut at its end where the query would exceed `max_tokens`."""
        length = self._length(subtask, example.text, example)
        if length <= self._max_tokens:
            return example.text
        ids = self._encode(example.text)
        room = self._max_tokens - (length - len(ids))
        while room > 0:
            # Where the cut falls inside a character of several tokens, its half decodes to U+FFFD: drop it.
            cut = self._tokenizer.decode(ids[:room], clean_up_tokenization_spaces=False)
            text = str(cut).rstrip("\ufffd").strip()
            over = self._length(subtask, text, example) - self._max_tokens
            if over <= 0:
                return text
            room -= over
        taken = self._length(subtask, "", example)
        if taken <= self._max_tokens:
            return ""
        self.check(subtask)
        raise ConfigError(
            f"data.max_prompt_tokens is {self._max_tokens}, but the instruction of {subtask.name} and a row's "
            f"{' and '.join(subtask.needs)} take {taken} tokens; raise it, or shorten the row that begins "
            f"{example.text[:40]!r}"
        )

    def _render(self, subtask: Subtask, text: str, example: Example, demonstrations: Sequence[Demonstration]) -> str:
        user = query_text(subtask, text, example)
        if not self._chat:
            shown = [self._plain_turn(other, shot, subtask) for other, shot in demonstrations]
            return "".join([f"{subtask.instruction}\n\n", *shown, f"{user}\nAnswer:"])
        shots = [message for other, shot in demonstrations for message in _shot_messages(other, shot, subtask)]
        return self._template(self._instructed(subtask, [*shots, _message("user", user)]), add_generation_prompt=True)

    def _turn(self, subtask: Subtask, example: Example, reader: Subtask) -> str:
        if not self._chat:
            return self._plain_turn(subtask, example, reader)
        # Behind another turn, so that the instruction is on both sides wherever the template puts it.
        before = self._instructed(reader, [_message("user", "Text:"), _message("assistant", "none")])
        with_shot = self._template([*before, *_shot_messages(subtask, example, reader)])
        return with_shot.removeprefix(self._template(before))

    def _instructed(self, subtask: Subtask, messages: list[dict[str, str]]) -> list[dict[str, str]]:
        """Return the messages with the instruction in front of them."""
        if self._system:
            return [_message("system", subtask.instruction), *messages]
        first, *rest = messages
        return [_message(first["role"], f"{subtask.instruction}\n\n{first['content']}"), *rest]

    def _has_system_role(self) -> bool:
        """Whether the chat template shows a system message; some refuse one, others leave it out."""
        from jinja2 import TemplateError

        probe = "Answer in one word."
        try:
            return probe in self._template([_message("system", probe), _message("user", "Text:")])
        except TemplateError:
            return False

    @staticmethod
    def _plain_turn(subtask: Subtask, example: Example, reader: Subtask) -> str:
        instruction = "" if subtask.name == reader.name else f"{subtask.instruction}\n"
        return f"{instruction}{query_text(subtask, example.text, example)}\nAnswer: {example.answer}\n\n"

    def _template(self, messages: list[dict[str, str]], **options: Any) -> str:
        return str(self._tokenizer.apply_chat_template(messages, tokenize=False, **options))


def query_text(subtask: Subtask, text: str, example: Example) -> str:
    """Return what the user turn says: the text, then each field that the subtask needs, one a line."""
    lines = [f"Text: {text}"]
    for name in subtask.needs:
        value = example.fields.get(name)
        if value is None:
            raise DataError(f"{subtask.name} needs the field {name!r}, and this row has none: {example.text[:60]!r}")
        lines.append(f"{name.replace('_', ' ').capitalize()}: {value}")
    return "\n".join(lines)


def shared_prefix(prompts: Sequence[Sequence[int]]) -> int:
    """Return how many leading tokens all prompts share; at least one token of each prompt stays outside."""
    columns = zip(*(prompt[:-1] for prompt in prompts), strict=False)
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))


def _shot_messages(subtask: Subtask, example: Example, reader: Subtask) -> list[dict[str, str]]:
    # A demonstration of another subtask carries its own instruction, so that its answer makes sense.
    user = query_text(subtask, example.text, example)
    if subtask.name != reader.name:
        user = f"{subtask.instruction}\n{user}"
    return [_message("user", user), _message("assistant", example.answer)]


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}
