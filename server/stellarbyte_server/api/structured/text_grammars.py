"""Grammars other than JSON schemas: a regular expression, a choice of texts, a grammar in Lark or GBNF."""

import json
import re
from collections.abc import Sequence

from llguidance.gbnf_to_lark import GbnfToLarkError, gbnf_to_lark

from stellarbyte_server.api.contract.errors import bad_request

_START_OF_LARK = re.compile(r"^\s*[?!]?start\s*[:.\[{]", re.MULTILINE)
# Strings, comments and regular expressions in Lark.
_QUOTED = re.compile(r'"(?:\\.|[^"\\\n])*"|//[^\n]*|/(?:\\.|[^/\\\n])+/')
# llguidance's extensions of Lark: embedded languages, and intersections, which multiply (see json_schema).
_EXTENSION = re.compile(r"%(?!ignore\b|import\b)\w*|&|~(?!\s*\d)")
_PIECES = re.compile(r"\\.|/|\n", re.DOTALL)


def choice_grammar(choices: Sequence[str]) -> str:
    """The grammar of one of these texts."""
    return f"start: {' | '.join(json.dumps(choice, ensure_ascii=False) for choice in choices)}\n"


def regex_grammar(pattern: str, param: str) -> str:
    """The grammar of texts that a regular expression, in Rust's syntax, matches as a whole; ApiError."""
    if (len(pattern) - len(pattern.rstrip("\\"))) % 2:
        raise bad_request(f"The field '{param}' is not valid: the pattern ends within an escape.", param)
    return f"start: /{_PIECES.sub(_within_slashes, pattern)}/\n"


def _within_slashes(match: re.Match[str]) -> str:
    return {"/": "\\/", "\n": "\\n", "\\\n": "\\n"}.get(match[0], match[0])


def lark_grammar(grammar: str, param: str) -> str:
    """The grammar in Lark, converted from GBNF if necessary; ApiError."""
    if "::=" in grammar and _START_OF_LARK.search(grammar) is None:
        try:
            return str(gbnf_to_lark(grammar))
        except GbnfToLarkError as error:
            raise bad_request(f"The field '{param}' is not a valid GBNF grammar: {str(error)[:200]}.", param) from None
        except (RecursionError, ValueError, IndexError, KeyError):
            raise bad_request(
                f"The field '{param}' is not a valid GBNF grammar, or nested too deeply.", param
            ) from None
    if (extension := _EXTENSION.search(_QUOTED.sub('""', grammar))) is not None:
        raise bad_request(
            f"The field '{param}' is not valid: {extension[0]!r} is not supported in a grammar; give a JSON schema as"
            " 'json'.",
            param,
        )
    return grammar + "\n"
