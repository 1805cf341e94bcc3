"""Grammars as masks over the vocabulary: compiled on a separate thread, advanced token by token."""

import contextlib
import logging
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import takewhile

import numpy as np
from llguidance import LLMatcher, LLTokenizer
from numpy.typing import NDArray
from tokenizers import Tokenizer

from stellarbyte_server.engine.grammar.mask_workers import QUICK_MASK_S, MaskWorkers
from stellarbyte_server.engine.grammar.vocabulary import GrammarVocabulary
from stellarbyte_server.give_way import give_way
from stellarbyte_server.protocol.grammar import LIMITS, TOO_COMPLEX, GrammarRefused, grammar_end, grammar_refusal
from stellarbyte_server.protocol.request import GRAMMARS_BUSY

logger = logging.getLogger("server.engine")

COMPILE_LIMIT_S = 5.0
MAX_ABANDONED, MAX_ABANDONED_OF_ONE = 3, 2  # in total, for each owner

_BUSY = "The server is busy with other grammars; try again later."
_NO_TOKENIZER = "This model's tokenizer cannot be used with a grammar."


@dataclass(frozen=True, kw_only=True)
class _Compiled:
    matcher: LLMatcher
    first_mask: bytes
    first_mask_s: float


class TokenGrammar:
    """One request's state in its grammar. Engine thread only; slow masks are computed by another thread."""

    def __init__(self, compiled: _Compiled, vocab_size: int, num_words: int, workers: MaskWorkers) -> None:
        self._matcher = compiled.matcher
        self._workers = workers
        self._vocab_size = vocab_size
        self.num_words = (vocab_size + 31) // 32
        # A tokenizer may have more tokens than the model has logits, and the library's masks may exceed both.
        self._words = np.frombuffer(compiled.first_mask, np.uint32)[:num_words].copy()
        self._is_computed = True
        self._expected_s = compiled.first_mask_s
        self._pending: Future[None] | None = None
        self.is_slow = self._expected_s > QUICK_MASK_S  # another thread computes its masks

    def mask(self, out: NDArray[np.uint32]) -> None:
        """Write the allowed next tokens: bit i % 32 of word i // 32 is token i; bits beyond the vocabulary are 0.

        `out` has `num_words` contiguous words. Check `error` afterwards: with an error the mask is invalid.
        """
        assert out.dtype == np.uint32 and out.shape == (self.num_words,) and out.flags.c_contiguous
        self._settle()
        if not self._is_computed:
            self._compute()
        out[:] = self._words[: len(out)]
        if self._vocab_size % 32:
            out[-1] &= np.uint32((1 << self._vocab_size % 32) - 1)

    def forced(self) -> list[int]:
        """The next tokens, as far as the grammar leaves no choice; [] if it does."""
        self._settle()
        if self._matcher.is_stopped():
            return []
        token_ids: list[int] = self._matcher.compute_ff_tokens()
        return list(takewhile(lambda token_id: token_id < self._vocab_size, token_ids))

    def num_allowed(self, token_ids: Iterable[int]) -> int:
        """How many of these tokens, from the first on, the grammar allows."""
        self._settle()
        return int(self._matcher.validate_tokens(list(token_ids)))

    def accept(self, token_id: int) -> None:
        """Advance by the chosen token; sets `error` if the mask did not allow it."""
        self._settle()
        self._is_computed = False
        self._matcher.consume_token(token_id)

    def rewind(self, num_tokens: int) -> None:
        """Undo the last `num_tokens` accepted tokens."""
        self._settle()
        self._is_computed = False
        self._matcher.rollback(num_tokens)

    def begin_mask(self) -> None:
        """Start computing the next mask on another thread, if it is expected to take long."""
        self.is_slow = not self._workers.may_leave(self._expected_s)
        if self.is_slow:
            self._pending = self._workers.submit(self._compute)

    @property
    def is_ready(self) -> bool:
        """Whether no other thread is computing its mask."""
        return self._pending is None or self._pending.done()

    @property
    def is_complete(self) -> bool:
        """Whether only end-of-sequence can follow."""
        self._settle()
        return self._matcher.is_stopped() and not self._matcher.is_error()

    @property
    def error(self) -> str | None:
        """Why masks cannot be computed any more, in one sentence. Permanent."""
        self._settle()
        if not self._matcher.is_error():
            return None
        return grammar_end(self._matcher.get_error())

    def _settle(self) -> None:
        if self._pending is not None:
            self._pending.result()
            self._pending = None

    def _compute(self) -> None:
        started_s = time.thread_time()
        self._matcher.unsafe_compute_mask_ptr(self._words.ctypes.data, self._words.nbytes)
        # Slow masks occur among quick ones: after a slow one, the grammar counts as slow for the next hundred.
        self._expected_s = max(time.thread_time() - started_s, 0.98 * self._expected_s)
        self._is_computed = True


@dataclass(frozen=True, kw_only=True)
class _Job:
    key: str
    serial: int
    grammar: str
    owner: str


class GrammarCompiler:
    """Compiles grammars to `TokenGrammar`s. Engine thread only; never blocks.

    `wake_fd` becomes readable when `collect` has results, or a slow mask is complete.

    Grammars are compiled one at a time, and separately for each request: copies of a compiled grammar share its lexer
    and its limit of states, so that requests could end each other's answers. A compilation that exceeds
    `compile_limit_s` is refused and its thread abandoned, since it cannot be stopped; while `MAX_ABANDONED_OF_ONE` of
    one owner still run, all of its grammars are refused.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        eos_token_ids: frozenset[int],
        vocab_size: int,
        *,
        compile_limit_s: float = COMPILE_LIMIT_S,
    ) -> None:
        """`vocab_size`: number of the model's logits."""
        self._vocabulary = GrammarVocabulary(tokenizer, eos_token_ids, vocab_size)
        self._compile_limit_s = compile_limit_s
        self._jobs: queue.PriorityQueue[tuple[bool, int, int, _Job | None]] = queue.PriorityQueue()
        self._wanted: dict[str, int] = {}
        self._serial = 0
        self._finished: deque[tuple[_Job, TokenGrammar | GrammarRefused]] = deque()
        self._abandoned: list[tuple[str, threading.Thread]] = []  # owner, thread
        self._round = 0  # the round of the last compiled grammar
        self._rounds: dict[str, int] = {}  # the round of each owner's last grammar
        self._thread: threading.Thread | None = None
        self.wake_fd, self._wake = os.pipe()
        os.set_blocking(self.wake_fd, False)
        os.set_blocking(self._wake, False)
        self._mask_workers = MaskWorkers(self._ring)

    @property
    def vocab_size(self) -> int:
        """How many logits the model computes."""
        return self._vocabulary.vocab_size

    def prepare(self) -> None:
        """Read the tokenizer now, at the start: it holds the GIL for a second. Otherwise the first grammar does it."""
        with contextlib.suppress(BaseException):  # reported with the first grammar
            self._vocabulary.tokenizer()

    def submit(self, key: str, grammar: str, *, can_wait: bool = False, owner: str = "") -> None:
        """Queue a grammar; `collect` returns the result with `key`, which must not be queued.

        Grammars with `can_wait` come after all others; otherwise owners take turns.
        """
        self._serial += 1
        self._wanted[key] = self._serial
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="grammar-compiler", daemon=True)
            self._thread.start()
        self._rounds[owner] = max(self._round, self._rounds.get(owner, 0)) + 1
        job = _Job(key=key, serial=self._serial, grammar=grammar, owner=owner)
        self._jobs.put((can_wait, self._rounds[owner], self._serial, job))

    def cancel(self, key: str) -> None:
        """Discard a queued grammar; unknown keys are ignored."""
        self._wanted.pop(key, None)

    def collect(self) -> list[tuple[str, TokenGrammar | GrammarRefused]]:
        """Results since the last call. Call it at the start of a step."""
        self._mask_workers.begin_step()
        with contextlib.suppress(BlockingIOError):
            os.read(self.wake_fd, 4096)
        done = []
        while self._finished:
            job, result = self._finished.popleft()
            if self._wanted.get(job.key) == job.serial:
                del self._wanted[job.key]
                done.append((job.key, result))
        return done

    def close(self) -> None:
        """Stop without further results. A running compilation is abandoned."""
        self._wanted.clear()
        self._jobs.put((False, 0, 0, None))
        self._mask_workers.close()

    def _ring(self) -> None:
        with contextlib.suppress(BlockingIOError):  # full: a wake-up is pending
            os.write(self._wake, b"\0")

    def _work(self) -> None:
        give_way()
        while True:
            can_wait, number, _, job = self._jobs.get()
            if job is None:
                return
            if not can_wait:
                self._round = number
            if self._wanted.get(job.key) != job.serial:
                continue
            self._finished.append((job, self._compile_in_time(job.grammar, job.owner)))
            self._ring()

    def _compile_in_time(self, grammar: str, owner: str) -> TokenGrammar | GrammarRefused:
        self._abandoned = [(whose, thread) for whose, thread in self._abandoned if thread.is_alive()]
        num_own = sum(whose == owner for whose, _ in self._abandoned)
        if len(self._abandoned) >= MAX_ABANDONED or num_own >= MAX_ABANDONED_OF_ONE:
            return GrammarRefused(_BUSY, GRAMMARS_BUSY)
        try:
            tokenizer = self._vocabulary.tokenizer()  # outside the time limit: the first grammar waits for it
        except BaseException:  # even a panic: the model still serves plain text
            logger.exception("the tokenizer cannot be used with grammars")
            return GrammarRefused(_NO_TOKENIZER)
        results: list[_Compiled | GrammarRefused] = []
        thread = threading.Thread(
            target=lambda: results.append(_compile(tokenizer, grammar)), name="grammar-compilation", daemon=True
        )
        started_s = time.perf_counter()
        thread.start()
        thread.join(self._compile_limit_s)
        if thread.is_alive():
            self._abandoned.append((owner, thread))
            logger.warning("refused a grammar of %d characters: its compilation exceeded the time limit", len(grammar))
        result = results[0] if results else GrammarRefused(TOO_COMPLEX)
        logger.debug("compiled a grammar in %.3f s", time.perf_counter() - started_s)
        if isinstance(result, _Compiled):
            return TokenGrammar(result, self._vocabulary.vocab_size, self._vocabulary.num_words, self._mask_workers)
        return result


def _compile(tokenizer: LLTokenizer, grammar: str) -> _Compiled | GrammarRefused:
    try:
        give_way()
        matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=LIMITS)
        if matcher.is_error():
            return GrammarRefused(grammar_refusal(matcher.get_error()))
        first = matcher.deep_copy()
        started_s = time.thread_time()
        mask = first.compute_bitmask()  # detects a grammar that no text satisfies
        if first.is_error():
            return GrammarRefused(grammar_refusal(first.get_error()))
        return _Compiled(matcher=matcher, first_mask=mask, first_mask_s=time.thread_time() - started_s)
    except BaseException:  # even a panic of llguidance must not end the engine
        logger.exception("compiling a grammar failed")
        return GrammarRefused("The grammar could not be compiled; see the server's log.")
