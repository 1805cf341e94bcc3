"""Aligns tokens and their log-probabilities with the text of an answer.

A token is shown with its text. If a stop string removes the text, the token is not shown.
"""

from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from stellarbyte_server.protocol.messages import TokenLogprob
from stellarbyte_server.tokens.token_bytes import TokenBytes


class ShownToken(NamedTuple):
    """A token and its place in the text; `logprob` is None for the first token of a prompt."""

    token_id: int
    logprob: TokenLogprob | None
    offset: int  # characters of the text before it


class TokenAligner:
    """Holds the tokens of one text until the text is shown."""

    def __init__(self) -> None:
        self._num_shown = 0  # characters of shown text
        self._waiting: deque[ShownToken] = deque()  # a token without text waits for the next text

    def add(self, tokens: Iterable[ShownToken]) -> None:
        """Add the next tokens, whether or not their text has been shown."""
        self._waiting += tokens

    def show(self, text: str, finish_reason: str | None) -> list[ShownToken]:
        """The tokens of the text shown so far, including `text`; all remaining ones if the answer ends by length."""
        self._num_shown += len(text)
        shown: list[ShownToken] = []
        while self._waiting and (finish_reason == "length" or self._waiting[0].offset < self._num_shown):
            shown.append(self._waiting.popleft())
        return shown


def chat_logprobs(tokens: Sequence[ShownToken], token_bytes: TokenBytes) -> dict[str, Any]:
    return {"content": [_chat_token(token, token_bytes) for token in tokens], "refusal": None}


def _chat_token(token: ShownToken, token_bytes: TokenBytes) -> dict[str, Any]:
    assert token.logprob is not None, "chats show no tokens of their prompt"
    top = [_chat_entry(token_id, logprob, token_bytes) for token_id, logprob in token.logprob.top]
    return _chat_entry(token.token_id, token.logprob.logprob, token_bytes) | {"top_logprobs": top}


def _chat_entry(token_id: int, logprob: float, token_bytes: TokenBytes) -> dict[str, Any]:
    content = token_bytes[token_id]
    return {"token": content.decode(errors="replace"), "logprob": logprob, "bytes": list(content)}


def legacy_logprobs(tokens: Sequence[ShownToken], token_bytes: TokenBytes) -> dict[str, Any]:
    """The format of /v1/completions: four parallel lists. The chosen token is always among the alternatives."""
    return {
        "tokens": [token_bytes.name(token.token_id) for token in tokens],
        "token_logprobs": [None if token.logprob is None else token.logprob.logprob for token in tokens],
        "top_logprobs": [_legacy_top(token, token_bytes) for token in tokens],
        "text_offset": [token.offset for token in tokens],
    }


def _legacy_top(token: ShownToken, token_bytes: TokenBytes) -> dict[str, float] | None:
    if token.logprob is None:
        return None
    top = {token_bytes.name(token_id): logprob for token_id, logprob in reversed(token.logprob.top)}
    # Reversed above, so that of tokens with the same name the likeliest is kept; here the order is restored.
    ordered = dict(reversed(top.items()))
    return ordered | {token_bytes.name(token.token_id): token.logprob.logprob}


def prompt_logprobs(
    logprobs: Sequence[TokenLogprob], num_top: int, token_bytes: TokenBytes
) -> list[dict[str, dict[str, Any]] | None]:
    """vLLM's format: for each token of a prompt a map from token ids, its own first; None for the first token."""
    return [None, *(_prompt_entries(token, num_top, token_bytes) for token in logprobs)]


def _prompt_entries(token: TokenLogprob, num_top: int, token_bytes: TokenBytes) -> dict[str, dict[str, Any]]:
    entries = [(token.token_id, token.logprob, token.rank)]
    entries += [(token_id, logprob, rank) for rank, (token_id, logprob) in enumerate(token.top[:num_top], 1)
                if token_id != token.token_id]  # fmt: skip
    return {
        str(token_id): {
            "logprob": logprob,
            "rank": rank,
            "decoded_token": token_bytes[token_id].decode(errors="replace"),
        }
        for token_id, logprob, rank in entries
    }


def joined_logprobs(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Join the log-probabilities of an answer's fragments by concatenating each list."""
    joined = {name: list(value) if isinstance(value, list) else value for name, value in parts[0].items()}
    for part in parts[1:]:
        for name, value in part.items():
            if isinstance(value, list):
                joined[name] += value
    return joined
