"""An engine core whose model writes messages in channels, around a tokenizer with harmony's marks.

`python -m tests.support.engines.harmony_engine` is an engine process with it: an answer is the last user's message, its
marks included, and then ends.
"""

import functools
import sys
from collections.abc import Callable

import msgspec
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from stellarbyte_server.config.settings import EngineSettings
from stellarbyte_server.engine.core import EngineCore
from stellarbyte_server.engine.process import main
from stellarbyte_server.engine.state.sequence import Sequence
from stellarbyte_server.protocol.messages import EngineInfo
from stellarbyte_server.protocol.request import Channels
from stellarbyte_server.tokens.reasoning_marks import find_marks
from tests.support.engines.engine_core import make_core
from tests.support.engines.reasoning_engine import TokenScript, scripted_info
from tests.support.servers.fake_engine import byte_alphabet

MARKS = (
    *("<|endoftext|>", "<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>", "<|call|>"),
    "<|constrain|>",
)
END_OF_TEXT, START, CHANNEL, MESSAGE, END, RETURN, CALL, CONSTRAIN = range(256, 264)
VOCABULARY = 264


@functools.cache
def harmony_tokenizer() -> Tokenizer:
    """One token for each byte, whose id is the byte, and harmony's special tokens."""
    tokenizer = Tokenizer(models.BPE(vocab={byte: value for value, byte in enumerate(byte_alphabet())}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(mark, special=True) for mark in MARKS])
    return tokenizer


def tokens_of(written: str) -> list[int]:
    """The tokens of a text with marks."""
    return list(harmony_tokenizer().encode(written, add_special_tokens=False).ids)


def channels(begun: str = "<|start|>assistant") -> Channels:
    found = find_marks(harmony_tokenizer(), "<|channel|>", VOCABULARY)
    assert isinstance(found, Channels)
    return msgspec.structs.replace(found, begun=tuple(tokens_of(begun)))


def harmony_core(script: Callable[[Sequence], list[int]]) -> EngineCore:
    """Files name the end of text and RETURN as ends."""
    ends = frozenset({END_OF_TEXT, RETURN})
    return make_core(TokenScript(script), VOCABULARY, tokenizer=harmony_tokenizer(), ends=ends, num_blocks=2048)


def last_message(sequence: Sequence) -> list[int]:
    """The last user's message, where the prompt ends with it and the start of an answer."""
    prompt = list(sequence.request.prompt_token_ids)
    opening = tokens_of("<|start|>user<|message|>")
    starts = [i + len(opening) for i in range(len(prompt)) if prompt[i : i + len(opening)] == opening]
    rest = prompt[starts[-1] if starts else 0 :]
    assistants = [i for i, token in enumerate(rest) if token == START]
    return rest[: assistants[-1] - 1] if assistants else rest


def build_core(settings: EngineSettings) -> tuple[EngineCore, EngineInfo]:
    return harmony_core(last_message), scripted_info(settings, VOCABULARY)


if __name__ == "__main__":
    sys.exit(main(build_core))
