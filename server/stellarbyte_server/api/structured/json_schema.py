"""Makes a JSON schema enforceable: omits, refuses or rewrites parts that llguidance would ignore or enforce wrongly.

With `strict`, such a schema gets a 400 that names the reason, so that every answer is valid. Without it, every valid
schema is accepted: unknown keywords and formats are annotations (JSON Schema 2020-12, validation, 7.2.1), and
assertions that a grammar cannot enforce are omitted from it; `answer_check` validates the finished answer. Schemas that
take minutes are refused in either case, so that no grammar blocks the server. llguidance's limits:

- Regular expressions that apply to the same text multiply: four ordinary ones take a second for one mask, six take
  minutes to compile. So do multiples of large numbers. Counted properties cost the cube of their number.
- Long constants cost time when a mask first contains them: 60 kB of them 5 to 10 ms. A thousand branches end an answer
  in the middle.
- Its grammar allows duplicate keys, which parsers count once; and `\\u0061` for a key `a` with a separate schema.
- Its numbers are 64-bit floats: beyond 2**53 it would allow numbers that the schema does not.
- Its years have a 29 February and its minutes a 61st second, which common parsers refuse.
- Its regular expressions are Rust's, where some tokens differ in meaning from a schema's. It adds the quote and the
  backslash to sets that contain all control characters: `[^"]` matches any character.
"""

import json
import re
from functools import partial
from typing import Any
from urllib.parse import unquote

from stellarbyte_server.api.contract.errors import ApiError, bad_request
from stellarbyte_server.api.structured import schema_keywords as keywords
from stellarbyte_server.api.structured.json_patterns import EXACT_FORMATS, is_regular, is_usable, rust_pattern
from stellarbyte_server.api.structured.patterns_at_once import PatternsAtOnce, TooMuchAtOnce
from stellarbyte_server.api.structured.schema_values import (
    InvalidSchema,
    NotEnforceable,
    check_literal,
    digits,
    is_texts,
    parts,
    plain_value,
    whole_number,
)


class EnforceableSchema:
    """A bounded copy of a schema, rewritten so that llguidance enforces all of it.

    `root` is that copy, and `whole` an unchanged copy. `left_out` has the paths of the parts omitted from `root`; with
    `strict` it is empty.
    """

    def __init__(self, schema: dict[str, Any] | bool, param: str, *, strict: bool) -> None:
        self.left_out: list[str] = []
        self._param = param
        self._strict = strict
        self._nodes: dict[int, dict[str, Any]] = {}  # every schema inside the schema, by identity
        self._apart: dict[int, dict[str, Any]] = {}  # schemas inside omitted keywords
        self._names: set[str] = set()  # $id and anchors, to which references may point
        self._has_inner_documents = False
        self._num_properties = 0
        self._num_pattern_properties = 0
        self._counts_properties = False
        self._multiples: set[int] = set()
        text = self._text(schema)
        self.whole: dict[str, Any] = json.loads(text)
        self.root: dict[str, Any] = json.loads(text)
        self._take_document_keywords()
        self._visit(self.root, "#")
        for node in [*self._nodes.values(), *self._apart.values()]:
            self._check_reference(node)
        for node in list(self._nodes.values()):
            self._say_differently(node)
        self._check_size()

    def _refuse(self, why: str, path: str = "#") -> ApiError:
        return bad_request(f"The schema{_at(path)} {why}.", self._param)

    def _leave_out(self, why: str, path: str = "#") -> None:
        """Record an omitted part; ApiError with `strict`."""
        if self._strict:
            raise self._refuse(why, path)
        self.left_out.append(path)

    def _text(self, schema: dict[str, Any] | bool) -> str:
        if schema is True:
            return "{}"
        if schema is False:
            raise self._refuse("is false, which allows no value")
        most = keywords.MAX_SCHEMA_BYTES
        budget = most
        level: list[Any] = [schema]
        for _ in range(keywords.MAX_DEPTH):
            budget -= sum(map(len, level))
            if budget < 0:
                raise self._refuse(f"is larger than {most} bytes")
            level = [inner for value in level for inner in parts(value)]
            level = [value for value in level if isinstance(value, dict | list)]
            if not level:
                break
        else:
            raise self._refuse(f"is nested deeper than {keywords.MAX_DEPTH} levels")
        try:
            text = json.dumps(schema, ensure_ascii=False, allow_nan=False)
            num_bytes = len(text.encode())
        except (ValueError, TypeError) as error:
            raise self._refuse("has a character or a number that is not valid in JSON") from error
        if num_bytes > most:
            raise self._refuse(f"is larger than {most} bytes")
        return text

    def _take_document_keywords(self) -> None:
        """Remove $schema and $id, which describe the document; keywords that depend on them are refused elsewhere."""
        draft = self.root.pop("$schema", None)
        is_known = isinstance(draft, str) and draft.rstrip("#").endswith(keywords.DRAFTS)
        if draft is not None and not is_known and (self._strict or not isinstance(draft, str)):
            raise self._refuse("names a $schema other than draft-07, 2019-09 and 2020-12")
        name = self.root.pop("$id", "")
        if not isinstance(name, str):
            raise self._refuse("must be a string", "#/$id")
        self._names.add(name)

    def _visit(self, node: Any, path: str) -> None:
        if isinstance(node, bool):
            return
        if not isinstance(node, dict):
            raise self._refuse("must be an object or a boolean", path)
        self._nodes[id(node)] = node
        if not self._strict:
            _say_limits_as_numbers(node)
        for keyword, value in list(node.items()):
            if _says_nothing(keyword):
                continue
            place = f"{path}/{keyword}"
            if keyword in keywords.MANY or (keyword == "items" and isinstance(value, list)):
                self._visit_many(value, place)
            elif keyword in keywords.ONE:
                self._visit(value, place)
            elif keyword == "patternProperties":
                self._visit_patterns(node, value, place)
            elif keyword in keywords.NAMED:
                self._visit_named(keyword, value, place)
            elif self._is_unknown(keyword, value, path) or not self._is_enforceable(keyword, node, path):
                del node[keyword]

    def _visit_many(self, value: Any, place: str) -> None:
        if not isinstance(value, list):
            raise self._refuse("must be a list", place)
        if len(value) > keywords.MAX_BRANCHES:
            raise self._refuse(f"has more than {keywords.MAX_BRANCHES} entries", place)
        if not value and place.endswith(("/anyOf", "/oneOf")):
            raise self._refuse("must have at least one schema", place)
        for index, inner in enumerate(value):
            self._visit(inner, f"{place}/{index}")

    def _visit_named(self, keyword: str, value: Any, place: str) -> None:
        if not isinstance(value, dict):
            raise self._refuse("must be an object", place)
        for name, inner in list(value.items()):
            self._visit(inner, f"{place}/{name}")
            if keyword == "properties" and not self._is_sayable(name, place):
                del value[name]
        self._num_properties += len(value) if keyword == "properties" else 0

    def _visit_patterns(self, node: dict[str, Any], value: Any, place: str) -> None:
        if not isinstance(value, dict):
            raise self._refuse("must be an object", place)
        for pattern, inner in list(value.items()):
            self._visit(inner, f"{place}/{pattern}")
            try:
                self._check_pattern(pattern, place)
            except NotEnforceable as error:
                self._leave_out(str(error), place)
                del value[pattern]
                node["additionalProperties"] = True  # otherwise its schema would apply to the omitted names
        self._num_pattern_properties += len(value)

    def _is_unknown(self, keyword: str, value: Any, path: str) -> bool:
        """Whether a keyword is never enforced. Its schemas are still checked, and an omitted assertion is recorded."""
        place = f"{path}/{keyword}"
        nodes, self._nodes = self._nodes, self._apart
        if keyword in keywords.ONE_APART:
            self._visit(value, place)
        elif keyword in keywords.NAMED_APART:
            if not isinstance(value, dict):
                raise self._refuse("must be an object", place)
            for name, inner in value.items():
                if not (isinstance(inner, list) and is_texts(inner)):
                    self._visit(inner, f"{place}/{name}")
        elif keyword in keywords.COUNTS_APART:
            self._value(keyword, value, place)
        elif keyword in keywords.REFERENCES_APART and not isinstance(value, str):
            raise self._refuse("must be a string", place)
        self._nodes = nodes
        if keyword in ("$anchor", "$dynamicAnchor", "$id") and isinstance(value, str):
            self._names.add(value if keyword == "$id" else f"#{value}")
            self._has_inner_documents |= keyword == "$id"
        if _is_enforced(keyword, value):
            return False
        if self._strict and keyword == "format":
            raise bad_request(f"The schema's format {json.dumps(value)[:80]} is not supported.", self._param)
        if self._strict or keyword in keywords.ASSERTIONS_APART or keyword == "uniqueItems":
            self._leave_out_keyword(keyword, path)
        return True

    def _leave_out_keyword(self, keyword: str, path: str) -> None:
        if self._strict:
            raise bad_request(f"The schema's keyword '{keyword[:80]}'{_at(path)} is not supported.", self._param)
        self.left_out.append(f"{path}/{keyword}")

    def _is_enforceable(self, keyword: str, node: dict[str, Any], path: str) -> bool:
        """Whether a grammar can enforce a keyword without subschemas; if not, the keyword is recorded as omitted."""
        place = f"{path}/{keyword}"
        try:
            value = node[keyword] = self._value(keyword, node[keyword], place)
            if keyword == "pattern":
                self._check_pattern(value, place)
            elif keyword == "multipleOf":
                self._multiples.add(self._digits(value, place))
            elif keyword == "required":
                node[keyword] = [name for name in value if self._is_sayable(name, place)]
            elif keyword in ("minProperties", "maxProperties"):
                self._counts_properties |= keyword == "maxProperties" or value > 0
        except NotEnforceable as error:
            self._leave_out(str(error), place)
            return False
        return True

    def _value(self, keyword: str, value: Any, place: str) -> Any:
        """The value of a keyword without subschemas, for llguidance; ApiError, NotEnforceable."""
        try:
            return whole_number(keyword, value) if keyword in keywords.COUNTS_APART else plain_value(keyword, value)
        except InvalidSchema as error:
            raise self._refuse(str(error), place) from None

    def _digits(self, multiple: float, place: str) -> int:
        try:
            return digits(multiple)
        except InvalidSchema as error:
            raise self._refuse(str(error), place) from None

    def _is_sayable(self, name: str, place: str) -> bool:
        """Whether an answer can have a property of that name; if not, it is recorded as omitted."""
        try:
            check_literal(name)
        except InvalidSchema as error:
            raise self._refuse(str(error), place) from None
        except NotEnforceable as error:
            self._leave_out(str(error), place)
            return False
        return True

    def _check_pattern(self, pattern: Any, place: str) -> None:
        if not isinstance(pattern, str) or len(pattern) > keywords.MAX_TEXT_LENGTH:
            most = keywords.MAX_TEXT_LENGTH
            raise self._refuse(f"must be a regular expression of at most {most} characters", place)
        try:
            said = rust_pattern(pattern)
        except ValueError as error:
            raise NotEnforceable(f"has {json.dumps(str(error))} in a pattern, which is not supported") from error
        if not self._strict and not is_regular(said):  # with `strict`, `grammars.checked` reports the reason
            raise NotEnforceable("has a pattern that is not supported")

    def _check_reference(self, node: dict[str, Any]) -> None:
        if "$ref" not in node:
            return
        reference = node["$ref"]
        target = _target(self.root, reference)
        is_enforced = isinstance(target, bool) or id(target) in self._nodes
        if is_enforced and not self._has_inner_documents:
            return
        is_name = isinstance(reference, str) and reference in self._names
        if self._strict or not (is_name or isinstance(_target(self.whole, reference), dict | bool)):
            shown = json.dumps(reference)[:120]
            raise bad_request(f"The schema's $ref {shown} does not point to a schema inside the schema.", self._param)
        del node["$ref"]
        self.left_out.append("$ref")

    def _say_differently(self, node: dict[str, Any]) -> None:
        for keyword in [keyword for keyword in node if _says_nothing(keyword)]:
            del node[keyword]  # next to some of them, llguidance does not follow a recursive $ref
        node.pop("uniqueItems", None)  # false, or recorded as omitted
        if "pattern" in node:
            node["pattern"] = rust_pattern(node["pattern"])
        if "patternProperties" in node:
            named = node["patternProperties"].items()
            node["patternProperties"] = {rust_pattern(pattern): inner for pattern, inner in named}
        exact = EXACT_FORMATS.get(node.get("format", ""))
        if exact is not None:
            del node["format"]
            node.setdefault("allOf", []).append({"pattern": exact})
        if "oneOf" in node and self._strict:
            node["x-any"] = (
                True  # with any other key next to oneOf, llguidance resolves its branches before comparing them
            )
        elif "oneOf" in node:  # llguidance refuses branches that it cannot prove exclusive
            self.left_out.append("oneOf")
            branches = node.pop("oneOf")
            if "anyOf" in node:
                node.setdefault("allOf", []).append({"anyOf": branches})
            else:
                node["anyOf"] = branches

    def _check_size(self) -> None:
        if self._counts_properties and self._num_properties > keywords.MAX_COUNTED_PROPERTIES:
            why = f"has more than {keywords.MAX_COUNTED_PROPERTIES} properties while it uses minProperties or"
            self._leave_out_everywhere(f"{why} maxProperties", "minProperties", "maxProperties")
        elif self._counts_properties and not self._strict and not is_usable(self.root):
            # llguidance counts properties only if all named ones are required
            self._leave_out_everywhere("counts properties", "minProperties", "maxProperties")
        if self._num_properties > keywords.MAX_PROPERTIES:
            raise self._refuse(f"has more than {keywords.MAX_PROPERTIES} properties")
        if self._num_pattern_properties > keywords.MAX_PATTERN_PROPERTIES:
            raise self._refuse(f"has more than {keywords.MAX_PATTERN_PROPERTIES} patternProperties")
        product = 1
        for multiple in self._multiples:
            product *= multiple
        if product > keywords.MAX_MULTIPLE:
            why = f"has values of multipleOf whose product is more than {keywords.MAX_MULTIPLE}"
            self._leave_out_everywhere(why, "multipleOf")
        try:
            num_at_once = PatternsAtOnce(partial(_target, self.root)).most(self.root)
        except TooMuchAtOnce as error:
            raise self._refuse(str(error)) from None
        if num_at_once > (most := keywords.MAX_PATTERNS_AT_ONCE):
            raise self._refuse(f"lets more than {most} patterns, formats and lengths apply to the same text")

    def _leave_out_everywhere(self, why: str, *left_out: str) -> None:
        self._leave_out(why)
        for node in self._nodes.values():
            for keyword in left_out:
                node.pop(keyword, None)


def _say_limits_as_numbers(node: dict[str, Any]) -> None:
    """Convert the `exclusiveMinimum: true` of draft 4 and OpenAPI 3.0 to the form of later drafts."""
    for limit, exclusive in (("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum")):
        is_exclusive = node.get(exclusive)
        if isinstance(is_exclusive, bool):
            del node[exclusive]
            if is_exclusive and limit in node:
                node[exclusive] = node.pop(limit)


def _at(path: str) -> str:
    shown = "".join(character if character.isprintable() else "?" for character in path[:120])
    return "" if shown == "#" else f" at {shown}"


def _target(root: dict[str, Any], reference: Any) -> Any:
    """The target of a reference such as "#/a/b", or None."""
    if not isinstance(reference, str) or not re.match(r"#(/|$)", reference):
        return None
    target: Any = root
    for step in unquote(reference[1:]).split("/")[1:]:
        name = step.replace("~1", "/").replace("~0", "~")
        if isinstance(target, dict):
            target = target.get(name)
        elif isinstance(target, list) and name.isdecimal() and int(name) < len(target):
            target = target[int(name)]
        else:
            return None
    return target


def _says_nothing(keyword: str) -> bool:
    """Whether a keyword is an annotation. x-guidance is not: it would override this server's options."""
    return keyword in keywords.ANNOTATIONS or (keyword.startswith("x-") and keyword != "x-guidance")


def _is_enforced(keyword: str, value: Any) -> bool:
    """Whether a keyword without subschemas is enforced; its value may be invalid."""
    if keyword == "format" and isinstance(value, str):
        return value in keywords.FORMATS
    if keyword == "uniqueItems":
        return value is not True
    plain = ("const", "enum", "type", "required", "pattern", "format", "$ref")
    return keyword in plain or keyword in keywords.COUNTS or keyword in keywords.NUMBERS
