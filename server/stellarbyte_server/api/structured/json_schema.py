"""JSON schemas that cannot be enforced are refused with a 400 that names the reason.

llguidance implements most of JSON Schema and bounds most of its own work. What it would ignore, answer wrongly or take
minutes for is refused or said differently here, so that every answer is valid and no grammar holds up a server:

- Regular expressions that must hold at once multiply: four harmless-looking ones take a second for one mask, six take
  minutes to compile. So do multiples of large numbers. Properties of which some must be there cost their number cubed.
- Long constants cost time when a mask first meets them: 60 kB of them 5 to 10 ms. A thousand branches end an answer in
  the middle.
- Its grammar allows the same key twice, which parsers count once; and `\\u0061` for a key `a` that has its own schema.
- Its numbers are 64-bit floats: beyond 2**53 it would allow others than the schema does.
- Its years have a 29 February and its minutes a 61st second, which common parsers refuse.
- Its regular expressions are Rust's, where some signs mean something else than in a schema. Sets that have all control
  characters it lets have the quote and the backslash too, whatever they say: `[^"]` is read as any character.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any
from urllib.parse import unquote

from stellarbyte_server.api.contract.errors import ApiError, bad_request
from stellarbyte_server.api.structured.json_patterns import EXACT_FORMATS, rust_pattern

MAX_SCHEMA_BYTES = 65_536
MAX_DEPTH = 32
MAX_REFERENCES = 100
MAX_TEXT_LENGTH = 4_096
MAX_PROPERTIES = 1_000
MAX_COUNTED_PROPERTIES = 100  # where minProperties or maxProperties is used
MAX_PATTERN_PROPERTIES = 32
MAX_BRANCHES = 500
MAX_PATTERNS_AT_ONCE = 3
MAX_MULTIPLE = 10_000
MAX_NAMES_JOINED = 1_000_000  # of properties, wherever schemas apply at once or by choice: 0.3 s
MAX_COUNT = 2**31 - 1
MAX_NUMBER = 2**53
_DRAFTS = ("draft-07/schema", "draft/2019-09/schema", "draft/2020-12/schema")
_ANNOTATIONS = frozenset(
    "$comment title description default examples example deprecated readOnly writeOnly contentMediaType"
    " contentEncoding discriminator externalDocs xml".split()
)
_ONE = frozenset(("items", "additionalItems", "additionalProperties"))
_MANY = frozenset(("allOf", "anyOf", "oneOf", "prefixItems"))
_NAMED = frozenset(("properties", "patternProperties", "$defs", "definitions"))
_COUNTS = frozenset(("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties"))
_NUMBERS = frozenset(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"))
_FORMATS = frozenset("date-time time date duration email hostname ipv4 ipv6 uuid uri".split())


@dataclass(frozen=True, kw_only=True)
class _AtOnce:
    """How many patterns, formats and lengths apply to one text: here, in properties by name, and in all else inside."""

    here: int = 0
    named: dict[str, int] = field(default_factory=dict)
    others: int = 0

    @property
    def most(self) -> int:
        return max(self.here, self.others, *self.named.values())

    def joined(self, other: "_AtOnce", join: Callable[[int, int], int]) -> "_AtOnce":
        names = {**self.named, **other.named}
        named = {name: join(self.named.get(name, self.others), other.named.get(name, other.others)) for name in names}
        others = join(self.others, other.others)
        return _AtOnce(
            here=join(self.here, other.here),
            named={name: bound for name, bound in named.items() if bound != others},
            others=others,
        )


class EnforceableSchema:
    """A copy of a schema in which everything is known, small enough, and said so that llguidance gets it right."""

    def __init__(self, schema: dict[str, Any] | bool, param: str) -> None:
        self._param = param
        self._nodes: dict[int, dict[str, Any]] = {}  # every schema inside the schema, by identity
        self._num_properties = 0
        self._num_pattern_properties = 0
        self._counts_properties = False
        self._multiples: set[int] = set()
        self._num_joined = 0
        self.root: dict[str, Any] = self._copy(schema)
        self._take_document_keywords()
        self._visit(self.root, "#")
        for node in list(self._nodes.values()):
            self._check_reference(node)
        for node in list(self._nodes.values()):
            self._say_differently(node)
        self._check_size()

    def _refuse(self, why: str, path: str = "#") -> ApiError:
        return bad_request(f"The schema{_at(path)} {why}.", self._param)

    def _copy(self, schema: dict[str, Any] | bool) -> dict[str, Any]:
        if schema is True:
            return {}
        if schema is False:
            raise self._refuse("is false, which allows no value")
        budget = MAX_SCHEMA_BYTES
        level: list[Any] = [schema]
        for _ in range(MAX_DEPTH):
            budget -= sum(map(len, level))
            if budget < 0:
                raise self._refuse(f"is larger than {MAX_SCHEMA_BYTES} bytes")
            level = [inner for value in level for inner in _inner(value)]
            level = [value for value in level if isinstance(value, dict | list)]
            if not level:
                break
        else:
            raise self._refuse(f"is nested deeper than {MAX_DEPTH} levels")
        try:
            text = json.dumps(schema, ensure_ascii=False, allow_nan=False)
            num_bytes = len(text.encode())
        except (ValueError, TypeError) as error:
            raise self._refuse("has a character or a number that JSON does not know") from error
        if num_bytes > MAX_SCHEMA_BYTES:
            raise self._refuse(f"is larger than {MAX_SCHEMA_BYTES} bytes")
        copied: dict[str, Any] = json.loads(text)
        return copied

    def _take_document_keywords(self) -> None:
        """$schema and $id speak of the document; what they would change is refused elsewhere."""
        draft = self.root.pop("$schema", None)
        if draft is not None and not (isinstance(draft, str) and draft.rstrip("#").endswith(_DRAFTS)):
            raise self._refuse("names a $schema other than draft-07, 2019-09 and 2020-12")
        if not isinstance(self.root.pop("$id", ""), str):
            raise self._refuse("must be a string", "#/$id")

    def _visit(self, node: Any, path: str) -> None:
        if isinstance(node, bool):
            return
        if not isinstance(node, dict):
            raise self._refuse("must be an object or a boolean", path)
        self._nodes[id(node)] = node
        for keyword, value in node.items():
            if _says_nothing(keyword):
                continue
            place = f"{path}/{keyword}"
            if keyword in _MANY or (keyword == "items" and isinstance(value, list)):
                if not isinstance(value, list):
                    raise self._refuse("must be a list", place)
                if len(value) > MAX_BRANCHES:
                    raise self._refuse(f"has more than {MAX_BRANCHES} entries", place)
                for index, inner in enumerate(value):
                    self._visit(inner, f"{place}/{index}")
            elif keyword in _ONE:
                self._visit(value, place)
            elif keyword in _NAMED:
                self._visit_named(keyword, value, place)
            else:
                self._check_keyword(keyword, value, path)

    def _visit_named(self, keyword: str, value: Any, place: str) -> None:
        if not isinstance(value, dict):
            raise self._refuse("must be an object", place)
        for name, inner in value.items():
            if keyword == "patternProperties":
                self._check_pattern(name, place)
            else:
                self._check_literal(name, place)
            self._visit(inner, f"{place}/{name}")
        self._num_properties += len(value) if keyword == "properties" else 0
        self._num_pattern_properties += len(value) if keyword == "patternProperties" else 0

    def _check_keyword(self, keyword: str, value: Any, path: str) -> None:
        """Of a keyword that has no schemas in it."""
        place = f"{path}/{keyword}"
        if keyword in _COUNTS:
            self._check_count(keyword, value, place)
        elif keyword in _NUMBERS:
            self._check_number(keyword, value, place)
        elif keyword in ("const", "enum"):
            self._check_values(keyword, value, place)
        elif keyword == "type":
            if value == [] or not _is_texts(value if isinstance(value, list) else [value]):
                raise self._refuse("must be a string or a list of strings", place)
        elif keyword == "required":
            if not isinstance(value, list) or not _is_texts(value):
                raise self._refuse("must be a list of strings", place)
        elif keyword == "pattern":
            self._check_pattern(value, place)
        elif keyword == "format":
            if not isinstance(value, str):
                raise self._refuse("must be a string", place)
            if value not in _FORMATS:
                raise bad_request(f"The schema's format {json.dumps(value)[:80]} is not supported.", self._param)
        elif keyword != "$ref" and not (keyword == "uniqueItems" and value is False):  # see _check_reference
            raise bad_request(f"The schema's keyword '{keyword[:80]}'{_at(path)} is not supported.", self._param)

    def _check_count(self, keyword: str, value: Any, place: str) -> None:
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_COUNT:
            raise self._refuse(f"must be a whole number from 0 to {MAX_COUNT}", place)
        if keyword == "minProperties" and value > 1:
            raise self._refuse("must be 0 or 1; more is not supported", place)
        self._counts_properties |= keyword == "maxProperties" or (keyword == "minProperties" and value > 0)

    def _check_number(self, keyword: str, value: Any, place: str) -> None:
        self._check_literal(value, place)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self._refuse("must be a number", place)
        if keyword == "multipleOf":
            self._multiples.add(self._digits(value, place))

    def _check_values(self, keyword: str, value: Any, place: str) -> None:
        if keyword == "enum" and not (isinstance(value, list) and value):
            raise self._refuse("must be a list of at least one value", place)
        if keyword == "enum" and sum(isinstance(entry, dict | list) for entry in value) > MAX_BRANCHES:
            raise self._refuse(f"has more than {MAX_BRANCHES} objects and lists", place)
        self._check_literal(value, place)

    def _digits(self, multiple: float, place: str) -> int:
        """The digits of a multipleOf as a whole number: 25 for 2.5."""
        if multiple <= 0:
            raise self._refuse("must be greater than 0", place)
        sign_digits_exponent = Decimal(repr(multiple)).normalize()
        exponent = int(sign_digits_exponent.as_tuple().exponent)
        if exponent < -9:
            raise self._refuse("has more than 9 decimal places", place)
        return int(sign_digits_exponent.scaleb(-exponent)) * 10 ** max(exponent, 0)

    def _check_literal(self, value: Any, place: str) -> None:
        if isinstance(value, dict | list):
            for inner in _inner(value):
                self._check_literal(inner, place)
        elif isinstance(value, str):
            if len(value) > MAX_TEXT_LENGTH or re.search(r"[\x00-\x07\x0b\x0e-\x1f\x7f]", value):
                raise self._refuse(
                    f"has a text with control characters or of more than {MAX_TEXT_LENGTH} characters", place
                )
        elif isinstance(value, int | float) and abs(value) > MAX_NUMBER:
            raise self._refuse("has a number beyond 2**53, which is not supported", place)

    def _check_pattern(self, pattern: Any, place: str) -> None:
        if not isinstance(pattern, str) or len(pattern) > MAX_TEXT_LENGTH:
            raise self._refuse(f"must be a regular expression of at most {MAX_TEXT_LENGTH} characters", place)
        try:
            rust_pattern(pattern)
        except ValueError as error:
            raise self._refuse(f"has {json.dumps(str(error))} in a pattern, which is not supported", place) from error

    def _check_reference(self, node: dict[str, Any]) -> None:
        if "$ref" in node:
            target = self._target(node["$ref"])
            if not isinstance(target, bool) and id(target) not in self._nodes:
                shown = json.dumps(node["$ref"])[:120]
                raise bad_request(f"The schema's $ref {shown} leads to no schema inside the schema.", self._param)

    def _target(self, reference: Any) -> Any:
        """What "#/a/b" points to, or None."""
        if not isinstance(reference, str) or not re.match(r"#(/|$)", reference):
            return None
        target: Any = self.root
        for step in unquote(reference[1:]).split("/")[1:]:
            name = step.replace("~1", "/").replace("~0", "~")
            if isinstance(target, dict):
                target = target.get(name)
            elif isinstance(target, list) and name.isdecimal() and int(name) < len(target):
                target = target[int(name)]
            else:
                return None
        return target

    def _say_differently(self, node: dict[str, Any]) -> None:
        for keyword in [keyword for keyword in node if _says_nothing(keyword)]:
            del node[keyword]  # beside some of them llguidance does not follow a $ref into a circle
        node.pop("uniqueItems", None)  # it is false
        if "pattern" in node:
            node["pattern"] = rust_pattern(node["pattern"])
        if "patternProperties" in node:
            named = node["patternProperties"].items()
            node["patternProperties"] = {rust_pattern(pattern): inner for pattern, inner in named}
        exact = EXACT_FORMATS.get(node.get("format", ""))
        if exact is not None:
            del node["format"]
            node.setdefault("allOf", []).append({"pattern": exact})
        if "oneOf" in node:
            node["x-any"] = (
                True  # with any other key beside it, oneOf's branches are looked up before they are compared
            )

    def _check_size(self) -> None:
        most = MAX_COUNTED_PROPERTIES if self._counts_properties else MAX_PROPERTIES
        if self._num_properties > most:
            counted = " while it uses minProperties or maxProperties" if self._counts_properties else ""
            raise self._refuse(f"has more than {most} properties{counted}")
        if self._num_pattern_properties > MAX_PATTERN_PROPERTIES:
            raise self._refuse(f"has more than {MAX_PATTERN_PROPERTIES} patternProperties")
        product = 1
        for multiple in self._multiples:
            product *= multiple
        if product > MAX_MULTIPLE:
            raise self._refuse(f"has values of multipleOf whose product is more than {MAX_MULTIPLE}")
        if self._at_once(self.root, {}).most > MAX_PATTERNS_AT_ONCE:
            raise self._refuse(
                f"lets more than {MAX_PATTERNS_AT_ONCE} patterns, formats and lengths apply to the same text"
            )

    def _at_once(self, node: Any, known: dict[int, _AtOnce], depth: int = 0) -> _AtOnce:
        """An upper bound for what one text in `node` has to match at once, with every branch taken that may apply."""
        if not isinstance(node, dict):
            return _AtOnce()
        if id(node) in known:
            return known[id(node)]
        if depth > MAX_REFERENCES:
            raise self._refuse(f"goes through more than {MAX_REFERENCES} references in a row")
        known[id(node)] = _AtOnce()  # llguidance refuses what would add itself to itself

        def look(value: Any) -> _AtOnce:
            return self._at_once(value, known, depth + 1)

        def joined(one: _AtOnce, other: _AtOnce, join: Callable[[int, int], int]) -> _AtOnce:
            self._num_joined += len(one.named) + len(other.named)
            if self._num_joined > MAX_NAMES_JOINED:
                raise self._refuse("has too many combinations of schemas for the same properties")
            return one.joined(other, join)

        def most(values: Any) -> int:
            return max((look(value).most for value in values), default=0)

        any_name = most(node.get("patternProperties", {}).values())
        items = [node["items"]] if isinstance(node.get("items"), dict) else node.get("items") or []
        elements = [*(items if isinstance(items, list) else []), *node.get("prefixItems", [])]
        result = _AtOnce(
            here=("pattern" in node) + ("format" in node) + ("minLength" in node or "maxLength" in node),
            named={name: look(value).most + any_name for name, value in node.get("properties", {}).items()},
            others=max(any_name, most([node.get("additionalProperties"), node.get("additionalItems"), *elements])),
        )
        for value in [*node.get("allOf", []), *([self._target(node["$ref"])] if "$ref" in node else [])]:
            result = joined(result, look(value), int.__add__)
        for keyword in ("anyOf", "oneOf"):
            branches = _AtOnce()
            for value in node.get(keyword, []):
                branches = joined(branches, look(value), max)
            result = joined(result, branches, int.__add__)
        known[id(node)] = result
        return result


def _at(path: str) -> str:
    shown = "".join(character if character.isprintable() else "?" for character in path[:120])
    return "" if shown == "#" else f" at {shown}"


def _says_nothing(keyword: str) -> bool:
    """Whether it only describes. x-guidance does not: it would change what is written above."""
    return keyword in _ANNOTATIONS or (keyword.startswith("x-") and keyword != "x-guidance")


def _is_texts(values: list[Any]) -> bool:
    return all(isinstance(value, str) for value in values)


def _inner(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [*value, *value.values()]
    return value if isinstance(value, list) else []
