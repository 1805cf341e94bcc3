"""Text of an answer's tokens: whole characters, up to the first stop string."""

from tokenizers import Tokenizer

from stellarbyte_server.tokens.detokenizer import make_detokenizer


class _StopString:
    """Finds one string in a text that arrives in pieces (Knuth, Morris, Pratt): O(1) amortised per character."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.matched = 0  # length of the longest prefix of `text` at the end of the input
        self._fallback = [0] * len(text)
        length = 0
        for i in range(1, len(text)):
            while length and text[i] != text[length]:
                length = self._fallback[length - 1]
            length += text[i] == text[length]
            self._fallback[i] = length

    def read(self, character: str) -> bool:
        """Read a character; returns whether it completes the string."""
        while self.matched and self.text[self.matched] != character:
            self.matched = self._fallback[self.matched - 1]
        self.matched += self.text[self.matched] == character
        return self.matched == len(self.text)


class TextStream:
    """The text of one request, token by token. Engine process only; one instance per request.

    The joined result does not depend on the grouping of tokens: it is the decoded text up to the stop string that is
    completed first (if one character completes several, the longest).
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: tuple[str, ...],
        *,
        skip_special_tokens: bool = True,
        include_stop: bool = False,
    ) -> None:
        self._detokenizer = make_detokenizer(tokenizer, skip_special_tokens)
        self._stops = [_StopString(text) for text in stop]
        self._include_stop = include_stop
        self._held = ""  # possible start of a stop string
        self.num_decoded = 0  # characters so far, held back or not
        self.stop_met: str | None = None  # the stop string that ended the text

    def push(self, token_id: int, may_stop: bool = True) -> tuple[str, bool]:
        """Add a token; return text that is ready to send, and whether a stop string was found.

        The returned text ends before the stop string, or includes it if requested; nothing may be pushed after it. The
        text of a token with `may_stop` False is not searched for stop strings.
        """
        return self.add(self.decode(token_id), may_stop)

    def decode(self, token_id: int) -> str:
        """The text that has become certain with the next token, for `add`."""
        return self._detokenizer.push(token_id)

    def end_character(self) -> str:
        """What was decoded of an unfinished character, U+FFFD: what comes next begins anew."""
        return self._detokenizer.flush()

    def add(self, text: str, may_stop: bool = True) -> tuple[str, bool]:
        """As `push`, for text that was decoded."""
        self.num_decoded += len(text)
        if may_stop:
            return self._cut(text)
        held, self._held = self._held, ""
        return held + text, False

    def flush(self) -> str:
        """Return the text held back, at an end by length or end-of-sequence token. An unfinished character is
        U+FFFD."""
        ready, stopped = self._cut(self._detokenizer.flush())
        if not stopped:
            ready += self._held
            self._held = ""
        return ready

    def _cut(self, text: str) -> tuple[str, bool]:
        """Text that cannot be part of a stop string any more, and whether one was completed."""
        if not self._stops:
            return text, False
        text, start = self._held + text, len(self._held)
        for position in range(start, len(text)):
            met = [stop.text for stop in self._stops if stop.read(text[position])]
            if met:
                self._held = ""
                self.stop_met = max(met, key=len)
                return text[: position + 1 - (0 if self._include_stop else len(self.stop_met))], True
        keep = max(stop.matched for stop in self._stops)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False
