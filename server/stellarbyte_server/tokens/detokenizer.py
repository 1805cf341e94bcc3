"""Incremental detokenization into whole characters.

tokenizers' DecodeStream is not used: it raises on some token sequences that models produce (bytes that are not UTF-8),
cannot return an unfinished last character, and slows down with the number of such bytes.
"""

import codecs
import functools
from collections.abc import Mapping
from typing import Protocol

from tokenizers import Tokenizer, decoders

from stellarbyte_server.tokens.token_bytes import token_bytes_of

_REPLACEMENT = "\ufffd"  # a decoder's output for incomplete or invalid bytes
_MAX_WINDOW = 16  # tokens decoded again with each new one before the window moves
_MAX_PENDING = 32  # tokens that may wait for the rest of a character


class Detokenizer(Protocol):
    """The text of one sequence; the joined results are the decoded text of all tokens."""

    def push(self, token_id: int) -> str:
        """Add a token; return the new text that later tokens cannot change."""
        ...

    def flush(self) -> str:
        """Return the rest, at the end. An unfinished character is U+FFFD."""
        ...


def make_detokenizer(tokenizer: Tokenizer, skip_special_tokens: bool = True) -> Detokenizer:
    """The fastest detokenizer for a tokenizer. Skipped special tokens have no text."""
    if isinstance(tokenizer.decoder, decoders.ByteLevel):
        return ByteLevelDetokenizer(tokenizer, skip_special_tokens)
    return WindowDetokenizer(tokenizer, skip_special_tokens)


class ByteLevelDetokenizer:
    """For byte-level tokenizers, whose tokens are bytes in any context (GPT-2, Llama 3, Qwen, SmolLM)."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        self._bytes_of = _bytes_of_tokens(tokenizer, skip_special_tokens)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        return self._decoder.decode(self._bytes_of.get(token_id, b""))

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


class WindowDetokenizer:
    """For any tokenizer: decodes the last few tokens together and returns the new text."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        # The window: tokens decoded together. It starts at a character; part of its text was returned.
        self._window: list[int] = []
        self._returned = ""
        self._boundary = 0  # number of tokens in the window up to the last whole character
        self._previous_boundary = 0

    def push(self, token_id: int) -> str:
        if not self._has_text(token_id):
            return ""
        self._window.append(token_id)
        text = self._decode(self._window)
        if not text.startswith(self._returned) and not text.endswith(_REPLACEMENT):
            # With a stray byte after it, a byte-fallback decoder corrupts a decoded character: move the window past it.
            del self._window[: self._boundary]
            self._returned, self._boundary = "", 0
            text = self._decode(self._window)
        if not text.endswith(_REPLACEMENT):
            ready = text[len(self._returned) :]
            self._reached_boundary(text)
            return ready
        ready = text.rstrip(_REPLACEMENT)[len(self._returned) :]
        self._returned += ready
        if len(self._window) - self._boundary > _MAX_PENDING:
            ready += self._give_up_on_pending(text)
        return ready

    def flush(self) -> str:
        rest = self._decode(self._window)[len(self._returned) :]
        self._window, self._returned, self._boundary = [], "", 0
        return rest

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=False)

    def _has_text(self, token_id: int) -> bool:
        """False for skipped special tokens and for unknown ids, which are not decoded."""
        if self._tokenizer.id_to_token(token_id) is None:
            return False
        return not self._skip_special_tokens or token_id not in token_bytes_of(self._tokenizer).special_ids

    def _reached_boundary(self, text: str) -> None:
        """Note that all of the window's text was returned and ends with a whole character; shorten the window."""
        self._previous_boundary, self._boundary = self._boundary, len(self._window)
        self._returned = text
        if len(self._window) > _MAX_WINDOW:
            del self._window[: self._previous_boundary]
            self._boundary = len(self._window)
            self._returned = self._decode(self._window)

    def _give_up_on_pending(self, text: str) -> str:
        """Return text of a long run of invalid bytes, although it looks unfinished.

        Splits the window before the last few tokens, where the bytes on both sides decode independently.
        """
        for split in range(len(self._window) - 1, len(self._window) - 8, -1):
            head, tail = self._window[:split], self._window[split:]
            head_text = self._decode(head)
            if head_text + self._decode(tail) == text:
                break
        else:
            head_text, tail = text, []
        ready = head_text[len(self._returned) :]
        self._window, self._returned, self._boundary = tail, "", 0
        return ready


@functools.lru_cache(maxsize=8)
def _bytes_of_tokens(tokenizer: Tokenizer, skip_special_tokens: bool) -> Mapping[int, bytes]:
    """The bytes of every token of a byte-level tokenizer, without special tokens if they are skipped."""
    token_bytes = token_bytes_of(tokenizer)
    return token_bytes.without_special() if skip_special_tokens else token_bytes.with_special()
