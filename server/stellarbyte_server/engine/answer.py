"""The answer to one request as it grows: tokens become deltas, and end where the request says."""

from typing import Protocol

import numpy as np
from tokenizers import Tokenizer

from stellarbyte_server.engine.state.sequence import Sequence, TokenMask
from stellarbyte_server.engine.text import TextStream
from stellarbyte_server.protocol.messages import Delta, TokenLogprob, merged
from stellarbyte_server.protocol.request import GRAMMAR_REFUSED


class Grammar(TokenMask, Protocol):
    """What the answer has to be, as far as it has come."""

    def accept(self, token_id: int) -> None:
        """Go on by a token that was allowed."""

    def begin_mask(self) -> None:
        """Begin to compute what may follow, if that takes long."""

    @property
    def is_complete(self) -> bool:
        """Nothing can follow."""

    @property
    def error(self) -> str | None:
        """Why it cannot go on, in one sentence; None: it can."""


class Answer:
    """Engine thread only; one instance per request."""

    def __init__(self, sequence: Sequence, tokenizer: Tokenizer, grammar: Grammar | None = None) -> None:
        self.sequence = sequence
        self._request_id = sequence.request.request_id
        self._grammar = grammar
        self._sampling = sampling = sequence.request.sampling
        self._is_text_only = not sampling.return_token_ids and sampling.prompt_logprobs is None
        self._text = TextStream(
            tokenizer,
            sampling.stop,
            skip_special_tokens=sampling.skip_special_tokens,
            include_stop=sampling.include_stop,
        )
        self._prompt_logprobs: list[TokenLogprob] = []
        self._pooled: np.ndarray | None = None

    @property
    def grammar_error(self) -> str | None:
        """Why the answer's grammar cannot go on, in one sentence; None: it can, or there is none."""
        return None if self._grammar is None else self._grammar.error

    def add_prompt_logprobs(self, start: int, logprobs: list[TokenLogprob]) -> None:
        """Of the prompt's tokens from number start + 1 on; a request that starts anew replaces what there was."""
        self._prompt_logprobs[start:] = logprobs

    def add_pooled(self, start: int, pooled: bytes) -> None:
        """The sum of the prompt's hidden states from number `start` on, or the last of them: float32 [C]."""
        hidden_C = np.frombuffer(pooled, np.float32)
        goes_on = self.sequence.request.pooling == "mean" and start > 0
        self._pooled = self._pooled + hidden_C if goes_on and self._pooled is not None else hidden_C

    def end_of_prompt(self) -> Delta:
        """The only delta of a request that is only a prompt."""
        return Delta(
            request_id=self._request_id,
            text="",
            num_tokens=0,
            finish_reason="length",
            prompt_logprobs=self._take_prompt_logprobs(),
            embedding=None if self._pooled is None else _unit(self._pooled).tobytes(),
        )

    def push_all(self, tokens: list[int], logprobs: list[TokenLogprob] | None) -> Delta:
        """What the newest tokens, which the sequence already has, add to the answer; those after its end are dropped.

        `logprobs` has an entry for each token, if they are wanted.
        """
        deltas: list[Delta] = []
        for i, token in enumerate(tokens, 1):
            logprob = None if logprobs is None else logprobs[i - 1]
            deltas.append(self.push(token, logprob, num_later=len(tokens) - i))
            if deltas[-1].finish_reason is not None:
                break
        return merged(deltas)

    def push(self, token: int, logprob: TokenLogprob | None = None, num_later: int = 0) -> Delta:
        """What a token adds to the answer, after which the sequence has so many more already."""
        offset = self._text.num_decoded
        text, finish_reason = self._read(token, num_later)
        if finish_reason is None and logprob is None and self._is_text_only:
            return Delta(request_id=self._request_id, text=text, num_tokens=1)  # nearly all, and fields take time
        return Delta(
            request_id=self._request_id,
            text=text,
            num_tokens=1,
            token_ids=(token,) if self._sampling.return_token_ids else (),
            logprobs=() if logprob is None else (logprob,),
            offsets=() if logprob is None else (offset,),
            prompt_logprobs=self._take_prompt_logprobs() if self._prompt_logprobs else (),
            finish_reason=finish_reason,
            error=self._grammar.error if finish_reason == "error" and self._grammar is not None else None,
            code=GRAMMAR_REFUSED if finish_reason == "error" else None,
        )

    def _read(self, token: int, num_later: int) -> tuple[str, str | None]:
        """The text that is ready, and the finish reason if the token is the last one."""
        sampling, num_generated = self._sampling, self.sequence.num_generated - num_later
        if self._grammar is not None and self._grammar.error is not None:
            return "", "error"  # its mask meant nothing, so the token means nothing
        if token in self.sequence.end_token_ids:
            shown = ""
            if sampling.include_stop and token in sampling.stop_token_ids:
                shown, _ = self._text.push(token, may_stop=False)
            return shown + self._text.flush(), "stop"
        text, stopped = self._text.push(token, may_stop=num_generated > sampling.min_tokens)
        if stopped:
            return text, "stop"
        if self._grammar is not None:
            self._grammar.accept(token)
            if self._grammar.error is not None:
                return text, "error"
            if self._grammar.is_complete:
                return text + self._text.flush(), "stop"
        if num_generated >= sampling.max_tokens:
            return text + self._text.flush(), "length"
        if self._grammar is not None:
            self._grammar.begin_mask()
        return text, None

    def _take_prompt_logprobs(self) -> tuple[TokenLogprob, ...]:
        """Those of the whole prompt, once; from now on the cache may be read."""
        if self.sequence.reads_cache:
            return ()
        self.sequence.reads_cache = True
        return tuple(self._prompt_logprobs)


def _unit(vector_C: np.ndarray) -> np.ndarray:
    """The vector at length 1, float32."""
    return (vector_C / max(float(np.linalg.norm(vector_C)), 1e-12)).astype(np.float32)
