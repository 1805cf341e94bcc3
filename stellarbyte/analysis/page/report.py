"""Writes the report: index.html, report.css, report.json and the pictures, in one folder that opens from disk."""

import re
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path

from stellarbyte.analysis.analyse import Analysis, write_json
from stellarbyte.analysis.page.html import Content, Element, element, table
from stellarbyte.analysis.page.model_sections import (
    PageParts,
    outliers_section,
    parameters_section,
    radar_section,
    sparsity_section,
    spectra_section,
    structure_section,
)
from stellarbyte.analysis.page.run_sections import (
    adapters_section,
    attention_section,
    quality_section,
    speed_section,
)
from stellarbyte.analysis.pictures.fonts import FONT_PACKAGE, find_fonts
from stellarbyte.analysis.pictures.gallery import Picture, draw_all
from stellarbyte.analysis.words.languages import LANGUAGES
from stellarbyte.checkpoint.info import size

PAGE, STYLE, NUMBERS = "index.html", "report.css", "report.json"
# No scripts, no other host; style sheet and pictures from the page's own folder.
POLICY = "default-src 'none'; style-src 'self'; img-src 'self'; base-uri 'none'; form-action 'none'"
_HAN = re.compile("[\u4e00-\u9fff]")
_SECTIONS = (
    *(parameters_section, structure_section, radar_section, quality_section, speed_section, attention_section),
    *(sparsity_section, outliers_section, spectra_section, adapters_section),
)


def write_report(analysis: Analysis, folder: Path, language: str) -> None:
    """Write all files into `folder`, which must exist. `language`: one of LANGUAGES.

    Where no font has Chinese glyphs, the pictures of a Chinese page have English words, and the page says so.

    Raises:
        OSError: a file cannot be written.
    """
    spoken, others = set("".join(LANGUAGES[language].values())), _characters(analysis)
    fonts = find_fonts(spoken, others)
    lacks_font = not fonts.cover(filter(_HAN.match, spoken | others))
    words = LANGUAGES[language if fonts.cover(spoken) else "en"]
    pictures = draw_all(analysis, folder, words, fonts)
    write_json(analysis, folder / NUMBERS)
    (folder / STYLE).write_text((files("stellarbyte.analysis.page") / STYLE).read_text(encoding="utf-8"), "utf-8")
    page = make_page(analysis, language, pictures, lacks_font=lacks_font)
    (folder / PAGE).write_text(page, encoding="utf-8")


def _characters(analysis: Analysis) -> set[str]:
    """Those that pictures may have to draw beside words."""
    return set() if analysis.attention is None else set("".join(analysis.attention.labels))


def make_page(analysis: Analysis, language: str, pictures: Mapping[str, Picture], *, lacks_font: bool) -> str:
    """The HTML of the page."""
    words = LANGUAGES[language]
    parts = PageParts(analysis=analysis, words=words, pictures=pictures)
    made = {section.__name__.removesuffix("_section"): section(parts) for section in _SECTIONS}
    sections = {name: section for name, section in made.items() if section is not None}
    title = words["title"].format(name=analysis.name)
    links = [element("li", element("a", words[name], href=f"#{name}")) for name in sections]
    notes: list[Content] = []
    if lacks_font:
        notes.append(element("p", words["no_font"].format(package=FONT_PACKAGE), class_="note"))
    if analysis.text is None:
        notes.append(element("p", words["no_tokenizer"], class_="note"))
    before, after = words["files"].split("{json}")
    body = element(
        "body",
        element("a", words["skip"], href="#main", class_="skip"),
        element("header", element("h1", title), _summary(parts)),
        element("nav", element("ol", links), aria_label=words["contents"]),
        element("main", notes, sections.values(), id="main", tabindex=-1),
        element("footer", element("p", before, element("a", NUMBERS, href=NUMBERS), after)),
    )
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=POLICY),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", title),
        element("link", rel="stylesheet", href=STYLE),
    )
    return f"<!doctype html>\n{element('html', head, body, lang=words['language'])}\n"


def _summary(parts: PageParts) -> Element:
    words, analysis, info = parts.words, parts.analysis, parts.analysis.info
    total, active = f"{info.num_parameters:,}", f"{info.num_active_parameters:,}"
    counted = total if total == active else words["of_which_active"].format(total=total, active=active)
    rows = [
        [words["num_parameters"], counted],
        [words["stored"], words["stored_as"].format(size=size(info.disk_bytes), dtype=info.stored_dtype)],
        [words["context"], words["tokens"].format(count=f"{info.context_length:,}")],
        [words["measured_on"], words["measured_as"].format(device=analysis.device, dtype=analysis.dtype)],
        [words["made_with"], ", ".join(f"{name} {version}" for name, version in analysis.versions.items())],
    ]
    return table([words["model"], analysis.name], rows, caption=words["summary"])
