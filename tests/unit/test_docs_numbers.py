"""Every figure in the documents is that of the results file that its comment names: see `documented_figures`."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest

from tests.support.clients.pages import TRANSLATED, name_of
from tests.support.documented_figures import Block, blocks_of, numbers_in, problems_of, results_linked
from tests.support.servers.server_process import ROOT

RESULTS = ROOT / "benchmarks" / "results"
TRANSLATIONS = [translation for translation, _ in TRANSLATED]
PAGES = [path for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))) if path not in TRANSLATIONS]
BENCHMARKS = ROOT / "docs" / "benchmarks.md"

_TO_BENCHMARKS = re.compile(r"\]\((docs/)?benchmarks\.md[)#]")
_MEASURED = re.compile(r"\d (tok/s|tokens a second|ms\b|µs|[TG]B/s|[TG]FLOP/s)|\d[×%]")


def blocks(page: Path) -> list[Block]:
    return blocks_of(page.read_text(encoding="utf-8"))


def needs_comment(block: Block, of_section: list[Block]) -> bool:
    """It shows a measurement, links to a result, or is a table below such a link."""
    if not numbers_in(block.text):
        return False
    has_link = bool(results_linked(block.text) or _TO_BENCHMARKS.search(block.text))
    is_below = block.is_table and any(results_linked(other.text) for other in of_section)
    return has_link or is_below or bool(_MEASURED.search(re.sub("`[^`]*`", "", block.text)))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_figure_is_that_of_its_results_file(page: Path) -> None:
    assert [problem for block in blocks(page) if block.comments for problem in problems_of(block, RESULTS)] == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_no_figure_is_without_a_results_file(page: Path) -> None:
    all_blocks = blocks(page)
    sections = {
        block.heading: [other for other in all_blocks if other.heading == block.heading] for block in all_blocks
    }
    bare = [block.text for block in all_blocks if not block.comments and needs_comment(block, sections[block.heading])]
    assert bare == []


def test_figures_come_from_the_files_that_the_benchmarks_page_links() -> None:
    """So a newer result that this page shows is shown by all."""
    linked = results_linked(BENCHMARKS.read_text(encoding="utf-8"))
    assert {file for page in PAGES for block in blocks(page) for file, _ in block.comments} == linked


@pytest.mark.parametrize(("translation", "original"), TRANSLATED, ids=name_of)
def test_a_translation_has_the_same_numbers(translation: Path, original: Path) -> None:
    def of_sections(page: Path) -> list[Counter[str]]:
        sections: dict[str, Counter[str]] = {}
        for block in blocks(page):
            sections.setdefault(block.heading, Counter()).update(numbers_in(block.text))
        return list(sections.values())

    assert of_sections(translation) == of_sections(original)


FIGURES = {
    "runs": [{"name": "a", "tok_s": 31.44, "ms": [1, 4]}, {"name": "b", "tok_s": 10.0}],
    "error": 5.61e-7,
    "a=b": 7.5,
}
PROSE = "From int8, 64 streams: 31.4 tok/s, 3.1×, 2.5 ms, 5.6·10⁻⁷, 40 sums up, 7.5 (`--flag 7`, [x](3.md))."
PROSE_COMMENT = """31.4: runs name=a tok_s
3.1: runs name=a tok_s / runs name=b tok_s
2.5: median runs name=a ms
5.6·10⁻⁷: error
40: runs name=a tok_s + runs name=b tok_s - 1.5
7.5: a=b
given: 64"""
TABLE = """| for 8 | value | both |
|---|---|---|
| `a` 9 | 31.4 tok/s | 31 (1.0×) |
| `b` | 10.0 | |"""
COLUMNS = """column 2: runs name=a tok_s
column 3: runs name=a tok_s; runs name=a tok_s / 31"""
ROWS = """row 1: runs name=a tok_s; runs name=a tok_s; 1
row 2: runs 1 tok_s"""


def problems(text: str, comment: str, folder: Path) -> list[str]:
    (folder / "r.json").write_text(json.dumps({"figures": FIGURES}))
    (block,) = blocks_of(f"# Page\n\n{text}\n\n<!-- figures: r.json\n{comment}\n-->\n")
    return list(problems_of(block, folder))


def test_true_figures_pass(tmp_path: Path) -> None:
    assert problems(PROSE, PROSE_COMMENT, tmp_path) == []
    assert problems(TABLE, ROWS, tmp_path) == []
    assert problems(TABLE.replace("`b` | 10.0", "`b` | "), COLUMNS, tmp_path) == []
    by_label = "column 2: runs name={1} tok_s\ngiven: 31 1.0"
    assert problems(TABLE.replace(" 9 |", " |"), by_label, tmp_path) == []


@pytest.mark.parametrize("number", ["31.4", "3.1", "2.5", "5.6·10⁻⁷", "40", "7.5"])
def test_another_figure_is_noticed(number: str, tmp_path: Path) -> None:
    other = number.replace("5", "9") if "5" in number else number.replace("0", "1").replace("1", "2")
    both = [text.replace(number, other) for text in (PROSE, PROSE_COMMENT)]
    assert len(problems(*both, tmp_path)) == 1
    assert problems(both[0], PROSE_COMMENT, tmp_path)  # it has no line, and its line no number


@pytest.mark.parametrize("number", ["31.4", "31 ", "1.0×", "10.0"])
def test_another_figure_in_a_table_is_noticed(number: str, tmp_path: Path) -> None:
    table = TABLE.replace(number, number.replace("0", "7").replace("3", "8"))
    assert len(problems(table, ROWS, tmp_path)) == 1
    assert problems(table, COLUMNS, tmp_path)


@pytest.mark.parametrize("line", PROSE_COMMENT.splitlines())
def test_a_number_without_a_line_is_noticed(line: str, tmp_path: Path) -> None:
    assert len(problems(PROSE, PROSE_COMMENT.replace(line, "").strip("\n").replace("\n\n", "\n"), tmp_path)) == 1
