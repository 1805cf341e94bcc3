"""`stellarbyte replay`: sends the request of a receipt once more, and compares the answers token by token."""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from stellarbyte_client.terminal.connection import CommandFailed, Connection, refusals_explained
from stellarbyte_client.terminal.markdown import printable

_VERSION = 1
_PATHS = ("/v1/completions", "/v1/chat/completions")
_COMPARED = ("weights", "adapter", "adapter_scale", "numeric_mode", "versions", "sampling", "prompts")


def read_receipt(path: Path) -> dict[str, Any]:
    """The receipt in a file, which may also be a whole answer; CommandFailed if there is none."""
    try:
        content = msgspec.json.decode(path.read_bytes())
    except (OSError, msgspec.DecodeError) as error:
        raise CommandFailed(f"{path} cannot be read as JSON: {error}") from None
    receipt = content.get("receipt", content) if isinstance(content, dict) else None
    if not isinstance(receipt, dict) or not {"version", "path", "body", "answers", *_COMPARED} <= receipt.keys():
        raise CommandFailed(f"{path} holds no receipt; a request with 'receipt': true gets one.")
    if receipt["version"] != _VERSION:
        raise CommandFailed(f"{path} is a receipt of version {receipt['version']}; this command reads {_VERSION}.")
    is_sound = isinstance(receipt["body"], dict) and receipt["body"].get("receipt") is True
    if receipt["path"] not in _PATHS or not is_sound or not isinstance(receipt["answers"], list):
        raise CommandFailed(f"{path} holds a damaged receipt.")
    return receipt


@dataclass(frozen=True)
class Comparison:
    lines: list[str]  # for the user
    is_equal: bool  # every token of every answer


def replay(connection: Connection, receipt: Mapping[str, Any]) -> Comparison:
    """Send a receipt's request once more and compare; StellarByteError."""
    with connection.client() as client, refusals_explained():
        return compare(receipt, client.replay(receipt))


def compare(old: Mapping[str, Any], new: Mapping[str, Any]) -> Comparison:
    lines = [printable(difference) for difference in _differences(old, new)]
    pairs = list(itertools.zip_longest(old["answers"], new["answers"]))
    differing = [line for number, pair in enumerate(pairs) if (line := _compared(number, *pair)) is not None]
    if not differing:
        num_tokens = sum(map(len, new["answers"]))
        differing.append(f"{'The answer is' if len(pairs) == 1 else 'All answers are'} equal: {num_tokens} tokens.")
        return Comparison([*lines, *differing], is_equal=True)
    if not new["numeric_mode"]["deterministic"]:
        differing.append("The server runs without --deterministic: other requests at the same time change last bits.")
    return Comparison([*lines, *differing], is_equal=False)


def _differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """A sentence for each field that has another value now."""
    for name in _COMPARED if not prefix else sorted(old.keys() | new.keys()):
        before, now = old.get(name), new.get(name)
        if before == now:
            continue
        if isinstance(before, dict) and isinstance(now, dict):
            yield from _differences(before, now, f"{name}.")
        elif name == "prompts":
            yield "The prompt has other tokens now: the chat template or the tokenizer has changed."
        else:
            yield f"{prefix}{name} was {_short(before)} and is {_short(now)} now."


def _short(value: object) -> str:
    text = msgspec.json.encode(value).decode()
    return text if len(text) <= 40 else f"{text[:37]}..."


def _compared(number: int, before: list[int] | None, now: list[int] | None) -> str | None:
    """Where an answer differs; None: nowhere."""
    if before == now:
        return None
    if before is None or now is None:
        return f"Answer {number} is {'new' if before is None else 'missing'}."
    same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(before, now, strict=False)))
    return f"Answer {number} differs from token {same} on, of {len(before)}."
