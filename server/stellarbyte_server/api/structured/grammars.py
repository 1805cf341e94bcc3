"""Makes grammars in llguidance's language from JSON schemas, and checks grammars before a request is queued."""

import asyncio
import hashlib
import json
from collections import OrderedDict
from functools import partial
from typing import Any

from stellarbyte_server.api.contract.errors import ApiError, bad_request
from stellarbyte_server.api.structured.json_schema import EnforceableSchema
from stellarbyte_server.protocol.grammar import GrammarRefused, check_grammar
from stellarbyte_server.protocol.request import GRAMMARS_BUSY, QUEUE_FULL
from stellarbyte_server.tokens.text_work import TextWork, TooMuchText

CHECK_LIMIT_S = 5.0
NUM_REMEMBERED_VERDICTS = 256

# Spaces only after commas and colons, as json.dumps writes them: otherwise, a sampled answer could continue with spaces
# for ever.
_OPTIONS = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
    "json_allowed_escapes": 'nrbtf\\"',
}


def json_grammar(schema: dict[str, Any] | bool, param: str = "response_format", *, strict: bool = False) -> str:
    """The grammar of the JSON texts that a schema allows; ApiError 400 naming `param`. Must be checked with `checked`.

    Without `strict`, it omits the parts that cannot be enforced: see `answer_check`.
    """
    return json_rule("start", schema, param, strict=strict)


def json_rule(name: str, schema: dict[str, Any] | bool, param: str = "response_format", *, strict: bool = False) -> str:
    """The same as one rule of a larger grammar, on one line. `name` has lower-case letters, digits and underscores."""
    root = EnforceableSchema(schema, param, strict=strict).root
    return f"{name}: %json {json.dumps({**root, 'x-guidance': _OPTIONS}, ensure_ascii=False)}\n"


_verdicts: OrderedDict[bytes, str | None] = OrderedDict()


async def checked(grammar: str, param: str, work: TextWork, owner: str) -> str:
    """The grammar itself if the engine can use it; otherwise ApiError 400 naming `param`, or 503 at the time limit.

    Checked in a thread, in its owner's turn.
    """
    digest = hashlib.sha256(grammar.encode()).digest()
    if digest not in _verdicts:
        _verdicts[digest] = await _verdict(grammar, work, owner)
        if len(_verdicts) > NUM_REMEMBERED_VERDICTS:
            _verdicts.popitem(last=False)
    refusal = _verdicts[digest]
    _verdicts.move_to_end(digest)
    if refusal is not None:
        raise bad_request(refusal, param)
    return grammar


async def _verdict(grammar: str, work: TextWork, owner: str) -> str | None:
    """The reason why a grammar is refused, or None."""
    check = work.check(partial(check_grammar, grammar), owner, len(grammar))
    try:
        await asyncio.wait_for(check, CHECK_LIMIT_S)
    except GrammarRefused as error:
        return str(error)
    except TooMuchText as error:
        raise ApiError(429, str(error), code=QUEUE_FULL, headers={"Retry-After": "1"}) from None
    except TimeoutError:  # because of this grammar or of others, so the verdict is not remembered
        message = "The grammar could not be checked in time; it is too complex, or the server is busy."
        raise ApiError(503, message, code=GRAMMARS_BUSY, headers={"Retry-After": "5"}) from None
    return None
