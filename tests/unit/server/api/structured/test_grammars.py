"""Schemas as grammars: what is refused, and that whatever a model samples under them is valid."""

import asyncio
import datetime
import json
import math
import threading
from typing import Any

import jsonschema
import pytest
from llguidance import LLMatcher, LLTokenizer
from tokenizers import Tokenizer

from stellarbyte.checkpoint.source import resolve_model
from stellarbyte_server.api.contract.errors import ApiError
from stellarbyte_server.api.structured import grammars as structured
from stellarbyte_server.api.structured import schema_keywords
from stellarbyte_server.api.structured.grammars import checked, json_grammar, json_rule
from stellarbyte_server.engine.grammar.compiler import GrammarCompiler
from stellarbyte_server.engine.grammar.token_grammar import TokenGrammar
from stellarbyte_server.protocol.grammar import LIMITS, check_grammar
from stellarbyte_server.tokens.text_work import TextWork
from tests.support.cases import some
from tests.support.random_schemas import RandomSchemas, WildModel
from tests.support.schemas import refusal
from tests.support.servers.fake_engine import make_tokenizer
from tests.support.tools.readable import readable

FAKE = LLTokenizer(make_tokenizer().to_str(), eos_token=256)


def accepts(schema: dict[str, Any] | bool, text: str, *, strict: bool = True) -> bool:
    matcher = LLMatcher(FAKE, json_grammar(schema, strict=strict), log_level=0, limits=LIMITS)
    assert not matcher.is_error(), matcher.get_error()
    tokens = list(text.encode())
    return matcher.validate_tokens([*tokens, 256]) == len(tokens) + 1


@pytest.mark.parametrize(
    "keyword, value",
    [
        ("not", {}), ("if", {}), ("uniqueItems", True), ("contains", {}), ("propertyNames", {}), ("nullable", True),
        ("dependentRequired", {}), ("unevaluatedProperties", False), ("$dynamicRef", "#"), ("$anchor", "a"),
        ("x-guidance", {"whitespace_flexible": True}), ("maxLenght", 3), ("$schema", "x"), ("$id", "x"),
    ],
)  # fmt: skip
def test_a_keyword_that_would_be_ignored_is_refused_by_its_name_and_place(keyword: str, value: Any) -> None:
    inner = {"type": "object", "properties": {"tags": {keyword: value}}}
    assert refusal(inner) == f"The schema's keyword '{keyword}' at #/properties/tags is not supported."
    assert refusal({"anyOf": [True], "$defs": {"unused": inner}}).startswith(f"The schema's keyword '{keyword}' at ")


MANY_NAMES = {"properties": {f"p{i}": {"minLength": 1} for i in range(600)}}
CONSTRAINED = {"$ref": "#/$defs/a"}
ANY_KIND = [None, True, 0, -1.5, "x", [], {}, [0], [None], [[]], [{}], {"x": 0}, {"x": []}, [["x"], {"x": {}}]]
KEYWORDS = sorted(
    (schema_keywords.ONE | schema_keywords.MANY | schema_keywords.NAMED)
    | (schema_keywords.COUNTS | schema_keywords.NUMBERS | schema_keywords.ONE_APART | schema_keywords.NAMED_APART)
    | (schema_keywords.COUNTS_APART | schema_keywords.REFERENCES_APART)
    | set("$id $ref $schema const enum format pattern required type uniqueItems x-guidance".split())
)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("keyword", KEYWORDS)
def test_a_keyword_with_a_value_of_any_kind_is_used_or_refused_by_its_name(keyword: str, strict: bool) -> None:
    for value in ANY_KIND:
        for schema in ({keyword: value}, {"properties": {"a": {"items": {keyword: value}}}}):
            try:
                asyncio.run(checked(json_grammar(schema, strict=strict), "response_format", TextWork(), ""))
            except ApiError as error:
                assert error.status == 400 and error.param == "response_format"
                assert keyword in str(error), (schema, str(error))
                assert "\n" not in str(error)


@pytest.mark.parametrize(
    "schema, why",
    [
        (False, "allows no value"),
        ({"type": "string", "format": "int32"}, 'format "int32" is not supported'),
        ({"pattern": "(?=a)b"}, "look-around"),
        ({"pattern": "(a)\\1"}, "backreferences"),
        ({"pattern": "(a$|b)c"}, "lookarounds"),
        ({"pattern": "[a&&b]"}, '"&&"'),
        ({"pattern": "[[:alpha:]]"}, '"["'),
        ({"pattern": "[\\x00-!]"}, "x00"),
        ({"pattern": "\\P{P}"}, "{P}"),
        ({"pattern": "[\\p{Cc}]"}, "{Cc}"),
        ({"pattern": "a\\Z"}, '"\\\\Z"'),
        ({"patternProperties": {"(?x) a": {}}}, '"(?x"'),
        ({"$ref": "https://example.com/schema"}, "does not point to a schema"),
        ({"$ref": "#/$defs/a"}, "does not point to a schema"),
        ({"$ref": "#/title", "title": "a"}, "does not point to a schema"),
        ({"$ref": 5}, "does not point to a schema"),
        ({"$schema": "http://json-schema.org/draft-04/schema#"}, "$schema"),
        ({"oneOf": [{"type": "string"}, {"maxLength": 3}]}, "oneOf"),
        ({"type": "strnig"}, "strnig"),
        ({"properties": []}, "must be an object"),
        ({"anyOf": {}}, "must be a list"),
        ({"items": 5}, "must be an object or a boolean"),
        ({"minLength": -1}, "whole number"),
        ({"maxItems": 2.5}, "whole number"),
        ({"minProperties": 2}, "must be 0 or 1"),
        ({"minimum": "5", "type": "integer"}, "must be a number"),
        ({"minimum": 2**53 + 1}, "2**53"),
        ({"enum": [[10**30]]}, "2**53"),
        ({"multipleOf": 0}, "greater than 0"),
        ({"const": "\x07"}, "control characters"),
        ({"format": []}, "at #/format must be a string"),
        ({"enum": {}}, "at #/enum must be a list"),
        ({"enum": [{}] * 501}, "more than 500 objects"),
        ({"required": {}}, "at #/required must be a list of strings"),
        ({"allOf": [{"anyOf": [CONSTRAINED] * 490}] * 4, "$defs": {"a": MANY_NAMES}}, "too many combinations"),
        ({"title": "\ud800"}, "not valid in JSON"),
        ({"default": math.nan}, "not valid in JSON"),
        ({"default": 10**5000}, "not valid in JSON"),
        ({"type": "integer", "minimum": 5, "maximum": 3}, "No value can satisfy the schema"),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"type": "string", "allOf": [{"$ref": "#"}]}}}, "circular"),
    ],
)  # fmt: skip
def test_what_a_schema_asks_too_much_is_said_in_one_sentence(schema: Any, why: str) -> None:
    assert why in refusal(schema)


def test_an_answer_has_no_room_for_endless_space() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "array"}, "b": {}}, "required": ["a", "b"]}
    assert accepts(schema, '{"a": [1, 2, {"c": 3}], "b": null}')
    for text in (
        '{"a":[], "b": 1}',
        '{"a": [],"b": 1}',
        '{ "a": [], "b": 1}',
        '{"a": [], "b": 1} ',
        '{"a": [1,2], "b": 1}',
    ):
        assert not accepts(schema, text)


def test_json_mode_allows_objects_only() -> None:
    matcher = LLMatcher(FAKE, json_grammar({"type": "object"}), log_level=0)
    assert matcher.validate_tokens(list(b'{"a": [1.5e3, {}]}')) == 18
    assert matcher.validate_tokens(list(b"[]")) == 0


def test_a_rule_can_be_part_of_a_larger_grammar() -> None:
    description = 'a "quoted" // comment\n%ignore /x/ \u2028 é 😀'
    grammar = 'start: "<call>" arguments "</call>"\n' + json_rule("arguments", {"type": "null", "title": description})
    check_grammar(grammar)
    matcher = LLMatcher(FAKE, grammar, log_level=0)
    assert matcher.validate_tokens([*b"<call>null</call>", 256]) == 18


@pytest.mark.parametrize(
    "schema, valid, invalid",
    [
        # the same key in other letters would replace the value that its schema is for
        (
            {"type": "object", "properties": {"a": {"type": "null"}}, "additionalProperties": {"type": "integer"}},
            ['{"a": null, "b": 1}'],
            ['{"\\u0061": 1}', '{"a": 1}', '{"b": 1, "a": null}'],
        ),
        ({"type": "string", "format": "date"}, ['"2024-02-29"'], ['"2023-02-29"', '"1900-02-29"', '"0000-01-01"']),
        ({"format": "date", "pattern": "^2", "type": "string"}, ['"2024-01-31"'], ['"1024-01-31"', '"2024-02-30"']),
        (
            {"type": "string", "format": "date-time"},
            ['"2000-02-29T23:59:59.5+01:00"'],
            ['"2001-02-29T00:00:00Z"', '"2000-01-01T00:00:60Z"', '"2000-01-01T00:00:00"'],
        ),
        # sets without the quote and the backslash
        ({"type": "string", "pattern": '^[^"]$'}, ['"a"', '"\\\\"', '"\\n"'], ['"\\""']),
        ({"type": "string", "pattern": "^(a|[^\\\\])$"}, ['"a"', '"\\""', '"é"'], ['"\\\\"']),
        ({"type": "string", "pattern": '^[^\\x00-\\x1f"\\\\]$'}, ['"a"'], ['"\\""', '"\\\\"', '"\\n"']),
        ({"type": "object", "patternProperties": {'^[^"]$': {}}, "additionalProperties": False}, ['{"a": 1}'],
         ['{"\\"": 1}']),
        ({"type": "string", "maxLength": 1}, ['"é"', '"\\n"', '"😀"'], ['"ab"', '"\\ud800"']),
        ({"$ref": "#/$defs/a%20b~1c", "$defs": {"a b/c": {"type": "null"}}}, ["null"], ["1"]),
        ({"type": "array", "uniqueItems": False, "maxItems": 1}, ["[1]"], ["[1, 1]"]),
        (
            {"$schema": "http://json-schema.org/draft-07/schema#", "$id": "https://a/b", "items": [{"type": "null"}],
             "type": "array", "additionalItems": False},
            ["[null]"], ["[1]", "[null, null]"],
        ),
        (True, ["1", '{"a": {}}'], ["nul", ""]),
    ],
)  # fmt: skip
def test_an_answer_means_what_the_schema_says(schema: Any, valid: list[str], invalid: list[str]) -> None:
    for text in valid:
        assert accepts(schema, text), text
    for text in invalid:
        assert not accepts(schema, text), text


def test_tagged_unions_work_as_libraries_write_them() -> None:
    pets = {
        name: {
            "type": "object",
            "properties": {"kind": {"const": name}, "legs": {"type": "integer"}},
            "required": ["kind"],
        }
        for name in ("cat", "dog")
    }
    union = {"discriminator": {"propertyName": "kind"}, "oneOf": [{"$ref": "#/$defs/cat"}, {"$ref": "#/$defs/dog"}]}
    schema = {"$defs": pets, "type": "array", "items": union}
    assert accepts(schema, '[{"kind": "dog", "legs": 4}, {"kind": "cat"}]')
    assert not accepts(schema, '[{"kind": "cow"}]')
    assert accepts({"$defs": pets, "oneOf": [{"$ref": "#/$defs/cat"}, {"$ref": "#/$defs/dog"}]}, '{"kind": "cat"}')
    assert accepts(schema, '[{"kind": "cat"}]', strict=False) and not accepts(schema, '[{"kind": 1}]', strict=False)
    del pets["cat"]["required"], pets["dog"]["required"]
    assert "oneOf" in refusal(schema)


def test_a_users_schema_is_left_as_it_is() -> None:
    schema = {"$schema": "http://json-schema.org/draft-07/schema#", "properties": {"a": {"format": "date"}}}
    before = json.dumps(schema)
    json_grammar(schema)
    assert json.dumps(schema) == before


def test_a_verdict_is_asked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(structured, "check_grammar", lambda grammar: calls.append(grammar))

    async def ask() -> None:
        work = TextWork()
        for _ in range(3):
            assert await checked("start: /asked once/", "tools", work, "") == "start: /asked once/"
        assert len(calls) == 1
        for number in range(1_000):
            await checked(f"start: /{number}/", "tools", work, "")

    asyncio.run(ask())
    assert len(structured._verdicts) <= structured.NUM_REMEMBERED_VERDICTS


def test_checks_that_do_not_end_are_answered_and_keep_no_other_key_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    may_end = threading.Event()
    monkeypatch.setattr(structured, "check_grammar", lambda grammar: grammar.startswith("slow") and may_end.wait(30))
    monkeypatch.setattr(structured, "CHECK_LIMIT_S", 0.1)

    async def ask() -> None:
        work = TextWork()
        slow = [checked(f"slow {number}", "a", work, "greedy") for number in range(3)]
        errors = await asyncio.gather(*slow, return_exceptions=True)
        assert [error.status for error in errors] == [503, 503, 503]
        assert await checked("quick", "a", work, "other") == "quick"
        may_end.set()

    asyncio.run(ask())


@pytest.fixture(scope="module")
def demo_tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(resolve_model("demo") / "tokenizer.json"))


@pytest.mark.parametrize("num_schemas", some([60, 500], 0))
def test_answers_of_the_wildest_model_are_all_valid(demo_tokenizer: Tokenizer, num_schemas: int) -> None:
    """Two of each schema."""
    eos = 2
    model = WildModel(demo_tokenizer, eos)
    compiler = GrammarCompiler(demo_tokenizer, frozenset({eos}), demo_tokenizer.get_vocab_size())
    num_ended = 0
    for seed in range(num_schemas):
        schema = RandomSchemas(seed).document()
        grammar_text = json_grammar(schema, strict=True)
        check_grammar(grammar_text)
        for key in ("first", "second"):
            compiler.submit(key, grammar_text)
        grammars: list[Any] = []
        while len(grammars) < 2:
            readable([compiler.wake_up.fd], 1)
            grammars += [grammar for _, grammar in compiler.collect()]
        validator = jsonschema.Draft202012Validator(schema, format_checker=jsonschema.FormatChecker())
        for grammar in grammars:
            assert isinstance(grammar, TokenGrammar), (schema, grammar)
            tokens = model.answer(grammar)
            if tokens is None:
                continue
            num_ended += 1
            answer = json.loads(demo_tokenizer.decode(tokens))
            validator.validate(answer)
            check_dates(schema, answer)
    compiler.close()
    assert num_ended >= 1.6 * num_schemas


def check_dates(schema: dict[str, Any], answer: Any) -> None:
    """jsonschema looks at no date-time without further packages."""
    if isinstance(answer, str) and schema.get("format") == "date-time":
        datetime.datetime.fromisoformat(answer)
    for name, inner in schema.get("properties", {}).items():
        if isinstance(answer, dict) and name in answer:
            check_dates(inner, answer[name])
