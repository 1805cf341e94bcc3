"""Ratings become a file of examples: chats for supervised training, or pairs of answers for preference training."""

import json
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from stellarbyte_client.terminal.connection import CommandFailed
from stellarbyte_client.terminal.tune.tuning_server import Rated

Format = Literal["sft", "dpo", "trl"]
FORMATS: tuple[Format, ...] = ("sft", "dpo", "trl")  # dpo: OpenAI's preference data; trl: the library's
_OF_MESSAGES = ("role", "content", "name", "tool_calls", "tool_call_id")  # that examples may have
_NO_BETTER, _CUT, _EMPTY = "without a better answer", "cut off by length", "empty"
_OLD = "with a message of the role function"


def write_examples(ratings: Iterable[Rated], path: Path, form: Format) -> tuple[int, Counter[str]]:
    """Write a new file, which only the user can read. Returns the number of examples, and of ratings left out by why.

    `ratings` are the newest first; the file has the oldest first. CommandFailed if the file exists or cannot be
    written.
    """
    if path.exists():
        raise CommandFailed(f"{path} already exists; give another name.")
    examples: list[dict[str, Any]] = []
    left_out: Counter[str] = Counter()
    for rated in ratings:
        made = example_of(rated, form)
        if isinstance(made, str):
            left_out[made] += 1
        else:
            examples.append(made)
    try:
        with open(path, "x", encoding="utf-8", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
            file.writelines(json.dumps(each, ensure_ascii=False) + "\n" for each in reversed(examples))
    except OSError as error:
        raise CommandFailed(f"{path} cannot be written: {error.strerror}.") from None
    return len(examples), left_out


def example_of(rated: Rated, form: Format) -> dict[str, Any] | str:
    """One line of the file, or the reason why the rating gives none.

    sft: the better answer, else an answer rated good. dpo, trl: the better answer before the rated one.
    """
    if any(message["role"] == "function" for message in rated.messages or ()):
        return _OLD
    if form != "sft":
        return _NO_BETTER if rated.answer is None else _pair(rated, rated.answer, form)
    if rated.answer is None and rated.rating != "good":
        return _NO_BETTER
    if rated.answer is None and rated.choice.finish_reason == "length":
        return _CUT
    if not (_chosen(rated).get("content") or _chosen(rated).get("tool_calls")):
        return _EMPTY
    if rated.messages is None:
        return {"prompt": rated.prompt, "completion": _chosen(rated)["content"]}
    chat = [*_context(rated, weight=0), _chosen(rated)]
    return {"messages": chat} | ({"tools": rated.tools} if rated.tools else {})


def _pair(rated: Rated, better: str, form: Format) -> dict[str, Any]:
    preferred, rejected = _answer(better), _rated_answer(rated)
    if form == "trl":
        if rated.messages is None:
            return {"prompt": rated.prompt, "chosen": better, "rejected": rejected["content"]}
        pair = {"prompt": _context(rated), "chosen": [preferred], "rejected": [rejected]}
        return pair | ({"tools": rated.tools} if rated.tools else {})
    messages = [{"role": "user", "content": rated.prompt}] if rated.messages is None else _context(rated)
    asked: dict[str, Any] = {"messages": messages} | ({"tools": rated.tools} if rated.tools else {})
    return {"input": asked, "preferred_output": [preferred], "non_preferred_output": [rejected]}


def _chosen(rated: Rated) -> dict[str, Any]:
    return _rated_answer(rated) if rated.answer is None else _answer(rated.answer)


def _answer(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def _rated_answer(rated: Rated) -> dict[str, Any]:
    message = rated.choice.message
    return _answer(rated.choice.text or "") if message is None else _shown(message)


def _context(rated: Rated, weight: int | None = None) -> list[dict[str, Any]]:
    """The messages before the answer; with `weight`, earlier answers have it."""
    messages = [_shown(message) for message in rated.messages or ()]
    if weight is not None:
        messages = [each | ({"weight": weight} if each["role"] == "assistant" else {}) for each in messages]
    return messages


def _shown(message: dict[str, Any]) -> dict[str, Any]:
    """Reasoning is left out: no example has any."""
    names = [name for name in _OF_MESSAGES if name != "name" or message["role"] != "tool"]
    return {name: message[name] for name in names if message.get(name) is not None}
