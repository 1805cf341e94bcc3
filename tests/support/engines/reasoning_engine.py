"""An engine core whose model writes what its test says, around a tokenizer with marks of reasoning.

`python -m tests.support.engines.reasoning_engine` is an engine process with it: answers repeat the last user's message,
tokens for marks included, and then end.
"""

import functools
import sys
from collections.abc import Callable, Iterable
from itertools import islice

import numpy as np
from tokenizers import AddedToken, Tokenizer

from stellarbyte_server.config.settings import EngineSettings
from stellarbyte_server.engine.core import EngineCore
from stellarbyte_server.engine.process import main
from stellarbyte_server.engine.run.step_plan import StepResult
from stellarbyte_server.engine.state.sequence import Chunk, Sequence
from stellarbyte_server.protocol.messages import EngineInfo, TokenLogprob
from stellarbyte_server.protocol.request import Reasoning
from stellarbyte_server.tokens.reasoning_marks import find_marks
from tests.support.engines.engine import ComputedStep
from tests.support.engines.engine_core import END, make_core
from tests.support.servers.fake_engine import make_tokenizer

IM_START, IM_END, START, END_MARK = 257, 258, 259, 260
VOCABULARY = 261


@functools.cache
def reasoning_tokenizer() -> Tokenizer:
    """The bytes, three special tokens, and <think> and </think>."""
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([AddedToken("<think>", special=False), AddedToken("</think>", special=False)])
    return tokenizer


def marks() -> Reasoning:
    found = find_marks(reasoning_tokenizer(), None, VOCABULARY)
    assert isinstance(found, Reasoning)
    return found


class TokenScript:
    """Samples the tokens that `script` gives for a sequence, then the end; the lowest that a mask allows instead."""

    num_steps_ahead = 0

    def __init__(self, script: Callable[[Sequence], list[int]]) -> None:
        self._script = script

    def recover(self, sequences: Iterable[Sequence]) -> None:
        pass

    def prepare(self) -> bool:
        return False

    def start(self, chunks: list[Chunk]) -> ComputedStep:
        tokens = [[self._next(chunk.sequence)] if chunk.samples else [] for chunk in chunks]
        logprobs = {
            number: [TokenLogprob(tokens[number][0], -0.5)]
            for number, chunk in enumerate(chunks)
            if chunk.samples and chunk.sequence.request.sampling.logprobs is not None
        }
        return ComputedStep(StepResult(tokens=tokens, logprobs=logprobs))

    def _next(self, sequence: Sequence) -> int:
        wanted = next(islice(self._script(sequence), sequence.num_generated, None), END)
        if sequence.grammar is None:
            return wanted
        words_W = np.zeros(sequence.grammar.num_words, np.uint32)
        sequence.grammar.mask(words_W)
        allowed = np.flatnonzero(np.unpackbits(words_W.view(np.uint8), bitorder="little"))
        return wanted if wanted in allowed else int(allowed[0])


def reasoning_core(script: Callable[[Sequence], list[int]]) -> EngineCore:
    return make_core(TokenScript(script), VOCABULARY, tokenizer=reasoning_tokenizer())


def last_message(sequence: Sequence) -> list[int]:
    """The last user's message, as tokens of a prompt of `tests.support.servers.fake_engine.CHAT_TEMPLATE`'s kind."""
    prompt = list(sequence.request.prompt_token_ids)
    role = list(b"user\n")
    starts = [i + 6 for i, token in enumerate(prompt) if token == IM_START and prompt[i + 1 : i + 6] == role]
    start = starts[-1] if starts else 0
    end = prompt.index(IM_END, start) if IM_END in prompt[start:] else len(prompt)
    return prompt[start:end]


def scripted_info(settings: EngineSettings, vocab_size: int) -> EngineInfo:
    return EngineInfo(
        model_path=settings.model,
        max_model_len=2048,
        vocab_size=vocab_size,
        hidden_size=4,
        num_blocks=64,
        block_size=4,
        max_num_seqs=16,
        device="cpu",
        dtype="float32",
        quantization="none",
        kv_cache_dtype="float32",
        weights_hash="0123456789abcdef" * 4,
    )


def build_core(settings: EngineSettings) -> tuple[EngineCore, EngineInfo]:
    core = make_core(TokenScript(last_message), VOCABULARY, tokenizer=reasoning_tokenizer(), num_blocks=2048)
    return core, scripted_info(settings, VOCABULARY)


if __name__ == "__main__":
    sys.exit(main(build_core))
