"""Counts the patterns, formats and lengths that may apply to the same text of a schema: their automata multiply."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

MAX_REFERENCES = 100
MAX_NAMES_JOINED = 1_000_000  # names of properties in all joined schemas together: 0.3 s


class TooMuchAtOnce(ValueError):
    """A schema has too many combinations to count; str() continues "The schema "."""


@dataclass(frozen=True, kw_only=True)
class _AtOnce:
    """The number that apply to one text: at this place, in properties by name, and at all other places inside."""

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


class PatternsAtOnce:
    """An upper bound on the number that applies to one text, over all branches."""

    def __init__(self, target: Callable[[Any], Any]) -> None:
        """`target` resolves a $ref to its schema, or None."""
        self._target = target
        self._known: dict[int, _AtOnce] = {}
        self._num_joined = 0

    def most(self, root: Any) -> int:
        """The highest number for any text; TooMuchAtOnce."""
        return self._count(root, 0).most

    def _count(self, node: Any, depth: int) -> _AtOnce:
        if not isinstance(node, dict):
            return _AtOnce()
        if id(node) in self._known:
            return self._known[id(node)]
        if depth > MAX_REFERENCES:
            raise TooMuchAtOnce(f"has a chain of more than {MAX_REFERENCES} references")
        self._known[id(node)] = _AtOnce()  # llguidance refuses schemas that add themselves to themselves

        def look(value: Any) -> _AtOnce:
            return self._count(value, depth + 1)

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
            result = self._joined(result, look(value), int.__add__)
        for keyword in ("anyOf", "oneOf"):
            branches = _AtOnce()
            for value in node.get(keyword, []):
                branches = self._joined(branches, look(value), max)
            result = self._joined(result, branches, int.__add__)
        self._known[id(node)] = result
        return result

    def _joined(self, one: _AtOnce, other: _AtOnce, join: Callable[[int, int], int]) -> _AtOnce:
        self._num_joined += len(one.named) + len(other.named)
        if self._num_joined > MAX_NAMES_JOINED:
            raise TooMuchAtOnce("has too many combinations of schemas for the same properties")
        return one.joined(other, join)
