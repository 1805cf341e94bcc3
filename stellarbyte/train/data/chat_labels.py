"""Which tokens of a chat are learned: those that the assistant writes, with the end token of each answer.

The model's own chat template renders the chat. Special tokens that a message spells stay text. A template with
{% generation %} blocks says itself what the assistant writes. Of any other, an answer is what the template adds to the
prompt before it. An answer whose message has "weight": 0 is read and not learned; templates do not see weights.
"""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerFast

from stellarbyte.train.data.spellings import Spellings

Messages = Sequence[dict[str, Any]]
Labels = tuple[list[int], np.ndarray, np.ndarray]  # ids, characters [tokens, 2] of the rendered chat, is learned
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


class ChatLabels:
    """For one tokenizer, which must have a chat template."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder
        self._special_ids = {number for number, token in added.items() if token.special}
        self._spellings = Spellings(tokenizer)
        self._special_texts = tuple(token.content for token in added.values() if token.special)

    def of(self, messages: Messages, tools: Sequence[Any] | None = None) -> tuple[list[int], np.ndarray]:
        """Token ids, and for each whether it is learned. ValueError with the end of a sentence."""
        if not any(map(_is_answer, messages)):
            raise ValueError("has no message of the assistant")
        weights = [_weight(message, number) for number, message in enumerate(messages, 1)]
        messages = [{name: value for name, value in message.items() if name != "weight"} for message in messages]
        shown, shown_tools = self._spellings.hide(messages), self._spellings.hide(tools)
        has_blocks = _GENERATION.search(self._tokenizer.get_chat_template(tools=tools))
        ids, spans, is_learned = (self._by_blocks if has_blocks else self._by_prompts)(shown, shown_tools, weights)
        if shown == messages and shown_tools == tools:
            return ids, is_learned
        text = self._render(shown, shown_tools)
        is_learned_character = np.zeros(len(text) + 1, bool)
        for start, end in spans[is_learned]:
            is_learned_character[start:end] = True
        ids, found = self._spellings.encode(text)
        return ids, np.array([end > start and is_learned_character[start:end].all() for start, end in found])

    def _by_blocks(self, messages: Messages, tools: Sequence[Any] | None, weights: Sequence[int]) -> Labels:
        rendered = self._apply(
            messages,
            tools=tools,
            return_dict=True,
            return_assistant_tokens_mask=True,
            tokenizer_kwargs={"return_offsets_mapping": True},
        )
        ids, is_learned = rendered["input_ids"], np.array(rendered["assistant_masks"], bool)
        if 0 in weights:
            answers = [weight for message, weight in zip(messages, weights, strict=True) if _is_answer(message)]
            edges = np.flatnonzero(np.diff(is_learned, prepend=False, append=False)).reshape(-1, 2)
            if len(edges) != len(answers):
                raise ValueError("has weights, for which the chat template needs one {% generation %} for each answer")
            for (start, end), weight in zip(edges, answers, strict=True):
                is_learned[start:end] = weight
        for end in np.flatnonzero(is_learned[:-1] & ~is_learned[1:]):  # a block may leave out the end token
            if ids[end] not in self._special_ids and ids[end + 1] in self._special_ids:
                is_learned[end + 1] = True
        return ids, _characters(rendered["offset_mapping"]), is_learned

    def _by_prompts(self, messages: Messages, tools: Sequence[Any] | None, weights: Sequence[int]) -> Labels:
        text = self._render(messages, tools)
        encoded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        spans = _characters(encoded["offset_mapping"])
        is_learned = np.zeros(len(spans), bool)
        for number, message in enumerate(messages):
            if _is_answer(message) and weights[number]:
                start, end = self._answer(text, messages[: number + 1], tools)
                is_learned |= (spans[:, 0] >= start) & (spans[:, 1] <= end)
        return encoded["input_ids"], spans, is_learned

    def _answer(self, text: str, messages: Messages, tools: Sequence[Any] | None) -> tuple[int, int]:
        """The characters of the last message, from the end of the prompt for it to its end token."""
        prompt = self._render(messages[:-1], tools, add_generation_prompt=True)
        answered = self._render(messages, tools).rstrip()
        if not text.startswith(answered) or not answered.startswith(prompt):
            raise ValueError(
                f"has message {len(messages)} in another form than the prompt before it: use a chat template with"
                " {% generation %}, or a line for each answer"
            )
        if not answered.endswith(self._special_texts):
            raise ValueError("has an answer that the chat template ends without a special token, so none would end")
        return len(prompt), len(answered)

    def _render(self, messages: Messages, tools: Sequence[Any] | None, *, add_generation_prompt: bool = False) -> str:
        if not messages:
            raise ValueError("starts with the assistant; use a chat template with {% generation %}")
        text: str = self._apply(messages, tools=tools, tokenize=False, add_generation_prompt=add_generation_prompt)
        return text

    def _apply(self, messages: Messages, **options: Any) -> Any:
        try:
            return self._tokenizer.apply_chat_template(list(messages), **options)
        except (TemplateError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
            # A template is a program that the messages can make fail.
            raise ValueError(f"is refused by the chat template: {' '.join(str(error).split()).rstrip('.')}") from error


def _is_answer(message: dict[str, Any]) -> bool:
    return bool(message["role"] == "assistant")


def _weight(message: dict[str, Any], number: int) -> int:
    """1 unless the message says otherwise; ValueError with the end of a sentence."""
    weight = message.get("weight", 1)
    if weight not in (0, 1) or (weight != 1 and not _is_answer(message)):
        raise ValueError(f"has message {number} with weight {weight!r:.40}; answers may have 0 or 1")
    return int(weight)


def _characters(offset_mapping: Sequence[tuple[int, int]]) -> np.ndarray:
    return np.array(offset_mapping, np.int64).reshape(-1, 2)
