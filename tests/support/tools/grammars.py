"""What a grammar lets a model write, whose tokens are bytes."""

import functools

from llguidance import LLMatcher, LLTokenizer

from tests.support.servers.fake_engine import make_tokenizer

SPECIAL = {"[TOOL_CALLS]": 257, "[ARGS]": 258}  # two of that tokenizer's special tokens in the part of Mistral's


@functools.cache
def byte_tokenizer() -> LLTokenizer:
    return LLTokenizer(make_tokenizer().to_str(), n_vocab=259, eos_token=256)


def tokens_of(text: str, special: dict[str, int] | None = None) -> list[int]:
    """A text as that tokenizer writes it, with the special tokens that are to be in it."""
    tokens, rest = [], text
    while rest:
        mark = next((mark for mark in special or {} if rest.startswith(mark)), None)
        tokens += list(rest[0].encode()) if mark is None else [(special or {})[mark]]
        rest = rest[1:] if mark is None else rest.removeprefix(mark)
    return tokens


def allowed_part(grammar: str, text: str, special: dict[str, int] | None = None) -> tuple[list[int], bool]:
    """As many tokens of a text as the model may write, and whether it may stop there."""
    matcher = LLMatcher(byte_tokenizer(), grammar)
    assert not matcher.is_error(), matcher.get_error()
    tokens = tokens_of(text, special)
    count = matcher.try_consume_tokens(tokens)
    assert not matcher.is_error(), matcher.get_error()
    return tokens[:count], matcher.is_accepting()


def assert_allows(grammar: str, text: str, special: dict[str, int] | None = None) -> None:
    """A text is a whole answer; with a | in it, the model may write what comes before that and no more of it."""
    before, bar, after = text.partition("|")
    written, may_stop = allowed_part(grammar, before + after, special)
    assert written == tokens_of(before if bar else text, special)
    assert bar or may_stop
