"""What a grammar may cost, and whether a text is one: HTTP processes check it before the engine compiles it."""

import re

from llguidance import LLMatcher, LLParserLimits

from stellarbyte_server.protocol.request import GRAMMAR_REFUSED

# An ordinary schema compiles in 2 to 20 ms and takes 0.1 to 1 ms for a mask, with 10 ms at worst. Fuel is what regular
# expressions cost: 50,000 in a mask are about 5 ms. A lexer state is some 300 bytes and every request has its own; a
# string with maxLength takes about five for each character, so a hostile grammar can hold 30 MB while it runs.
# Fuel does not see everything: api/structured/grammars.py says what is refused before it comes here, and why.
LIMITS = LLParserLimits(
    initial_lexer_fuel=200_000,
    step_lexer_fuel=50_000,
    step_max_items=20_000,
    max_items_in_row=2_000,
    max_lexer_states=100_000,
    max_grammar_size=50_000,
    precompute_large_lexemes=False,  # it walks the whole vocabulary, which only pays when a grammar is used for long
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
    """A grammar cannot be used; str() is one sentence for the user, `code` as `RequestRejected` has it."""

    def __init__(self, message: str, code: str = GRAMMAR_REFUSED) -> None:
        super().__init__(message)
        self.code = code


def check_grammar(grammar: str) -> None:
    """Whether a grammar can be used at all, for any vocabulary. Any thread or process; lets other threads run.

    Raises:
        GrammarRefused: it is none, asks for what is not implemented, or is too large.
    """
    error = LLMatcher.validate_grammar(grammar, None, limits=LIMITS)
    if error and not error.startswith("WARNING"):
        raise GrammarRefused(grammar_refusal(error))


def grammar_refusal(error: str) -> str:
    """llguidance's message, of several lines and with a piece of the grammar, as one sentence about the schema."""
    if match := re.search(r'Unimplemented keys: \["([^"]*)"', error):
        return f"The schema's keyword '{match[1]}' is not supported."
    if match := re.search(r"Unknown format: (.*)", error):
        return f"The schema's format '{match[1]}' is not supported."
    if "oneOf constraints are not supported" in error:
        return "The schema's keyword 'oneOf' is supported only where at most one branch can match; use 'anyOf'."
    if "regex parse error" in error or "in regex" in error:
        why = re.search(r"^error: (.*)", error, re.MULTILINE) or re.search(r"(lookarounds[^;]*)", error)
        return f"The schema's pattern is not supported{f': {why[1]}' if why else ''}."
    if match := re.search(r"Unsatisfiable schema: (Regex is empty)?(.*)", error):
        return f"No value can satisfy the schema{'' if match[1] else f': {match[2]}'}."
    if match := re.search(r"(Pointer|Anchor) '([^']*)' does not exist", error):
        return f"The schema's $ref '#{match[2]}' leads nowhere."
    if "NoExtension" in error:
        return "No text can satisfy the grammar."
    if _is_limit(error):
        return TOO_COMPLEX
    return f"The grammar cannot be used: {_first_line(error)}."


def grammar_end(error: str) -> str:
    """llguidance's message about an answer that stands in a grammar, as one sentence."""
    why = "it is too complex" if _is_limit(error) else _first_line(error)
    return f"The grammar cannot be followed any further: {why}."


def _is_limit(error: str) -> bool:
    return any(words in error.lower() for words in _LIMIT_WORDS)


def _first_line(error: str) -> str:
    """Without the place in the grammar, which the user did not write."""
    first = next(iter(_lines(error)), "an internal error")
    return re.sub(r"^at \d+\(\d+\): (failed to compile JSON schema: )?", "", first)[:200].rstrip(". ")


def _lines(error: str) -> list[str]:
    return [line.strip() for line in error.splitlines() if line.strip() and line.strip() != "<non-verbose/>"]
