"""From tokens to text that can be sent: whole UTF-8 characters only, stop strings found and cut. Knows no model.

tokenizers' own DecodeStream is not used: it raises on some token sequences a model may well produce (bytes that are
not UTF-8), has no way to get at an unfinished last character, and slows down as such bytes pile up.
"""

import functools

from tokenizers import Tokenizer

_REPLACEMENT = "\ufffd"  # what a decoder makes of bytes that are no character, or not yet
_MAX_WINDOW = 16  # tokens decoded again with each new one before the window is moved on
_MAX_PENDING = 32  # tokens that may wait for a character to be completed


class _StopString:
    """Finds one string in a text that arrives in pieces (Knuth, Morris, Pratt): O(1) amortised per character."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.matched = 0  # how much of `text` the end of what was read may be the start of
        self._fallback = [0] * len(text)
        length = 0
        for i in range(1, len(text)):
            while length and text[i] != text[length]:
                length = self._fallback[length - 1]
            length += text[i] == text[length]
            self._fallback[i] = length

    def read(self, character: str) -> bool:
        """Whether the string ends with this character."""
        while self.matched and self.text[self.matched] != character:
            self.matched = self._fallback[self.matched - 1]
        self.matched += self.text[self.matched] == character
        return self.matched == len(self.text)


class TextStream:
    """The text of one request, token by token. Engine process only; one instance per request.

    The joined result does not depend on how tokens come in: it is the decoded text up to the stop string that is
    completed first (of several completed by one character, the longest).
    """

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...], skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._stops = [_StopString(text) for text in stop]
        self._held = ""  # may still become a stop string
        # The window: tokens decoded together. Some of its text was returned; its start is the start of a character.
        self._window: list[int] = []
        self._returned = ""
        self._boundary = 0  # tokens of the window that end with a whole character
        self._previous_boundary = 0

    def push(self, token_id: int) -> tuple[str, bool]:
        """Take the next token; return text that is ready to send, and whether a stop string was met.

        Text before the stop string is in what was returned; nothing may be pushed after it.
        """
        return self._cut(self._decode_next(token_id))

    def flush(self) -> str:
        """Everything held back, at the end by length or end-of-sequence token. An unfinished character is U+FFFD."""
        text = self._decode(self._window)
        rest = text[len(self._returned) :]
        self._window, self._returned, self._boundary = [], "", 0
        ready, stopped = self._cut(rest)
        if not stopped:
            ready += self._held
            self._held = ""
        return ready

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=False)

    def _decode_next(self, token_id: int) -> str:
        if not self._has_text(token_id):
            return ""
        self._window.append(token_id)
        text = self._decode(self._window)
        if not text.startswith(self._returned) and not text.endswith(_REPLACEMENT):
            # A byte-fallback decoder spoils a character it had decoded when a stray byte follows: leave it behind.
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

    def _has_text(self, token_id: int) -> bool:
        """False for special tokens that are skipped and for ids the tokenizer does not know: neither is decoded."""
        if self._tokenizer.id_to_token(token_id) is None:
            return False
        return not self._skip_special_tokens or token_id not in _special_token_ids(self._tokenizer)

    def _reached_boundary(self, text: str) -> None:
        """All of the window's text was returned and ends with a whole character; keep the window short."""
        self._previous_boundary, self._boundary = self._boundary, len(self._window)
        self._returned = text
        if len(self._window) > _MAX_WINDOW:
            del self._window[: self._previous_boundary]
            self._boundary = len(self._window)
            self._returned = self._decode(self._window)

    def _give_up_on_pending(self, text: str) -> str:
        """Return what more of `text` is certain although it looks unfinished: a long run of bytes that are no text.

        The window is split before the last few tokens, where the bytes on either side decode on their own.
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

    def _cut(self, text: str) -> tuple[str, bool]:
        """Text that no stop string can claim any more, and whether one was completed."""
        if not self._stops:
            return text, False
        text, start = self._held + text, len(self._held)
        for position in range(start, len(text)):
            met = [stop.text for stop in self._stops if stop.read(text[position])]
            if met:
                self._held = ""
                return text[: position + 1 - max(map(len, met))], True
        keep = max(stop.matched for stop in self._stops)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False


@functools.lru_cache(maxsize=8)
def _special_token_ids(tokenizer: Tokenizer) -> frozenset[int]:
    added = tokenizer.get_added_tokens_decoder()
    return frozenset(token_id for token_id, token in added.items() if token.special)
