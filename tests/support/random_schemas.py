"""Random JSON schemas, and a model that writes whatever a grammar lets it, for tests of structured output."""

import random
from collections.abc import Callable
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from stellarbyte_server.engine.grammar.token_grammar import TokenGrammar


class RandomSchemas:
    """Schemas from a seed, of all the kinds that are supported, most of them satisfiable in few tokens."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def document(self) -> dict[str, Any]:
        self._names = [f"T{number}" for number in range(self._random.randint(0, 2))]
        schema = self.object(3) if self._random.random() < 0.7 else self.any(3)
        if self._names:
            schema = {**schema, "$defs": {name: self.object(1, refer=False) for name in self._names}}
        return schema

    def any(self, depth: int, refer: bool = True) -> dict[str, Any]:
        kinds: list[Callable[[int, bool], dict[str, Any]]]
        kinds = [self.string, self.string, self.integer, self.number, self.enum, self.constant, self.simple]
        if depth > 0:
            kinds += [self.union, self.merged]
            schema = self._random.choice([*kinds, None, None, None])
            if schema is None:
                return self._random.choice([self.object, self.array])(depth - 1, refer)
            return schema(depth - 1, refer)
        return self._random.choice(kinds)(0, refer)

    def object(self, depth: int, refer: bool = True) -> dict[str, Any]:
        names = self._random.sample(
            ["a", "name", "é", "with space", 'quote"', "/", "list", "x"], self._random.randint(0, 4)
        )
        schema: dict[str, Any] = {
            "type": "object",
            "properties": {name: self.inner(depth, refer) for name in names},
            "required": [name for name in names if self._random.random() < 0.5],
            "additionalProperties": self._random.choice([False, False, False, {"type": "integer"}]),
        }
        if not names and self._random.random() < 0.3:
            schema |= {"minProperties": 1, "maxProperties": 3, "additionalProperties": {"type": "boolean"}}
        if self._random.random() < 0.1:
            schema["patternProperties"] = {"^p_[a-z]+$": {"type": "null"}}
        return schema

    def inner(self, depth: int, refer: bool) -> dict[str, Any]:
        if refer and self._names and self._random.random() < 0.3:
            return {"$ref": f"#/$defs/{self._random.choice(self._names)}"}
        return self.any(depth, refer)

    def array(self, depth: int, refer: bool) -> dict[str, Any]:
        fewest = self._random.randint(0, 2)
        schema = {"type": "array", "items": self.inner(depth, refer), "minItems": fewest}
        if self._random.random() < 0.7:
            schema["maxItems"] = fewest + self._random.randint(0, 2)
        if self._random.random() < 0.2:
            schema["prefixItems"] = [self.any(0), self.any(0)]
        return schema

    def union(self, depth: int, refer: bool) -> dict[str, Any]:
        return {"anyOf": [self.inner(depth, refer) for _ in range(self._random.randint(1, 3))]}

    def merged(self, depth: int, refer: bool) -> dict[str, Any]:
        two = [self.object(depth, refer), self.object(depth, refer)]
        two[0]["properties"] = {f"{name}_0": value for name, value in two[0]["properties"].items()}
        two[0]["required"] = [f"{name}_0" for name in two[0]["required"]]
        for one in two:
            one.pop("additionalProperties")
            one.pop("minProperties", None)
            one.pop("maxProperties", None)
            one.pop("patternProperties", None)
        return {"allOf": two}

    def string(self, _depth: int, _refer: bool) -> dict[str, Any]:
        return {"type": "string"} | self._random.choice([
            {"maxLength": 12}, {"minLength": 2, "maxLength": 6}, {"pattern": "^[a-z]{1,8}$"},
            {"pattern": "^x|y$", "maxLength": 9},
            {"pattern": "^[A-Z][\\w é]{0,9}\\d?$"}, {"pattern": "\\d{3}", "maxLength": 8}, {"format": "date"},
            {"format": "uuid"}, {"format": "date-time"}, {"format": "ipv4"}, {"format": "ipv6"},
            {"format": "email", "maxLength": 20},
            {"format": "date", "pattern": "^[12]"}, {"pattern": "^[^\"\\\\]*$", "maxLength": 5},
            {"pattern": '^[^"a]{1,4}$'}, {"pattern": "^(x|[^\\\\]){0,4}$"}, {"pattern": "^\\S.[^b-z]?$"}, {},
        ])  # fmt: skip

    def integer(self, _depth: int, _refer: bool) -> dict[str, Any]:
        lowest = self._random.choice([0, -3, 1, -(10**6), 7, -(2**53)])
        return {"type": "integer"} | self._random.choice([
            {"minimum": lowest}, {"minimum": lowest, "maximum": max(lowest, 0) + 1000},
            {"exclusiveMaximum": lowest, "multipleOf": 3},
            {"exclusiveMinimum": 0.5, "maximum": 12.5}, {"multipleOf": 7},
        ])  # fmt: skip

    def number(self, _depth: int, _refer: bool) -> dict[str, Any]:
        return {"type": "number"} | self._random.choice(
            [
                {},
                {"minimum": 0, "maximum": 1},
                {"exclusiveMinimum": -0.25, "exclusiveMaximum": 3.125},
                {"maximum": -1e-3},
            ]
        )

    def enum(self, _depth: int, _refer: bool) -> dict[str, Any]:
        values = ["a", "b c", 'é"\\\n', 1, 1.5, -2, 0.1, None, True, {"k": [1, "x"]}, [], [1, 2], 1e-7, 2**53]
        return {"enum": self._random.sample(values, self._random.randint(1, 5))}

    def constant(self, _depth: int, _refer: bool) -> dict[str, Any]:
        return {"const": self._random.choice(["c", 3, False, None, {"a": {"b": 1}}, [None], "😀/"])}

    def simple(self, _depth: int, _refer: bool) -> dict[str, Any]:
        return {"type": self._random.choice(["boolean", "null", ["boolean", "null"], ["string", "integer"]])}


class WildModel:
    """Random logits at temperature 1.5 for every token, with a bias to end that grows with the text."""

    def __init__(self, tokenizer: Tokenizer, eos: int) -> None:
        self._size = tokenizer.get_vocab_size()
        self._eos = eos
        self._rng = np.random.default_rng(0)
        logits = self._rng.standard_normal(5 * self._size) * 2
        self._scores = (logits / 1.5 + self._rng.gumbel(size=logits.size)).astype(
            np.float32
        )  # sampling is their argmax
        texts = [tokenizer.decode([token_id], skip_special_tokens=False) for token_id in range(self._size)]
        self._closes = np.array(
            [set(text) <= set('"]}') or index == eos for index, text in enumerate(texts)], np.float32
        )

    def answer(self, grammar: TokenGrammar, max_tokens: int = 400) -> list[int] | None:
        """None if it is cut."""
        words = np.zeros((self._size + 31) // 32, np.uint32)
        tokens: list[int] = []
        while len(tokens) < max_tokens:
            grammar.mask(words)
            assert grammar.error is None, grammar.error
            ids = np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little"))
            assert ids.size and ids[-1] < self._size
            start = int(self._rng.integers(4 * self._size))
            scores = self._scores[start : start + self._size][ids] + self._closes[ids] * (3 + len(tokens) / 30)
            token_id = int(ids[np.argmax(scores)])
            grammar.accept(token_id)
            if token_id == self._eos:
                return tokens
            tokens.append(token_id)
        return None
