"""Compiles grammars to masks over the vocabulary, on a separate thread."""

import contextlib
import logging
import queue
import threading
import time
from collections import deque
from dataclasses import dataclass

from llguidance import LLMatcher, LLTokenizer
from tokenizers import Tokenizer

from stellarbyte_server.engine.grammar.choices import next_choice
from stellarbyte_server.engine.grammar.mask_workers import MaskWorkers
from stellarbyte_server.engine.grammar.token_grammar import CompiledGrammar, TokenGrammar
from stellarbyte_server.engine.grammar.vocabulary import GrammarVocabulary
from stellarbyte_server.give_way import give_way
from stellarbyte_server.protocol.grammar import LIMITS, TOO_COMPLEX, GrammarRefused, grammar_refusal
from stellarbyte_server.protocol.request import GRAMMARS_BUSY
from stellarbyte_server.wake_up import WakeUp

logger = logging.getLogger("server.engine")

COMPILE_LIMIT_S = 5.0
MAX_ABANDONED, MAX_ABANDONED_OF_ONE = 3, 2  # in total, for each owner

_BUSY = "The server is busy with other grammars; try again later."
_NO_TOKENIZER = "This model's tokenizer cannot be used with a grammar."


@dataclass(frozen=True, kw_only=True)
class _Job:
    key: str
    serial: int
    grammar: str
    owner: str


class GrammarCompiler:
    """Compiles grammars to `TokenGrammar`s. Engine thread only; never blocks.

    `wake_up` rings when `collect` has results, or a slow mask is complete.

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
        self.wake_up = WakeUp()
        self._mask_workers = MaskWorkers(self.wake_up.ring)

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

    def collect(self, step_s: float = 0.0) -> list[tuple[str, TokenGrammar | GrammarRefused]]:
        """Results since the last call. Call it at the start of a step, of the expected duration if that is known."""
        self._mask_workers.begin_step(step_s)
        self.wake_up.clear()
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
        self.wake_up.close()

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
            self.wake_up.ring()

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
        results: list[CompiledGrammar | GrammarRefused] = []
        thread = threading.Thread(
            target=lambda: results.append(_compile(tokenizer, self._vocabulary, grammar)),
            name="grammar-compilation",
            daemon=True,
        )
        started_s = time.perf_counter()
        thread.start()
        thread.join(self._compile_limit_s)
        if thread.is_alive():
            self._abandoned.append((owner, thread))
            logger.warning("refused a grammar of %d characters: its compilation exceeded the time limit", len(grammar))
        result = results[0] if results else GrammarRefused(TOO_COMPLEX)
        logger.debug("compiled a grammar in %.3f s", time.perf_counter() - started_s)
        if isinstance(result, CompiledGrammar):
            return TokenGrammar(result, self._vocabulary, self._mask_workers)
        return result


def _compile(tokenizer: LLTokenizer, vocabulary: GrammarVocabulary, grammar: str) -> CompiledGrammar | GrammarRefused:
    try:
        give_way()
        matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=LIMITS)
        if matcher.is_error():
            return GrammarRefused(grammar_refusal(matcher.get_error()))
        first = matcher.deep_copy()
        started_s = time.thread_time()
        first.compute_bitmask()  # detects a grammar that no text satisfies
        if first.is_error():
            return GrammarRefused(grammar_refusal(first.get_error()))
        choice = next_choice(first, vocabulary)
        return CompiledGrammar(matcher=matcher, first=choice, first_s=time.thread_time() - started_s)
    except BaseException:  # even a panic of llguidance must not end the engine
        logger.exception("compiling a grammar failed")
        return GrammarRefused("The grammar could not be compiled; see the server's log.")
