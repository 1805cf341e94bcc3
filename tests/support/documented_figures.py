"""Figures in Markdown pages, beside the values of the results files that they come from.

After a paragraph or table an HTML comment says where its numbers come from, so that readers see none of it:

    <!-- figures: 2026-11-24T145923-serve.json
    31.4: runs server=ours streams=1 tok_s
    2.7: runs server=ours streams=1 tok_s / runs server=transformers streams=1 tok_s
    given: 128 64
    -->

A path starts at the file's `figures`: keys, list indices, and KEY=VALUE for those items of a list, if it is no key
itself. A number is right if it is the value, rounded as it is written. Paths may be joined by + - * / (from left to
right, item by item), and median, max, min or count before them makes one value of several. "given" numbers are no
results: sizes of the load, targets.

In a table "column N: PATH; PATH" is for the numbers of that column's cells in turn, {1} in it the text of a row's first
cell, and "row N: PATH; ..." for the numbers of a row after its first cell. Headings, and cells before the first column
that is described, are labels. Every other number must have its line. Code, links' targets, dates, and digits in names
(int8, H100) are no numbers.
"""

import json
import operator
import re
import shlex
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any

_COMMENT = re.compile(r"<!-- figures: (\S+)\n(.*?)\n-->", re.DOTALL)
_RESULTS_LINK = re.compile(r"benchmarks/results/([^)\s]+\.json)\)")
_NO_PROSE = re.compile(
    r"```.*?```|`[^`]*`|<!--.*?-->|\]\([^)]*\)|<https?://[^>]*>|\d{4}-\d\d-\d\d(?:T[\d:]+)?", re.DOTALL
)
_NUMBER = re.compile(
    r"(?<![A-Za-z0-9_.,])(?<![A-Za-z]-)(?:(?:\d+(?:\.\d+)?·)?10(?=[⁻⁰¹²³⁴⁵⁶⁷⁸⁹])[⁻⁰¹²³⁴⁵⁶⁷⁸⁹]+|\d+(?:,\d{3})*(?:\.\d+)?(?![A-Za-z_]|[.,]?\d))"
)
_SUPERSCRIPTS = str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789")
_OPERATORS: dict[str, Callable[[float, float], float]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
}
_FUNCTIONS: dict[str, Callable[[list[float]], float]] = {
    "median": statistics.median,
    "max": max,
    "min": min,
    "count": len,
}


class WrongComment(ValueError):
    """A comment that cannot be followed; str() says why."""


@dataclass
class Block:
    """A paragraph, list or table of a page, and what the comments after it say."""

    text: str
    heading: str
    comments: list[tuple[str, str]] = field(default_factory=list)  # results file, lines

    @property
    def is_table(self) -> bool:
        return self.text.startswith("|")

    @property
    def rows(self) -> list[list[str]]:
        """A table's cells, without heading and line."""
        return [[cell.strip() for cell in line.strip("| ").split("|")] for line in self.text.splitlines()[2:]]


def blocks_of(page: str) -> list[Block]:
    """Everything between blank lines but code, headings and comments."""
    blocks: list[Block] = []
    heading = ""
    without_code = re.sub(r"^( *)```.*?^\1```$", "", page, flags=re.MULTILINE | re.DOTALL)
    for text in re.split(r"\n\s*\n", without_code):
        text = text.strip("\n")
        if comments := _COMMENT.findall(text):
            if not blocks or blocks[-1].heading != heading:
                raise WrongComment(f"no paragraph before {text[:80]!r}")
            blocks[-1].comments += comments
        elif text.startswith("#"):
            heading = text.splitlines()[0]
        elif text and not text.startswith("<!--"):
            blocks.append(Block(text, heading))
    return blocks


def numbers_in(text: str) -> list[str]:
    """As they are written, in order."""
    return _NUMBER.findall(_NO_PROSE.sub(lambda found: "]" if found[0].startswith("](") else "`", text))


def results_linked(text: str) -> set[str]:
    return set(_RESULTS_LINK.findall(text))


def value_of(number: str) -> tuple[Decimal, Decimal]:
    """What a written number is, and half of its last digit."""
    mantissa, is_power, exponent = number.partition("10") if re.search("[⁻⁰¹²³⁴⁵⁶⁷⁸⁹]", number) else (number, "", "")
    shift = Decimal(10) ** (int(exponent.translate(_SUPERSCRIPTS)) if is_power else 0)
    digits = Decimal(mantissa.rstrip("·").replace(",", "") or 1)
    return digits * shift, Decimal((0, (5,), int(digits.as_tuple().exponent) - 1)) * shift


def problems_of(block: Block, results: Path) -> Iterator[str]:
    """What is wrong with a block's numbers: those that differ, are not there, or have no line."""
    described: set[str] = set()
    columns: dict[int, list[tuple[str, Any]]] = {}
    in_rows: dict[int, list[tuple[str, Any]]] = {}
    for file, lines in block.comments:
        figures = json.loads((results / file).read_text(encoding="utf-8"))["figures"]
        for line in lines.splitlines():
            name, colon, rest = line.strip().partition(": ")
            kind, _, place = name.partition(" ")
            if not colon:
                raise WrongComment(f"no colon in {line!r}")
            if name == "given":
                described |= set(rest.split())
                yield from (f"{number} is given, and not there" for number in rest.split() if number not in block.text)
            elif kind == "column":
                columns.setdefault(int(place) - 1, []).extend((path, figures) for path in rest.split(";"))
            elif kind == "row":
                in_rows.setdefault(int(place) - 1, []).extend((path, figures) for path in rest.split(";"))
            else:
                described.add(name)
                if name not in numbers_in(block.text):
                    yield f"{name} has a line, and is not there"
                yield from _difference(name, rest, figures)
    if not block.is_table:
        yield from (f"{number} has no line" for number in numbers_in(block.text) if number not in described)
        return
    first = min(columns, default=1)
    for i, row in enumerate(block.rows):
        for column in range(first, len(row)):
            paths = columns.get(column, [])
            numbers = [number for number in numbers_in(row[column]) if number not in described or column in columns]
            if i in in_rows:
                paths = [in_rows[i].pop(0) for _ in numbers if in_rows[i]]
            if len(numbers) != len(paths) and (numbers or i in in_rows):
                yield f"{numbers} in row {i + 1}, column {column + 1} have {len(paths)} paths"
            for number, (path, figures) in zip(numbers, paths, strict=False):
                for cell_number, cell in enumerate(row, 1):
                    path = path.replace(f"{{{cell_number}}}", cell.strip("`"))
                yield from _difference(number, path, figures)
    yield from (f"row {i + 1} has paths without numbers" for i, paths in in_rows.items() if paths)


def _difference(number: str, path: str, figures: Any) -> Iterator[str]:
    written, half_digit = value_of(number)
    value = evaluate(path, figures)
    if abs(Decimal(repr(value)) - written) > half_digit * Decimal("1.000001"):
        yield f"{number} is {value:.6g}: {path.strip()}"


def evaluate(path: str, figures: Any) -> float:
    """The one value that a path, or several joined by operators, leads to."""
    words = shlex.split(path)
    function = _FUNCTIONS.get(words[0]) if words else None
    words = words[1:] if function else words
    values, join, term = [], None, list[str]()
    for word in [*words, ""]:
        if word and word not in _OPERATORS:
            term.append(word)
            continue
        if not term:
            raise WrongComment(f"a part is missing in {path!r}")
        found = _find(term, figures)
        if join is None:
            values = found
        else:
            count = max(len(values), len(found))
            both = (each * count if len(each) == 1 else each for each in (values, found))
            values = [_OPERATORS[join](*pair) for pair in zip(*both, strict=True)]
        join, term = word, []
    if function is None and len(values) != 1:
        raise WrongComment(f"{path!r} leads to {len(values)} values")
    return float(function(values) if function else values[0])


def _find(words: list[str], figures: Any) -> list[float]:
    """All values at the end of one path; a number stands for itself."""
    if len(words) == 1 and re.fullmatch(r"\d+(\.\d+)?", words[0]):
        return [float(words[0])]
    found = [figures]
    for word in words:
        name, is_choice, wanted = word.partition("=")
        if is_choice and not any(word in each for each in found if isinstance(each, dict)):
            items = [item for each in found for item in (each if isinstance(each, list) else [each])]
            found = [item for item in items if str(item.get(name)) == wanted]
        elif word.isdecimal() and all(isinstance(each, list) for each in found):
            found = [each[int(word)] for each in found]
        else:
            items = [item for each in found for item in (each if isinstance(each, list) else [each])]
            found = [item[word] for item in items if word in item]
        if not found:
            raise WrongComment(f"{' '.join(words)!r} leads nowhere at {word!r}")
    return [number for each in found for number in (each if isinstance(each, list) else [each])]
