"""What the documents say is there: links lead somewhere, flags exist, both languages show the same commands."""

import importlib
import itertools
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from scripts.site.api_reference import api_markdown
from scripts.site.flags_reference import flags_markdown
from stellarbyte.cli.arguments.parser import make_parser
from stellarbyte_server.api.contract.openapi import make_document
from stellarbyte_server.api.endpoints import OPERATIONS
from stellarbyte_server.config.command_line import GROUPS, OTHER_VARIABLES, flag_of, off_flag_of, options, variable_of
from tests.support.clients.pages import PAGES, TRANSLATED, name_of
from tests.support.servers.server_process import ROOT

_FENCED = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\((?![a-z]+:)([^)#\s]*)(?:#([^)\s]*))?\)")
_HEADING = re.compile(r"^(#+) (.+)$", re.MULTILINE)
_CODE = re.compile(r"`([^`]+)`")
_COMMAND = re.compile(r"(?:^ *|\| )(?:(?:\S*/)?stellarbyte |scripts/(?=train ))(.+)", re.MULTILINE)
_OURS = re.compile(r"(?:stellarbyte-server|scripts/serve|python -m stellarbyte_server)\b[^\n`]*")


def text_without_code(path: Path) -> str:
    return _FENCED.sub("", path.read_text(encoding="utf-8"))


def commands(path: Path) -> list[tuple[str, str]]:
    """Language and content of every block of code, comments aside, which are translated."""
    blocks = _FENCED.findall(path.read_text(encoding="utf-8"))
    return [(language, re.sub(r"(?m)(^| +)# .*$", "", code)) for _, language, code in blocks]


def anchors(path: Path) -> Iterator[str]:
    """As GitHub makes them of headings: no signs, small letters, hyphens for spaces, numbers for those that repeat."""
    seen: dict[str, int] = {}
    for _, heading in _HEADING.findall(text_without_code(path)):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        anchor = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
        seen[anchor] = seen.get(anchor, -1) + 1
        yield f"{anchor}-{seen[anchor]}" if seen[anchor] else anchor


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_link_and_anchor_leads_somewhere(page: Path) -> None:
    wrong = []
    for target, anchor in _LINK.findall(text_without_code(page)):
        path = (page.parent / target).resolve() if target else page
        if not path.exists() or not path.is_relative_to(ROOT):
            wrong.append(target)
        elif anchor and anchor not in anchors(path):
            wrong.append(f"{target}#{anchor}")
    assert wrong == []


@pytest.mark.parametrize(("translation", "original"), TRANSLATED, ids=name_of)
def test_a_translation_has_the_same_sections_tables_and_commands(translation: Path, original: Path) -> None:
    def levels(path: Path) -> list[int]:
        return [len(marks) for marks, _ in _HEADING.findall(text_without_code(path))]

    def rows(path: Path) -> list[int]:
        return [line.count(" | ") for line in text_without_code(path).splitlines() if line.startswith("|")]

    assert levels(translation) == levels(original)
    assert rows(translation) == rows(original)
    assert commands(translation) == commands(original)


def test_translated_pages_link_to_translated_pages() -> None:
    """On GitHub nothing else turns a link to the page in the reader's language."""
    translated = {original.name for _, original in TRANSLATED}
    for page, _ in TRANSLATED:
        _, *links = _LINK.findall(text_without_code(page))  # the first one leads to the English page
        assert [target for target, _ in links if Path(target).name in translated] == [], page


def test_the_path_of_a_completion_names_at_most_12_modules_that_can_be_imported() -> None:
    def files(page: str, heading: str) -> list[str]:
        section = (ROOT / "docs" / page).read_text(encoding="utf-8").partition(f"\n## {heading}\n")[2]
        return re.findall(r"(?m)^\d+\. `(\S+)\.py`", section.partition("\n## ")[0])

    path = files("how-it-works.md", "The path of a completion")
    assert 0 < len(path) <= 12
    for file in path:
        importlib.import_module("stellarbyte_server." + file.replace("/", "."))
    assert files("how-it-works.zh.md", "一次补全的路径") == path


def test_the_tables_of_flags_have_all_of_them_with_their_variables() -> None:
    text = flags_markdown()
    for _, settings_class in GROUPS:
        for field in options(settings_class):
            row = next(row for row in text.splitlines() if f"<code>{flag_of(field)}" in row)
            assert f"<code>{variable_of(field)}</code>" in row
            assert f"| {field.metadata['help'].partition(' (default: ')[0]} |" in row.replace("&amp;", "&")
    assert "| 256, on a CPU 64 |" in text and "| 127.0.0.1 |" in text


def test_pages_name_every_flag_and_none_that_is_not_there() -> None:
    known = {"--help"}
    for _, settings_class in GROUPS:
        for field in options(settings_class):
            known |= {flag_of(field), off_flag_of(field) or flag_of(field)}
    texts = [page.read_text(encoding="utf-8") for page in PAGES if page.name != "CHANGELOG.md"]
    given = {flag for text in texts for line in _OURS.findall(text) for flag in re.findall(r"--[a-z][a-z-]+", line)}
    assert given <= known
    named = {flag for text in texts for flag in re.findall(r"--[a-z][a-z-]+", text)}
    assert sorted(known - named) == []
    variables = OTHER_VARIABLES | {variable_of(field) for _, of_group in GROUPS for field in options(of_group)}
    assert {name for text in texts for name in re.findall(r"\bSTELLARBYTE_[A-Z_]+[A-Z]\b", text)} <= variables


def stellarbyte_commands(page: Path) -> Iterator[tuple[str, str]]:
    """What follows `stellarbyte` in every command line of a page: a whole one, or a mention in a sentence."""
    text = page.read_text(encoding="utf-8")
    for _, _, code in _FENCED.findall(text):
        yield from (("whole", line) for line in _COMMAND.findall(code.replace("\\\n", " ")))
    for code in _CODE.findall(_FENCED.sub("", text)):
        yield from (("mention", line) for line in _COMMAND.findall(" ".join(code.split())))


def test_the_stellarbyte_command_understands_what_pages_show_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    wrong, seen = [], set()
    for page in PAGES:
        for kind, line in stellarbyte_commands(page):
            words = list(
                itertools.takewhile(lambda word: word not in ("|", ">", "&&"), shlex.split(line, comments=True))
            )
            wrong += [word for word in words if word.startswith("examples/") and not (ROOT / word).exists()]
            try:
                seen.add(make_parser().parse_args(words).module)
            except SystemExit as exit:
                said = capsys.readouterr().err
                if exit.code and not (kind == "mention" and "arguments are required" in said):
                    wrong.append(f"{name_of(page)}: stellarbyte {line}: {said.splitlines()[-1]}")
    assert wrong == []
    assert {f"stellarbyte.cli.{name}" for name in ("adapters", "bench", "chat", "convert", "info")} <= seen


def test_the_api_reference_has_every_route_and_every_field() -> None:
    document = make_document(OPERATIONS, "a-model", allows_unknown_fields=False)
    text = api_markdown(document)
    for method, path in OPERATIONS:
        assert f"\n### {method.upper()} {path}\n" in text
    for schema in document["components"]["schemas"].values():
        for name, field in schema.get("properties", {}).items():
            rows = [row for row in text.splitlines() if row.startswith(f"| `{name}`")]
            assert any(row.endswith(f"| {field.get('description', '')} |") for row in rows), name
    assert "| `n` | integer (1 to 128) | Answers to each prompt. Default: 1. |" in text
    assert "| `top_p` | number (0 to 1) |" in text
    assert "| `model` required | string |" in text
    assert "| `evicted_tokens` may be absent | integer (at least 1) |" in text


def test_the_api_reference_leaves_nothing_of_a_schema_out() -> None:
    document = make_document(OPERATIONS, "a-model", allows_unknown_fields=False)
    document["components"]["schemas"]["Usage"]["properties"]["total_tokens"]["multipleOf"] = 2
    with pytest.raises(ValueError, match="multipleOf"):
        api_markdown(document)


def test_links_inside_the_api_reference_lead_somewhere(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(api_markdown(make_document(OPERATIONS, "a-model", allows_unknown_fields=False)))
    targets = {anchor for _, anchor in _LINK.findall(page.read_text())}
    assert targets and targets <= set(anchors(page))
