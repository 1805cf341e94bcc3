"""Limits and checks of grammars, in HTTP processes, before the engine compiles them."""

import re

from llguidance import LLMatcher, LLParserLimits

from stellarbyte_server.protocol.request import GRAMMAR_REFUSED

# An ordinary schema compiles in 2 to 20 ms and takes 0.1 to 1 ms for a mask, at worst 10 ms. Fuel measures the cost of
# regular expressions: 50,000 in a mask are about 5 ms. A lexer state has about 300 bytes, separate for each request; a
# string with maxLength needs about five states for each character, so a hostile grammar can hold 30 MB while it runs.
# Fuel does not cover all costs: api/structured/grammars.py refuses further grammars before, and says why.
LIMITS = LLParserLimits(
    initial_lexer_fuel=200_000,
    step_lexer_fuel=50_000,
    step_max_items=20_000,
    max_items_in_row=2_000,
    max_lexer_states=100_000,
    max_grammar_size=50_000,
    precompute_large_lexemes=False,  # walks the whole vocabulary, too slow for grammars of one request
    verbose_errors=False,
)

TOO_COMPLEX = "The grammar is too complex."
_LIMIT_WORDS = (
    "fuel",
    "too big",
    "too large",
    "too many",
    "too complex",
    "items; max",
    "level exceeded",
    "unable to determine",
)


class GrammarRefused(ValueError):
    """A grammar cannot be used; str() is one sentence for the user, `code` as in `RequestRejected`."""

    def __init__(self, message: str, code: str = GRAMMAR_REFUSED) -> None:
        super().__init__(message)
        self.code = code


def check_grammar(grammar: str) -> None:
    """Check a grammar independently of the vocabulary. Any thread or process; releases the GIL.

    Raises:
        GrammarRefused: it is invalid, uses an unsupported feature, or is too large.
    """
    error = LLMatcher.validate_grammar(grammar, None, limits=LIMITS)
    if error and not error.startswith("WARNING"):
        raise GrammarRefused(grammar_refusal(error))


def grammar_refusal(error: str) -> str:
    """Turn llguidance's message, several lines with a piece of the grammar, into one sentence about the schema."""
    if match := re.search(r'Unimplemented keys: \["([^"]*)"', error):
        return f"The schema's keyword '{match[1]}' is not supported."
    if match := re.search(r"Unknown format: (.*)", error):
        return f"The schema's format '{match[1]}' is not supported."
    if "oneOf constraints are not supported" in error:
        return "The schema's keyword 'oneOf' is supported only where at most one branch can match; use 'anyOf'."
    if "regex parse error" in error or "in regex" in error:
        why = re.search(r"^error: (.*)", error, re.MULTILINE) or re.search(r"(lookarounds[^;]*)", error)
        return f"The pattern is not supported{f': {why[1]}' if why else ''}."
    if match := re.search(r"Unsatisfiable schema: (Regex is empty)?(.*)", error):
        return f"No value can satisfy the schema{'' if match[1] else f': {match[2]}'}."
    if match := re.search(r"(Pointer|Anchor) '([^']*)' does not exist", error):
        return f"The schema's $ref '#{match[2]}' does not exist."
    if "NoExtension" in error:
        return "No text can satisfy the grammar."
    if _is_limit(error):
        return TOO_COMPLEX
    return f"The grammar cannot be used: {_first_line(error)}."


def grammar_end(error: str) -> str:
    """Turn llguidance's message about a running answer into one sentence."""
    why = "it is too complex" if _is_limit(error) else _first_line(error)
    return f"The grammar cannot be continued: {why}."


def _is_limit(error: str) -> bool:
    return any(words in error.lower() for words in _LIMIT_WORDS)


def _first_line(error: str) -> str:
    """The first line, without the position in the grammar, which the user did not write."""
    first = next(iter(_lines(error)), "an internal error")
    return re.sub(r"^at \d+\(\d+\): (failed to compile JSON schema: )?", "", first)[:200].rstrip(". ")


def _lines(error: str) -> list[str]:
    return [line.strip() for line in error.splitlines() if line.strip() and line.strip() != "<non-verbose/>"]
