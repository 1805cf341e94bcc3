"""The answer to one request: turns tokens into deltas and detects the answer's end."""

import numpy as np
from tokenizers import Tokenizer

from stellarbyte_server.engine.grammar.followed import Grammar
from stellarbyte_server.engine.reasoning.channel_text import ChannelText
from stellarbyte_server.engine.reasoning.channel_tracker import ChannelTracker
from stellarbyte_server.engine.reasoning.divided_text import Apart, DividedText
from stellarbyte_server.engine.reasoning.tracker import ReasoningTracker
from stellarbyte_server.engine.state.sequence import Sequence
from stellarbyte_server.engine.text import TextStream
from stellarbyte_server.protocol.messages import Delta, TokenLogprob, merged
from stellarbyte_server.protocol.request import GRAMMAR_REFUSED, Channels, Reasoning
from stellarbyte_server.tokens.token_bytes import TokenBytes, token_bytes_of

_NOTHING_APART = Apart("", 0)


class Answer:
    """The answer to one request. Engine thread only."""

    def __init__(self, sequence: Sequence, tokenizer: Tokenizer, grammar: Grammar | None = None) -> None:
        self.sequence = sequence
        self._request_id = sequence.request.request_id
        self._grammar = grammar
        self._sampling = sampling = sequence.request.sampling
        self._is_text_only = not sampling.return_token_ids and sampling.prompt_logprobs is None
        text = TextStream(
            tokenizer,
            sampling.stop,
            skip_special_tokens=sampling.skip_special_tokens,
            include_stop=sampling.include_stop,
        )
        self._divided: DividedText | ChannelText | None = None
        if (reasoning := sequence.request.reasoning) is not None:
            self._divided = _divided(text, reasoning, token_bytes_of(tokenizer))
        self._text = text if self._divided is None else self._divided
        self._prompt_logprobs: list[TokenLogprob] = []
        self._pooled: np.ndarray | None = None

    @property
    def grammar_error(self) -> str | None:
        """Why the answer's grammar cannot continue, in one sentence; None: it can, or there is no grammar."""
        return None if self._grammar is None else self._grammar.error

    def add_prompt_logprobs(self, start: int, logprobs: list[TokenLogprob]) -> None:
        """Set the log-probabilities of the prompt's tokens from number start + 1 on; recomputation replaces them."""
        self._prompt_logprobs[start:] = logprobs

    def add_pooled(self, start: int, pooled: bytes) -> None:
        """Add the sum of the prompt's hidden states from number `start` on, or the last one: float32 [C]; or logits."""
        hidden_C = np.frombuffer(pooled, np.float32)
        goes_on = self.sequence.request.pooling == "mean" and start > 0
        self._pooled = self._pooled + hidden_C if goes_on and self._pooled is not None else hidden_C

    def end_of_prompt(self) -> Delta:
        """The only delta of a request without an answer."""
        return Delta(
            request_id=self._request_id,
            text="",
            num_tokens=0,
            finish_reason="length",
            prompt_logprobs=self._take_prompt_logprobs(),
            embedding=None if self._pooled is None else self._vector(self._pooled).tobytes(),
        )

    def _vector(self, pooled: np.ndarray) -> np.ndarray:
        return pooled if self.sequence.request.pooling == "logits" else _unit(pooled)

    def push_all(self, tokens: list[int], logprobs: list[TokenLogprob] | None) -> Delta:
        """Add the newest tokens, which the sequence already has; returns their delta. Tokens after the end are dropped.

        `logprobs` has an entry for each token, if requested.
        """
        deltas: list[Delta] = []
        for i, token in enumerate(tokens, 1):
            logprob = None if logprobs is None else logprobs[i - 1]
            deltas.append(self.push(token, logprob, num_later=len(tokens) - i))
            if deltas[-1].finish_reason is not None:
                break
        return merged(deltas)

    def push(self, token: int, logprob: TokenLogprob | None = None, num_later: int = 0) -> Delta:
        """Add a token, which `num_later` tokens of the sequence already follow; returns its delta."""
        offset = self._text.num_decoded
        text, finish_reason = self._read(token, num_later)
        apart = _NOTHING_APART if self._divided is None else self._divided.take()
        is_text = apart is _NOTHING_APART or apart == _NOTHING_APART
        if finish_reason is None and logprob is None and self._is_text_only and is_text:
            return Delta(
                request_id=self._request_id, text=text, num_tokens=1
            )  # the usual case; further fields cost time
        logprobs = [] if logprob is None else [(logprob, offset)]
        if logprob is not None and self._divided is not None:
            logprobs = self._divided.take_logprobs(logprob, offset)
        return Delta(
            request_id=self._request_id,
            text=text,
            num_tokens=1,
            reasoning=apart.reasoning,
            num_reasoning_tokens=apart.num_reasoning_tokens,
            recipients=apart.recipients,
            token_ids=(token,) if self._sampling.return_token_ids else (),
            logprobs=tuple(entry for entry, _ in logprobs),
            offsets=tuple(offset for _, offset in logprobs),
            prompt_logprobs=self._take_prompt_logprobs() if self._prompt_logprobs else (),
            finish_reason=finish_reason,
            stop_reason=self._stop_reason(token) if finish_reason == "stop" else None,
            error=self._grammar.error if finish_reason == "error" and self._grammar is not None else None,
            code=GRAMMAR_REFUSED if finish_reason == "error" else None,
        )

    def _read(self, token: int, num_later: int) -> tuple[str, str | None]:
        """The ready text, and the finish reason if the token is the last one."""
        sampling, num_generated = self._sampling, self.sequence.num_generated - num_later
        if self._grammar is not None and self._grammar.error is not None:
            return "", "error"  # its mask was invalid, and so is the token
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
        if self._grammar is not None and not num_later:
            self._grammar.begin_mask()
        return text, None

    def _stop_reason(self, token: int) -> str | int | None:
        """What of the request's own ended the answer with that token; None: nothing of it."""
        if self._text.stop_met is not None:
            return self._text.stop_met
        return token if token in self._sampling.stop_token_ids else None

    def _take_prompt_logprobs(self) -> tuple[TokenLogprob, ...]:
        """The log-probabilities of the whole prompt, once; after that the prefix cache may be used."""
        if self.sequence.reads_cache:
            return ()
        self.sequence.reads_cache = True
        return tuple(self._prompt_logprobs)


def _divided(text: TextStream, reasoning: Reasoning | Channels, token_bytes: TokenBytes) -> DividedText | ChannelText:
    if isinstance(reasoning, Channels):
        return ChannelText(text, ChannelTracker(reasoning, token_bytes))
    return DividedText(text, ReasoningTracker(reasoning, token_bytes))


def _unit(vector_C: np.ndarray) -> np.ndarray:
    """The vector at length 1, float32."""
    return (vector_C / max(float(np.linalg.norm(vector_C)), 1e-12)).astype(np.float32)
