"""The report shows the figures, in both languages, with a glyph for every character, and escapes what it was given."""

import dataclasses
import json
import re
import string
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib import font_manager
from matplotlib.figure import Figure
from matplotlib.text import Text

from stellarbyte.analysis.analyse import Analysis
from stellarbyte.analysis.page import report
from stellarbyte.analysis.page.report import NUMBERS, PAGE, POLICY, STYLE, make_page, write_report
from stellarbyte.analysis.pictures import fonts, gallery
from stellarbyte.analysis.pictures.fonts import Fonts, find_fonts
from stellarbyte.analysis.pictures.gallery import Picture, draw_all, drawings
from stellarbyte.analysis.pictures.style import LIGHT, Pen, drawing, number
from stellarbyte.analysis.spectrum import Spectrum
from stellarbyte.analysis.words.languages import LANGUAGES
from tests.support.models.analysed import FAMILY, HOSTILE, full_analysis, light_only, write_font

CHINESE_TEXT = "河水从山上流下来，<b>$x^$ 河"


@pytest.fixture(scope="module")
def analysis(tmp_path_factory: pytest.TempPathFactory) -> Analysis:
    return full_analysis(tmp_path_factory.mktemp("analysis"), text=CHINESE_TEXT)


@pytest.fixture
def no_han(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine has no fonts but matplotlib's."""
    own = [entry for entry in font_manager.fontManager.ttflist if matplotlib.get_data_path() in entry.fname]
    assert own
    monkeypatch.setattr(font_manager.fontManager, "ttflist", own)
    monkeypatch.setattr(font_manager, "findSystemFonts", list)


@pytest.fixture
def han(no_han: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """It also has a font with the characters of the Chinese report, that matplotlib has not listed yet."""
    del no_han
    file = write_font(tmp_path / "han.ttf", set("".join(LANGUAGES["zh"].values()) + CHINESE_TEXT) | fonts.HAN_SAMPLE)
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: [str(file)])
    return file


def texts_of(figure: Figure) -> Iterator[str]:
    for text in figure.findobj(Text):
        assert isinstance(text, Text)
        if text.get_visible() and text.get_text():
            yield text.get_text()


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Every figure, as if it were saved."""
    figures: list[Figure] = []
    save = light_only(gallery.save)
    monkeypatch.setattr(gallery, "save", lambda figure, file: (figures.append(figure), save(figure, file))[1])
    return figures


@pytest.mark.usefixtures("han")
def test_a_chinese_report_is_drawn_without_a_missing_glyph(
    analysis: Analysis, drawn: list[Figure], tmp_path: Path
) -> None:
    folder = tmp_path / "report"
    folder.mkdir()
    assert analysis.attention is not None
    labels = ("河", "<b>$x^$", "\U00013000", *analysis.attention.labels[3:])  # the last one in none of the fonts
    analysis = dataclasses.replace(analysis, attention=dataclasses.replace(analysis.attention, labels=labels))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # matplotlib warns of each character without a glyph
        write_report(analysis, folder, "zh")
    texts = [text for figure in drawn for text in texts_of(figure)]
    for name in ("group_attention", "prompt_speed", "kl", "heads_nothing", "no_window", "softmax_sink"):
        assert any(LANGUAGES["zh"][name] in text for text in texts), name
    assert {"河", "<b>$x^$", "U+13000"} <= set(texts)
    covered = find_fonts(set("河"), set()).covered
    assert {character for text in texts for character in text if ord(character) not in covered} <= {"\n"}
    page = (folder / PAGE).read_text(encoding="utf-8")
    assert 'lang="zh-CN"' in page and "fonts-noto-cjk" not in page
    files = {file.name for file in folder.iterdir()}
    named = set(re.findall(r'(?:src|srcset|href)="([^"#]+)"', page))
    assert files - {PAGE} == named  # every file is shown, and every file that is shown is there
    assert {STYLE, NUMBERS, "structure.png", "attention-2-dark.png", "adapter-1.png", "radar.png"} <= named
    images = re.findall(r'<img src="([^"]+)" alt="[^"]+" width="(\d+)" height="(\d+)"', page)
    assert len(images) == page.count("<img") > 10
    for src, width, height in images:
        assert matplotlib.image.imread(folder / src).shape[:2] == (int(height), int(width))


@pytest.mark.usefixtures("no_han")
def test_without_a_font_words_are_english_and_characters_numbers(analysis: Analysis) -> None:
    found = find_fonts(set("".join(LANGUAGES["zh"].values())), set("河"))
    assert found.families == ("DejaVu Sans",) and not found.cover("河")
    assert found.shown("a河\nб") == "aU+6CB3\nб"
    pictures = {name: Picture(file="a", dark_file="b", width=1, height=1) for name, _ in drawings(analysis)}
    for language, lacks in (("zh", True), ("en", True), ("zh", False)):
        page = make_page(analysis, language, pictures, lacks_font=lacks)
        assert ("fonts-noto-cjk" in page) == lacks


@pytest.mark.usefixtures("no_han", "drawn")
def test_a_chinese_report_without_a_font_is_drawn_in_english(
    analysis: Analysis, drawn: list[Figure], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = [one for one in drawings(analysis) if one[0] in ("attention-0", "structure")]
    monkeypatch.setattr(gallery, "drawings", lambda _: chosen)
    monkeypatch.setattr(report, "make_page", lambda *_, lacks_font: f"lacks: {lacks_font}")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        write_report(analysis, tmp_path, "zh")
    assert (tmp_path / PAGE).read_text() == "lacks: True"
    texts = {text for figure in drawn for text in texts_of(figure)}
    assert "Attention" in texts and all(ord(character) < 0x3000 for text in texts for character in text)


def test_a_font_must_have_all_words_and_han_glyphs(
    no_han: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    del no_han
    words = set("模型层")
    files = [
        write_font(tmp_path / "a.ttf", words, "A Few"),
        write_font(tmp_path / "b.ttf", set(fonts.HAN_SAMPLE), "B Without"),
        write_font(tmp_path / "c.ttf", words | fonts.HAN_SAMPLE | {"龘"}, "C All"),
    ]
    (tmp_path / "d.ttf").write_bytes(b"no font")
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: [*map(str, files), str(tmp_path / "d.ttf")])
    found = find_fonts(words | {"龘"}, set())
    assert found.families == ("DejaVu Sans", "C All") and found.cover("龘 a") and not found.cover("河")
    monkeypatch.setattr(fonts, "_PREFERRED", ("C All",))
    assert find_fonts(words, set()).families == ("DejaVu Sans", "C All")
    assert find_fonts(set("abc"), set("é")).families == ("DejaVu Sans",)


def test_a_font_of_boxes_for_all_characters_is_not_taken(
    no_han: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    del no_han
    file = write_font(tmp_path / "boxes.ttf", set(fonts.HAN_SAMPLE), "Last Resort Test")
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: [str(file)])
    assert find_fonts(set("模"), set()).families == ("DejaVu Sans",)


def test_preferred_fonts_come_first(no_han: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    del no_han
    names = ("Another Han", "Noto Sans SC")
    files = [str(write_font(tmp_path / f"{name}.ttf", set(fonts.HAN_SAMPLE), name)) for name in names]
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: files)
    assert find_fonts(set("模"), set()).families == ("DejaVu Sans", "Noto Sans SC")


def as_json(value: object) -> object:
    """What JSON makes of a value, without the code under test."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: as_json(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, tuple):
        return [as_json(entry) for entry in value]
    return {key: as_json(entry) for key, entry in value.items()} if isinstance(value, dict) else value


def test_the_json_has_every_number(analysis: Analysis, tmp_path: Path) -> None:
    report.write_json(analysis, tmp_path / NUMBERS)
    found = json.loads((tmp_path / NUMBERS).read_text(encoding="utf-8"))
    for name in ("info", "groups", "parts", "kinds", "weights", "spectra", "quality", "axes", "adapters", "versions"):
        assert found[name] == as_json(getattr(analysis, name)), name
    assert found.keys() == {field.name for field in dataclasses.fields(analysis)}
    assert analysis.attention is not None
    for name in ("weights_LHTS", "means_LTS"):
        assert np.abs(np.array(found["attention"][name]) - getattr(analysis.attention, name).numpy()).max() <= 5e-7
    for speed, shown in zip(analysis.speeds, found["speeds"], strict=True):
        assert shown["prompt_tokens_per_s"] == speed.batch * speed.length / shown["prompt_s"]
        assert shown["decoded_tokens_per_s"] == speed.batch / shown["step_s"]
    assert found["config"]["num_experts"] == 6


def test_numbers_that_json_lacks_become_null(analysis: Analysis, tmp_path: Path) -> None:
    odd = dataclasses.replace(analysis, quality=dataclasses.replace(analysis.quality, perplexity=float("inf")))
    report.write_json(odd, tmp_path / NUMBERS)
    assert json.loads((tmp_path / NUMBERS).read_text())["quality"]["perplexity"] is None


def cells(page: str, section: str) -> list[list[str]]:
    """Rows of the tables of a section."""
    found = re.search(rf'<section id="{section}".*?</section>', page, re.DOTALL)
    assert found is not None
    rows = re.findall(r"<tr>(.*?)</tr>", found[0], re.DOTALL)
    return [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in rows]


@pytest.fixture
def pictures(analysis: Analysis) -> dict[str, Picture]:
    return {name: Picture(file=f"{name}.png", dark_file="d", width=1, height=1) for name, _ in drawings(analysis)}


def test_tables_show_the_figures(analysis: Analysis, pictures: dict[str, Picture]) -> None:
    page = make_page(analysis, "en", pictures, lacks_font=False)
    rows = cells(page, "parameters")
    for group in analysis.groups:
        assert any(f"{group.num_parameters:,}" in row and str(group.num_tensors) in row for row in rows)
    assert ["Total", "", f"{analysis.info.num_parameters:,}", "100%"] in rows
    for one in analysis.weights:
        row = next(row for row in cells(page, "sparsity") if row[0] == one.name)
        assert row[1] == number(one.rms)
        assert any(row[:3] == [one.name, number(one.peak), number(one.kurtosis)] for row in cells(page, "outliers"))
    for spectrum in analysis.spectra:
        name = spectrum.name if spectrum.expert is None else f"{spectrum.name} [{spectrum.expert}]"
        shown = [number(spectrum.largest), number(spectrum.stable_rank), number(spectrum.effective_rank)]
        assert [name, *shown, str(spectrum.num_values), "exact"] in cells(page, "spectra")
    assert analysis.quality is not None and analysis.attention is not None
    assert ["Bits per byte", f"{analysis.quality.bits_per_byte:.4f}"] in cells(page, "quality")
    for head in analysis.attention.figures:
        values = [number(value) for value in (head.first, head.distance, head.entropy, head.nothing)]
        assert [f"{head.layer}, {head.head}", *values] in cells(page, "attention")
    for speed in analysis.speeds:
        assert speed.prompt_s is not None
        row = next(row for row in cells(page, "speed") if row[:2] == [f"{speed.length:,}", str(speed.batch)])
        assert row[2:4] == [number(speed.prompt_s * 1000), number(speed.prompt_tokens_per_s)]
    for adapter in analysis.adapters:
        for change in adapter.modules:
            assert any(row[0] == change.name and number(change.norm) in row for row in cells(page, "adapters"))
        assert ["all", number(adapter.effects[-1].kl), number(adapter.effects[-1].rms)] in cells(page, "adapters")


def test_what_comes_from_outside_is_escaped_and_nothing_runs(analysis: Analysis, pictures: dict[str, Picture]) -> None:
    page = make_page(analysis, "en", pictures, lacks_font=True)
    assert HOSTILE not in page and "&lt;b&gt;$x^$&amp;&quot;&#x27;" in page
    assert set(re.findall(r"<(\w+)", page)).isdisjoint({"script", "style", "iframe", "object", "b"})
    assert not re.search(r'\s(on\w+|style)="', page) and "://" not in page
    assert f'http-equiv="Content-Security-Policy" content="{POLICY.replace(chr(39), "&#x27;")}"' in page


class Recorded(dict[str, str]):
    """Remembers which words were taken."""

    def __init__(self, words: Mapping[str, str], taken: set[str]) -> None:
        super().__init__(words)
        self.taken = taken

    def __getitem__(self, name: str) -> str:
        self.taken.add(name)
        return super().__getitem__(name)


def test_both_languages_have_the_same_words_and_all_are_used(
    analysis: Analysis, pictures: dict[str, Picture], monkeypatch: pytest.MonkeyPatch
) -> None:
    english, chinese = LANGUAGES["en"], LANGUAGES["zh"]
    assert english.keys() == chinese.keys()

    def fields(text: str) -> set[str | None]:
        return {name for _, name, _, _ in string.Formatter().parse(text)} - {None}

    assert {name: fields(text) for name, text in english.items()} == {n: fields(text) for n, text in chinese.items()}
    assert [name for name, text in english.items() if text == "" or chinese[name] == ""] == []
    taken: set[str] = set()
    recorded = {name: Recorded(words, taken) for name, words in LANGUAGES.items()}
    monkeypatch.setattr(report, "LANGUAGES", recorded)
    make_page(analysis, "en", pictures, lacks_font=True)
    make_page(odd_analysis(analysis), "en", {n: p for n, p in pictures.items() if n != "radar"}, lacks_font=False)
    make_page(dataclasses.replace(analysis, text=None), "en", pictures, lacks_font=False)
    pen = Pen(words=recorded["en"], fonts=find_fonts(set(), set()), theme=LIGHT)
    with drawing(pen):
        for _, draw in [*drawings(analysis), *drawings(odd_analysis(analysis))]:
            draw(pen)
    assert english.keys() - taken == set()


def odd_analysis(analysis: Analysis) -> Analysis:
    """What the model of `analysis` is not: all experts used by each token, a tied head, local rotations, scales, no
    tokenizer, a randomized spectrum, a speed that ran out of memory."""
    config = analysis.config.__class__.from_dict(
        analysis.config.to_dict() | {"tie_word_embeddings": True, "expert_pools": None, "sink_tokens": 0}
    )
    (spectrum, *_), (speed, *_) = analysis.spectra, analysis.speeds
    assert isinstance(spectrum, Spectrum) and analysis.quality is not None
    groups = analysis.groups[:1]
    return dataclasses.replace(
        analysis,
        config=config,
        info=dataclasses.replace(analysis.info, num_active_parameters=analysis.info.num_parameters),
        groups=(*groups, dataclasses.replace(groups[0], name="scales")),
        kinds=(dataclasses.replace(analysis.kinds[0], rotation="local"), *analysis.kinds[1:]),
        spectra=(dataclasses.replace(spectrum, method="randomized", effective_rank=None),),
        text=dataclasses.replace(analysis.text, name="a.txt") if analysis.text else None,
        quality=dataclasses.replace(analysis.quality, num_unknown=3),
        speeds=(dataclasses.replace(speed, prompt_s=None, step_s=None, is_out_of_memory=True),),
    )


def test_sections_that_were_not_measured_are_absent(analysis: Analysis, pictures: dict[str, Picture]) -> None:
    little = dataclasses.replace(
        analysis, text=None, attention=None, quality=None, speeds=(), adapters=(), axes=analysis.axes[:2]
    )
    names = {name for name, _ in drawings(little)}
    assert names == {"parameters", "structure", "sparsity", "outliers", "spectra", "ranks"}
    page = make_page(little, "en", {name: pictures[name] for name in names}, lacks_font=False)
    assert "The model has no tokenizer" in page and "Fewer than three axes" in page
    for name in ("attention", "quality", "speed", "adapters"):
        assert f'id="{name}"' not in page and f'href="#{name}"' not in page


def test_pictures_of_a_dark_page_are_dark(analysis: Analysis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = [one for one in drawings(analysis) if one[0] == "parameters"]
    monkeypatch.setattr(gallery, "drawings", lambda _: chosen)
    latin = Fonts(families=("DejaVu Sans",), covered=find_fonts(set(), set()).covered)
    (picture,) = draw_all(analysis, tmp_path, LANGUAGES["en"], latin).values()
    corners = [matplotlib.image.imread(tmp_path / file)[0, 0, :3] for file in (picture.file, picture.dark_file)]
    assert corners[0].min() > 0.9 and corners[1].max() < 0.2


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "—"),
        (0, "0"),
        (1234567, "1.23e+06"),
        (12345.6, "12,300"),
        (0.5, "0.5"),
        (1e-9, "1.00e-09"),
        (-2.345, "-2.35"),
    ],
)
def test_numbers_have_three_digits(value: float | None, text: str) -> None:
    assert number(value) == text


def test_the_family_of_a_test_font_is_not_one_of_the_machine() -> None:
    assert FAMILY not in {entry.name for entry in font_manager.fontManager.ttflist}
