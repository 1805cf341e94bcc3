"""Grammars as masks over the vocabulary: compiled on a thread of their own, followed token by token."""

import contextlib
import logging
import os
import queue
import threading
import time
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass

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
MAX_ABANDONED, MAX_ABANDONED_OF_ONE = 3, 2  # of all owners, of one

_BUSY = "The server is busy with other grammars; try again later."
_NO_TOKENIZER = "This model's tokenizer cannot be used with a grammar."


@dataclass(frozen=True, kw_only=True)
class _Compiled:
    matcher: LLMatcher
    first_mask: bytes
    first_mask_s: float


class TokenGrammar:
    """Where one request stands in its grammar. Engine thread only, which leaves slow masks to another."""

    def __init__(self, compiled: _Compiled, vocab_size: int, num_words: int, workers: MaskWorkers) -> None:
        self._matcher = compiled.matcher
        self._workers = workers
        self._vocab_size = vocab_size
        self.num_words = (vocab_size + 31) // 32
        # A tokenizer may know more tokens than the model computes logits for, and the library gives words beyond both.
        self._words = np.frombuffer(compiled.first_mask, np.uint32)[:num_words].copy()
        self._is_computed = True
        self._expected_s = compiled.first_mask_s
        self._pending: Future[None] | None = None
        self.is_slow = self._expected_s > QUICK_MASK_S  # its masks are left to another thread

    def mask(self, out: NDArray[np.uint32]) -> None:
        """Write which tokens may come next: bit i % 32 of word i // 32 is token i; everything past the vocabulary is 0.

        `out` has `num_words` contiguous words. Look at `error` afterwards: with one, the mask means nothing.
        """
        assert out.dtype == np.uint32 and out.shape == (self.num_words,) and out.flags.c_contiguous
        self._settle()
        if not self._is_computed:
            self._compute()
        out[:] = self._words[: len(out)]
        if self._vocab_size % 32:
            out[-1] &= np.uint32((1 << self._vocab_size % 32) - 1)

    def accept(self, token_id: int) -> None:
        """The token that was chosen; `error` is set if the mask did not allow it."""
        self._settle()
        self._is_computed = False
        self._matcher.consume_token(token_id)

    def rewind(self, num_tokens: int) -> None:
        """Go back to where it was before the last `num_tokens` that it accepted."""
        self._settle()
        self._is_computed = False
        self._matcher.rollback(num_tokens)

    def begin_mask(self) -> None:
        """Compute the mask after the token that was accepted on another thread, if it is expected to take long."""
        self.is_slow = not self._workers.may_leave(self._expected_s)
        if self.is_slow:
            self._pending = self._workers.submit(self._compute)

    @property
    def is_ready(self) -> bool:
        """No other thread is computing its mask."""
        return self._pending is None or self._pending.done()

    @property
    def is_complete(self) -> bool:
        """Nothing but end-of-sequence can follow."""
        self._settle()
        return self._matcher.is_stopped() and not self._matcher.is_error()

    @property
    def error(self) -> str | None:
        """Why no mask can be made any more: one sentence. It never goes away."""
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
        # Slow ones come in between quick ones: a grammar that had one is not trusted for the next hundred.
        self._expected_s = max(time.thread_time() - started_s, 0.98 * self._expected_s)
        self._is_computed = True


@dataclass(frozen=True, kw_only=True)
class _Job:
    key: str
    serial: int
    grammar: str
    owner: str


class GrammarCompiler:
    """Turns grammars into `TokenGrammar`s. Called from the engine's thread only; it waits for nothing.

    `wake_fd` becomes readable when `collect` has something to tell, or a slow mask has been computed.

    Grammars are compiled one after the other, and anew for each request: copies of a compiled one share its lexer and
    with it the limit on states, so that requests would end one another's answers. One that takes longer than
    `compile_limit_s` is refused and its thread left alone, since nothing can stop it; while `MAX_ABANDONED_OF_ONE` of
    one owner's still run, all of its grammars are refused.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        eos_token_ids: frozenset[int],
        vocab_size: int,
        *,
        compile_limit_s: float = COMPILE_LIMIT_S,
    ) -> None:
        """`vocab_size` is the model's: how many logits it computes."""
        self._vocabulary = GrammarVocabulary(tokenizer, eos_token_ids, vocab_size)
        self._compile_limit_s = compile_limit_s
        self._jobs: queue.PriorityQueue[tuple[bool, int, int, _Job | None]] = queue.PriorityQueue()
        self._wanted: dict[str, int] = {}
        self._serial = 0
        self._finished: deque[tuple[_Job, TokenGrammar | GrammarRefused]] = deque()
        self._abandoned: list[tuple[str, threading.Thread]] = []  # whose they are
        self._round = 0  # of the owners that was compiled last
        self._rounds: dict[str, int] = {}  # of each owner's last grammar
        self._thread: threading.Thread | None = None
        self.wake_fd, self._wake = os.pipe()
        os.set_blocking(self.wake_fd, False)
        os.set_blocking(self._wake, False)
        self._mask_workers = MaskWorkers(self._ring)

    def prepare(self) -> None:
        """Read the tokenizer now. That takes a second in which no other thread runs, so a start is the time for it;
        otherwise the first grammar does it."""
        with contextlib.suppress(BaseException):  # it is said when a grammar comes
            self._vocabulary.tokenizer()

    def submit(self, key: str, grammar: str, *, can_wait: bool = False, owner: str = "") -> None:
        """Ask for a grammar; `collect` answers with `key`, which must not be waiting already.

        Those that can wait come after all others; otherwise owners take turns.
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
        """Nobody waits for it any more; an unknown key is fine."""
        self._wanted.pop(key, None)

    def collect(self) -> list[tuple[str, TokenGrammar | GrammarRefused]]:
        """What has been finished since the last call. A step begins."""
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
        """Stop; nothing is answered any more. Leaves a compilation that is under way to itself."""
        self._wanted.clear()
        self._jobs.put((False, 0, 0, None))
        self._mask_workers.close()

    def _ring(self) -> None:
        with contextlib.suppress(BlockingIOError):  # full: it will be looked at
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
            tokenizer = self._vocabulary.tokenizer()  # outside the time limit: the first one waits for it
        except BaseException:  # even a panic: whatever it cannot read, the model still serves plain text
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
            logger.warning("a grammar of %d characters is not compiled in time and is refused", len(grammar))
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
        mask = first.compute_bitmask()  # a grammar that nothing satisfies shows only here
        if first.is_error():
            return GrammarRefused(grammar_refusal(first.get_error()))
        return _Compiled(matcher=matcher, first_mask=mask, first_mask_s=time.thread_time() - started_s)
    except BaseException:  # even a panic: nothing of llguidance's may take the engine along
        logger.exception("compiling a grammar failed")
        return GrammarRefused("The grammar could not be compiled; the server's log says why.")
