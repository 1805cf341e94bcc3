"""Schemas that would cost much: refused at once, or their masks are quick."""

import json
import time
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from stellarbyte.checkpoint.source import resolve_model
from stellarbyte_server.api.structured.grammars import json_grammar
from stellarbyte_server.engine.grammar import vocabulary as grammar_vocabulary
from stellarbyte_server.engine.grammar.compiler import GrammarCompiler
from stellarbyte_server.engine.grammar.token_grammar import TokenGrammar
from stellarbyte_server.protocol.grammar import check_grammar
from tests.support.schemas import refusal


@pytest.fixture(scope="module")
def demo_tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(resolve_model("demo") / "tokenizer.json"))


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(depth):
        schema = {"items": schema}
    return schema


def regex(seed: int) -> str:
    return f"^(.*{chr(97 + seed)}.{{1,30}}|\\p{{L}}{{3,9}}{chr(98 + seed)})*$"


def doubling(levels: int) -> dict[str, Any]:
    definitions: dict[str, Any] = {
        f"a{level}": {"allOf": [{"properties": {name: {"$ref": f"#/$defs/a{level + 1}"} for name in "xy"}}] * 2}
        for level in range(levels)
    }
    return {"$ref": "#/$defs/a0", "$defs": {**definitions, f"a{levels}": {"type": "string"}}}


HOSTILE = {
    "nested": nested(100_000),
    "wide": {"properties": {str(number): {} for number in range(100_000)}},
    "long": {"title": "x" * 10_000_000},
    "long constant": {"const": "x" * 60_000},
    "properties": {"properties": {f"p{number}": {} for number in range(2_000)}},
    "counted": {"properties": {f"p{number}": {} for number in range(500)}, "minProperties": 1},
    "branches": {"anyOf": [{"properties": {"a": {"const": number}}} for number in range(600)]},
    "patterns": {"allOf": [{"pattern": regex(number)} for number in range(6)]},
    "patterns by reference": {
        "$ref": "#/$defs/0",
        "$defs": {str(number): {"pattern": regex(number), "$ref": f"#/$defs/{number + 1}"} for number in range(6)}
        | {"6": {}},
    },
    "merged properties": {"allOf": [{"properties": {"a": {"pattern": regex(number)}}} for number in range(6)]},
    "multiples": {"allOf": [{"type": "integer", "multipleOf": number} for number in (1009, 1013, 10007)]},
    "pattern properties": {"patternProperties": {f"^p{number}x.*": {} for number in range(200)}},
    "references": {
        "$ref": "#/$defs/0",
        "$defs": {str(number): {"$ref": f"#/$defs/{number + 1}"} for number in range(2_000)} | {"2000": {}},
    },
    "doubling": doubling(40),
}
COSTLY = {
    "repeats": {"type": "string", "pattern": "^(a{1,1000}){1,1000}$"},
    "looking back": {"type": "string", "pattern": "^(.*a.{500}b.*c.{300})$"},
    "lengths": {"type": "string", "minLength": 10**6, "maxLength": 10**9},
    "items": {"type": "array", "minItems": 10**6, "maxItems": 10**9, "items": {"type": "array", "minItems": 10**6}},
    "properties": {"type": "object", "properties": {f"p{number}": {"type": "string"} for number in range(1_000)}},
    "enum": {"enum": [f"value {number * 7919 % 10007}" for number in range(3_500)]},
    "patterns": {"type": "string", "allOf": [{"pattern": regex(number)} for number in range(3)]},
    "multiple": {"type": "integer", "multipleOf": 9973},
    "either": {"anyOf": [{"type": "string", "pattern": regex(number), "maxLength": 90} for number in range(20)]},
    **{name: HOSTILE[name] for name in ("counted", "multiples")},
    "many patterns": {"properties": {f"p{number}": {"pattern": f"^(a{number}|b)(?!c)$"} for number in range(900)}},
    "all but": {"type": "object", "not": {"allOf": [{"pattern": regex(number)} for number in range(6)]}},
    "any of any": {"anyOf": [{"type": "array", "items": {}, "minItems": number} for number in range(500)]},
}


LEFT_OUT = {"counted", "multiples"}  # without `strict`


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("name", HOSTILE)
def test_a_schema_that_would_take_long_is_refused_at_once(name: str, strict: bool) -> None:
    started_s = time.perf_counter()
    if strict or name not in LEFT_OUT:
        refusal(HOSTILE[name], strict=strict)
    else:
        check_grammar(json_grammar(HOSTILE[name]))
    assert time.perf_counter() - started_s < 3


def test_whatever_passes_makes_its_masks_quickly(demo_tokenizer: Tokenizer) -> None:
    compiler = GrammarCompiler(demo_tokenizer, frozenset({2}), demo_tokenizer.get_vocab_size())
    compiler.prepare()
    words = np.zeros((demo_tokenizer.get_vocab_size() + 31) // 32, np.uint32)
    rng = np.random.default_rng(0)
    for name, schema in COSTLY.items():
        check_grammar(json_grammar(schema))
        compiler.submit(name, json_grammar(schema))
        started_s = time.perf_counter()
        while not (done := compiler.collect()):
            assert time.perf_counter() - started_s < 4, name
            time.sleep(0.005)
        grammar = done[0][1]
        assert isinstance(grammar, TokenGrammar), (name, grammar)
        slowest_s = 0.0
        for _ in range(50):
            started_s = time.perf_counter()
            grammar.mask(words)
            slowest_s = max(slowest_s, time.perf_counter() - started_s)
            if grammar.error is not None or grammar.is_complete:
                break
            grammar.accept(int(rng.choice(np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little")))))
        assert slowest_s < 0.3, (name, slowest_s)
    compiler.close()


def test_the_work_of_a_mask_does_not_grow_with_the_text_that_is_forced(
    demo_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each mask tokenized all that was to come of constants: of 60,000 characters, 17 ms. The answer's tokens stay
    those that the tokenizer makes of the whole text."""
    tokenized: list[int] = []
    encode = grammar_vocabulary._Tokens.__call__

    def noted(tokens: grammar_vocabulary._Tokens, text: bytes | str) -> list[int]:
        ids = encode(tokens, text)
        tokenized.append(len(ids))
        return ids

    monkeypatch.setattr(grammar_vocabulary._Tokens, "__call__", noted)
    size = demo_tokenizer.get_vocab_size()
    compiler = GrammarCompiler(demo_tokenizer, frozenset({2}), size)
    words = np.zeros((size + 31) // 32, np.uint32)
    for count in (3, 30):
        constants = [f"The quick brown fox, number {i}, jumps over the lazy dog. " * 15 for i in range(count)]
        compiler.submit("a", json_grammar({"const": constants}))
        while not (done := compiler.collect()):
            time.sleep(0.001)
        grammar, tokens = done[0][1], []
        assert isinstance(grammar, TokenGrammar)
        tokenized.clear()
        while not grammar.is_complete:
            grammar.mask(words)
            (token_id,) = np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little")).tolist()
            grammar.accept(token_id)
            tokens.append(token_id)
        assert tokens == demo_tokenizer.encode(json.dumps(constants), add_special_tokens=False).ids
        assert max(tokenized) <= 500
    compiler.close()
