"""Chats for fine-tuning, as JSON lines."""

import json
from collections.abc import Sequence


def chat(question: str, answer: str, **fields: object) -> dict[str, object]:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer, **fields}]
    return {"messages": messages}


def json_lines(values: Sequence[object]) -> bytes:
    return b"".join(json.dumps(value).encode() + b"\n" for value in values)


def chats(number: int, answer: str = "aye aye") -> bytes:
    return json_lines([chat(f"q{index}?", f"{answer} {index % 3}") for index in range(number)])
