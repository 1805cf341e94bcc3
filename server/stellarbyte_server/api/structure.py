"""Makes a grammar from the structure that a request asks for, in any of several fields."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from fastapi import Request
from pydantic_core import from_json

from stellarbyte_server.api.caller import owner_of
from stellarbyte_server.api.contract.bodies.bounds import too_large
from stellarbyte_server.api.contract.bodies.generation import GenerationBody, StructuredOutputs
from stellarbyte_server.api.contract.errors import bad_request
from stellarbyte_server.api.generation import off_loop
from stellarbyte_server.api.service import Service
from stellarbyte_server.api.structured.answer_check import AnswerCheck
from stellarbyte_server.api.structured.grammars import checked, json_grammar
from stellarbyte_server.api.structured.text_grammars import choice_grammar, lark_grammar, regex_grammar
from stellarbyte_server.api.submission import record_of

GUIDED = ("guided_json", "guided_regex", "guided_choice", "guided_grammar")


class Structure(NamedTuple):
    """The required form of an answer's text: JSON by a schema, or another grammar."""

    param: str  # the field of the request
    schema: dict[str, Any] | None = None
    strict: bool = False
    make: Callable[[], str] | None = None  # makes a grammar other than a schema's; raises ApiError

    def grammar(self) -> str:
        """The grammar's text; ApiError if it cannot be enforced."""
        if self.make is not None:
            return self.make()
        assert self.schema is not None
        return json_grammar(self.schema, self.param, strict=self.strict)


class Grammar(NamedTuple):
    """The grammar that the engine enforces, and the check of the finished answer."""

    text: str | None = None  # in llguidance's Lark; None: any answer
    param: str | None = None  # the field of the request
    check: AnswerCheck | None = None


def requested_structure(body: GenerationBody) -> Structure | None:
    """The structure that `structured_outputs` or a `guided_` field asks for; ApiError if several do."""
    found: list[Structure] = []
    outputs = body.structured_outputs
    if outputs is not None:
        found.append(_of_outputs(outputs))
    for param in GUIDED:
        value = getattr(body, param)
        if value is not None:
            found.append(_structure(param.removeprefix("guided_"), value, param))
    return only_one(*found)


def only_one(*structures: Structure | None) -> Structure | None:
    """The structure that is given, if any; ApiError if several are."""
    found = [structure for structure in structures if structure is not None]
    if len(found) > 1:
        first, second = found[0].param, found[1].param
        raise bad_request(f"'{second}' cannot be combined with '{first}'; give one of them.", second)
    return found[0] if found else None


def _of_outputs(outputs: StructuredOutputs) -> Structure:
    kind, value = outputs.only
    return _structure(kind, value, f"structured_outputs.{kind}")


def _structure(kind: str, value: Any, param: str) -> Structure:
    if kind == "json_object":
        return Structure(param, {"type": "object"})
    if kind == "json":
        return Structure(param, _schema(value, param) if isinstance(value, str) else value)
    if kind == "choice":
        return Structure(param, make=partial(choice_grammar, value))
    return Structure(param, make=partial(regex_grammar if kind == "regex" else lark_grammar, value, param))


def _schema(text: str, param: str) -> dict[str, Any]:
    """Parse a schema given as a string of JSON."""
    reason = too_large(text.encode(errors="surrogatepass"))
    try:
        schema = None if reason is not None else from_json(text, allow_inf_nan=False)
    except ValueError:
        schema = None
    if not isinstance(schema, dict):
        raise bad_request(f"The field '{param}' is not valid: it must be a JSON schema, an object.", param)
    return schema


async def enforceable(http: Request, service: Service, make: Callable[[], str], param: str) -> Grammar:
    """Make a grammar, in a thread because schemas may be large, and check that the engine can use it."""
    text = await off_loop(http, service, make, record_of(http).body_bytes)
    return Grammar(await checked(text, param, service.text_work, owner_of(http)), param)


async def text_grammar(http: Request, service: Service, structure: Structure | None) -> Grammar:
    """The grammar of an answer without tool calls; ApiError naming the field if it cannot be enforced."""
    if structure is None:
        return Grammar()
    grammar = await enforceable(http, service, structure.grammar, structure.param)
    return grammar._replace(check=AnswerCheck.of(None if structure.strict else structure.schema))
