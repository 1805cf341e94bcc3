"""A conversation: its turns, settings and next request."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from enum import Enum
from typing import Any

from stellarbyte_client.terminal.sampling_fields import SAMPLING_FIELDS


@dataclass(frozen=True)
class Field:
    """A sampling field of a request. The server checks its values."""

    kind: str  # in messages
    read: Callable[[str], object]  # ValueError if a text is not of this kind


def finite(text: str) -> float:
    """A number valid in JSON; ValueError."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(text)
    return value


def _field(kind: str | tuple[str, ...]) -> Field:
    if kind == "integer":
        return Field("a whole number", int)
    if kind == "number":
        return Field("a number", finite)
    words = (kind,) if isinstance(kind, str) else kind

    def one_of(text: str) -> str:
        if text not in words:
            raise ValueError(text)
        return text

    return Field(" or ".join(words), one_of)


FIELDS = {name: _field(kind) for name, kind in SAMPLING_FIELDS.items()}


class Ending(Enum):
    """The end of an answer."""

    COMPLETE = "complete"
    LENGTH = "cut off by length"
    STOPPED = "stopped"
    LOST = "broken off"


@dataclass(frozen=True, kw_only=True)
class Usage:
    """An answer's tokens by the server's count."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    evicted_tokens: int = 0

    def __add__(self, other: "Usage") -> "Usage":
        return Usage(
            prompt_tokens=self.prompt_tokens + other.prompt_tokens,
            cached_tokens=self.cached_tokens + other.cached_tokens,
            completion_tokens=self.completion_tokens + other.completion_tokens,
            evicted_tokens=self.evicted_tokens + other.evicted_tokens,
        )


@dataclass
class Answer:
    """An answer, possibly incomplete."""

    id: str | None = None  # by which the server knows it
    text: str = ""
    reasoning: str = ""  # before the text
    ending: Ending = Ending.LOST  # until it ends otherwise
    problem: str | None = None  # why it broke off or failed, in one sentence
    usage: Usage | None = None  # known at the end of a complete answer
    ttft_s: float | None = None  # from sending the request to the first text or reasoning
    streaming_s: float = 0.0  # from then to the last text


@dataclass(frozen=True)
class Turn:
    question: str
    answer: Answer
    model: str
    adapter_scale: float | None


@dataclass
class Conversation:
    """Turns and settings. The last turn may have no answer, if its request failed."""

    base_model: str
    model: str
    system: str | None = None
    adapter_scale: float | None = None
    sampling: dict[str, object] = field(default_factory=dict)  # of FIELDS
    turns: list[Turn] = field(default_factory=list)
    usage: Usage = field(default_factory=Usage)  # of all answers, including removed ones
    num_answers: int = 0  # number of answers in `usage`

    @property
    def acting_scale(self) -> float | None:
        """The scale of requests; None for the base model."""
        return None if self.model == self.base_model else self.adapter_scale

    def request(self, question: str) -> dict[str, Any]:
        """The body of a request for the answer to `question`, without the fields of streaming."""
        messages = [*self.messages(), {"role": "user", "content": question}]
        scale = {} if self.acting_scale is None else {"adapter_scale": self.acting_scale}
        return {"model": self.model, "messages": messages, **scale, **self.sampling}

    def messages(self) -> list[dict[str, str]]:
        messages = [] if self.system is None else [{"role": "system", "content": self.system}]
        for turn in self.turns:
            if turn.answer.text:
                messages.append({"role": "user", "content": turn.question})
                messages.append({"role": "assistant", "content": turn.answer.text})
        return messages

    def add(self, question: str, answer: Answer, in_place_of: Turn | None = None) -> None:
        """Add a turn; without an answer keep the turn `in_place_of`.

        Removes an unanswered question before it.
        """
        if self.turns and not self.turns[-1].answer.text:
            self.turns.pop()
        turn = Turn(question, answer, self.model, self.acting_scale)
        self.turns.append(in_place_of if in_place_of is not None and not answer.text else turn)
        if answer.usage is not None:
            self.usage += answer.usage
            self.num_answers += 1

    def as_json(self) -> str:
        """`messages` as in a request; `answers` has details of each message of the assistant, in order."""
        settings = {"adapter_scale": self.acting_scale} if self.acting_scale is not None else {}
        answers = [
            {"model": turn.model, "adapter_scale": turn.adapter_scale, "ending": turn.answer.ending.value}
            for turn in self.turns
            if turn.answer.text
        ]
        content = {
            "saved_at": _now(),
            "model": self.model,
            **settings,
            **self.sampling,
            "messages": self.messages(),
            "answers": answers,
        }
        return json.dumps(content, ensure_ascii=False, indent=2) + "\n"

    def as_markdown(self) -> str:
        parts = [f"# Conversation with {self.base_model}", f"Saved at {_now()}."]
        if self.system is not None:
            parts += ["## System", self.system]
        for turn in self.turns:
            if turn.answer.text:
                parts += ["## Question", turn.question, f"## {_title(turn)}", turn.answer.text.strip("\n")]
        return "\n\n".join(parts) + "\n"


def _title(turn: Turn) -> str:
    scale = "" if turn.adapter_scale is None else f" × {turn.adapter_scale:g}"
    ending = "" if turn.answer.ending is Ending.COMPLETE else f" ({turn.answer.ending.value})"
    return f"{turn.model}{scale}{ending}"


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")
