"""The report of `stellarbyte analyse` in a browser, from disk: in both languages and themes, on phones, by keyboard."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, expect

from stellarbyte.analysis.analyse import Analysis
from stellarbyte.analysis.page import report
from stellarbyte.analysis.page.report import write_report
from stellarbyte.analysis.pictures import gallery
from stellarbyte.analysis.pictures.fonts import Fonts
from stellarbyte.analysis.pictures.gallery import Picture, draw_all
from tests.support.cases import each_value_once
from tests.support.clients.chat_page import LIMIT_MS, WatchedPage
from tests.support.models.analysed import HOSTILE, full_analysis, light_only

expect.set_options(timeout=LIMIT_MS)
LANGUAGES = ("en", "zh")
NOT_LOADED = "[...document.images].filter((one) => !one.complete || one.naturalWidth === 0).map((one) => one.src)"
FOLDED = "[...document.querySelectorAll('details')].forEach((one) => { one.open = true; })"


@pytest.fixture(scope="module")
def folders(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A report in each language; the Chinese one has the English pictures, since drawing takes many seconds."""
    del browser  # without one nothing is made
    folder = tmp_path_factory.mktemp("reports")
    analysis = full_analysis(folder)
    drawn: dict[str, Picture] = {}

    def draw_once(analysis: Analysis, target: Path, words: Mapping[str, str], fonts: Fonts) -> dict[str, Picture]:
        if not drawn:
            drawn.update(draw_all(analysis, target, words, fonts))
        for picture in (folder / "en").glob("*.png"):
            (target / picture.name).write_bytes(picture.read_bytes())
        return drawn

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "draw_all", draw_once)
        patch.setattr(gallery, "save", light_only(gallery.save))
        for language in LANGUAGES:
            (folder / language).mkdir()
            write_report(analysis, folder / language, language)
    return {language: folder / language for language in LANGUAGES}


@pytest.fixture
def pages(browser: Browser, folders: dict[str, Path]) -> Iterator[dict[str, Page]]:
    """A page of each report, watched: no error, none but its own files."""
    watched = {}
    for language, folder in folders.items():
        page = browser.new_context(viewport={"width": 1280, "height": 800}).new_page()
        watched[language] = WatchedPage(page, folder.as_uri())
        page.goto(f"{folder.as_uri()}/index.html")
    yield {language: one.page for language, one in watched.items()}
    for one in watched.values():
        one.page.context.close()
    assert [wrong for one in watched.values() for wrong in one.wrong] == []


def load_all(page: Page) -> None:
    """Scroll to every picture, so that it is loaded."""
    for image in page.locator("img").all():
        image.scroll_into_view_if_needed()
        expect(image).to_have_js_property("complete", True)


def test_it_opens_from_disk_with_all_of_its_pictures_and_styles(pages: dict[str, Page]) -> None:
    for language, page in pages.items():
        load_all(page)
        assert page.evaluate(NOT_LOADED) == []
        assert page.evaluate("document.styleSheets.length") == 1
        assert page.locator("section").first.evaluate("(one) => getComputedStyle(one).borderRadius") == "12px"
        heading = page.get_by_role("heading", level=1)
        expect(heading).to_contain_text(f"model {HOSTILE}")
        expect(page.locator("html")).to_have_attribute("lang", {"en": "en", "zh": "zh-CN"}[language])
        assert page.evaluate("document.querySelectorAll('b, script').length") == 0


def test_pictures_follow_the_theme(pages: dict[str, Page]) -> None:
    page = pages["en"]
    image = page.locator("img").first
    for theme, name in (("light", "parameters.png"), ("dark", "parameters-dark.png"), ("light", "parameters.png")):
        page.emulate_media(color_scheme=theme)  # type: ignore[arg-type]
        page.wait_for_function("(name) => document.images[0].currentSrc.endsWith('/' + name)", arg=name)
        expect(image).to_have_js_property("complete", True)


def test_a_phone_needs_no_scrolling_sideways(pages: dict[str, Page]) -> None:
    for page in pages.values():
        page.evaluate(FOLDED)
        load_all(page)
        for width in (320, 360):
            page.set_viewport_size({"width": width, "height": 640})
            assert page.evaluate("[document.documentElement.scrollWidth, document.body.scrollWidth]") == [width, width]


def test_the_keyboard_reaches_sections_tables_and_details(pages: dict[str, Page]) -> None:
    page = pages["en"]
    page.keyboard.press("Tab")
    expect(page.locator(".skip")).to_be_focused()
    expect(page.locator(".skip")).to_be_in_viewport()
    page.keyboard.press("Enter")
    expect(page.locator("main")).to_be_focused()
    page.get_by_role("link", name="Singular values", exact=True).focus()
    page.keyboard.press("Enter")
    expect(page.locator("#spectra h2")).to_be_in_viewport()
    summary = page.locator("#spectra summary")
    summary.focus()
    page.keyboard.press("Enter")
    table = page.locator("#spectra details .scroll")
    expect(table).to_be_visible()
    page.keyboard.press("Tab")
    expect(table).to_be_focused()
    page.keyboard.press("End")
    page.wait_for_function("(one) => one.scrollTop > 0", arg=table.element_handle())


@pytest.mark.parametrize(("language", "theme"), each_value_once(LANGUAGES, ["light", "dark"]))
def test_axe_finds_nothing_serious(browser: Browser, folders: dict[str, Path], language: str, theme: str) -> None:
    # axe is a script of its own
    context = browser.new_context(bypass_csp=True, color_scheme=theme)  # type: ignore[arg-type]
    page = context.new_page()
    page.goto(f"{folders[language].as_uri()}/index.html")
    page.evaluate(FOLDED)
    found = Axe().run(page).response["violations"]
    serious = [(one["id"], one["nodes"]) for one in found if one["impact"] in ("serious", "critical")]
    context.close()
    assert serious == []
