"""Rewrites regular expressions and formats of JSON schemas so that llguidance matches what the schema allows."""

import functools
import json
import re
from typing import Any

from stellarbyte_server.protocol.grammar import GrammarRefused, check_grammar

_SIGNS = re.compile(
    r"\\[pP](?:\{[^}]*\}|.)|\\[xu]\{[^}]*\}|\\x..|\\u....|\\.|\(\?[a-zA-Z-]*|\[\^?\]?|\]|&&|--|~~|\0", re.DOTALL
)
_PROPERTY = re.compile(  # Unicode properties without control characters
    r"\\p(?:[LMNPSZ]|\{(?:[LMNPSZ][a-z]?|(?:(?:Script|sc)=)?"
    r"(?:Latin|Greek|Cyrillic|Han|Hiragana|Katakana|Hangul|Arabic|Hebrew|Thai|Devanagari))\})"
)

_YEAR = "(?:[0-9]{3}[1-9]|[0-9]{2}[1-9]0|[0-9][1-9]00|[1-9]000)"
_LEAP_YEAR = "(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:0[48]|[2468][048]|[13579][26])00)"
_DAY = "(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)|02-(?:0[1-9]|1[0-9]|2[0-8])"
_DATE = f"(?:{_YEAR}-(?:{_DAY})|{_LEAP_YEAR}-02-29)"
_HOUR = "(?:[01][0-9]|2[0-3]):[0-5][0-9]"
_TIME = rf"{_HOUR}:[0-5][0-9](?:\.[0-9]{{1,6}})?(?:Z|[+-]{_HOUR})"
EXACT_FORMATS = {"date": f"^{_DATE}$", "time": f"^{_TIME}$", "date-time": f"^{_DATE}T{_TIME}$"}


def rust_pattern(pattern: str) -> str:
    """The pattern for llguidance; ValueError with the first token that llguidance would interpret differently.

    Answers contain no NUL, because its only JSON escape, \\u0000, is not allowed: negated sets exclude it, and
    elsewhere in a pattern it is refused.
    """
    in_class = in_negated = False

    def say(match: re.Match[str]) -> str:
        nonlocal in_class, in_negated
        sign = match[0]
        foreign = False
        if sign == "\0" or sign.startswith(("\\x", "\\u")):
            digits = sign[2:].strip("{}")
            foreign = not in_negated and set(digits) <= {"0"}
        elif sign.startswith(("\\p", "\\P")):
            foreign = not _PROPERTY.fullmatch(sign)
        elif sign.startswith("\\"):
            foreign = sign[1] in "aAzZQEGhHRX<>"
        elif sign.startswith("(?"):
            foreign = not in_class and bool(set(sign[2:]) - set("imsP-"))
        elif sign.startswith("["):
            foreign = in_class or sign.endswith("]")
            in_class, in_negated = True, sign == "[^"
            sign = "[^\\x00" if in_negated else sign
        elif sign == "]":
            in_class = in_negated = False
        else:
            foreign = in_class
        if foreign:
            raise ValueError(match[0])
        return sign

    return _SIGNS.sub(say, pattern)


@functools.lru_cache(maxsize=1024)
def is_regular(pattern: str) -> bool:
    """Whether llguidance can use a result of `rust_pattern`: it must have no look-around and no backreferences."""
    return is_usable({"type": "string", "pattern": pattern})


def is_usable(schema: dict[str, Any]) -> bool:
    """Whether llguidance accepts a schema unchanged."""
    try:
        check_grammar(f"start: %json {json.dumps(schema)}\n")
    except GrammarRefused:
        return False
    return True
