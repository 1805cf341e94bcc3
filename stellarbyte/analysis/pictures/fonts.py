"""Fonts whose glyphs cover a text, found on this machine."""

from collections.abc import Iterable, Iterator, Set
from dataclasses import dataclass

from matplotlib import font_manager

from stellarbyte.analysis.text import escaped

LATIN = "DejaVu Sans"  # comes with matplotlib
HAN_SAMPLE = frozenset("的一是不了在有中模型参数层头值")
FONT_PACKAGE = "fonts-noto-cjk"  # of Debian and Ubuntu
# Tried before all others: these are made for simplified Chinese.
_PREFERRED = (
    *("Noto Sans CJK SC", "Noto Sans SC", "Source Han Sans SC", "Source Han Sans CN", "PingFang SC", "Microsoft YaHei"),
    *("WenQuanYi Micro Hei", "WenQuanYi Zen Hei", "Noto Sans CJK JP", "SimHei", "Heiti SC", "Droid Sans Fallback"),
)
_PLACEHOLDERS = ("Last Resort", "LastResort", "Adobe Blank")  # have a box, or nothing, for every character


@dataclass(frozen=True, kw_only=True)
class Fonts:
    """Attributes: families: matplotlib takes each glyph from the first that has it. covered: code points that one of
    them has."""

    families: tuple[str, ...]
    covered: frozenset[int]

    def cover(self, text: Iterable[str]) -> bool:
        """Whether there is a glyph for every character."""
        return all(ord(character) in self.covered for character in text)

    def shown(self, text: str) -> str:
        """The text with U+XXXX in the place of each character that no family has a glyph for."""
        return "".join(
            character if ord(character) in self.covered or character == "\n" else escaped(character)
            for character in text
        )


def find_fonts(words: Set[str], others: Set[str]) -> Fonts:
    """matplotlib's own font and, if some character needs it, the first other one with Han glyphs and all of `words`.

    Fonts that were installed after matplotlib listed them are found, too.

    Args:
        words: characters that must have glyphs.
        others: characters that should have glyphs.
    """
    covered = _code_points(font_manager.findfont(LATIN))
    latin = Fonts(families=(LATIN,), covered=covered)
    if latin.cover(words | others):
        return latin
    for family, file in _candidates():
        try:
            has = _code_points(file)
        except (OSError, RuntimeError):  # gone, or no font that FreeType reads
            continue
        found = Fonts(families=(LATIN, family), covered=covered | has)
        if found.cover(words | HAN_SAMPLE):
            return found
    return latin


def _candidates() -> Iterator[tuple[str, str]]:
    """(family, file) of the upright fonts on this machine, the preferred ones first."""
    known = {entry.fname for entry in font_manager.fontManager.ttflist}
    for file in font_manager.findSystemFonts():
        if file not in known:
            try:
                font_manager.fontManager.addfont(file)
            except (OSError, RuntimeError, ValueError):  # as above
                continue
    upright = {
        entry.name: entry.fname
        for entry in sorted(font_manager.fontManager.ttflist, key=lambda entry: (_weight(entry.weight), entry.fname))
        if entry.style == "normal" and not entry.name.lstrip(".").startswith(_PLACEHOLDERS)
    }
    preferred = [name for name in _PREFERRED if name in upright]
    for name in [*preferred, *sorted(upright.keys() - set(preferred))]:
        yield name, font_manager.findfont(font_manager.FontProperties(family=[name]))


def _weight(weight: str | int) -> int:
    """Distance from a regular weight, negative: the last entry of a family counts."""
    number = font_manager.weight_dict.get(weight, 400) if isinstance(weight, str) else weight
    return -abs(number - 400)


def _code_points(file: str) -> frozenset[int]:
    return frozenset(font_manager.get_font(file).get_charmap())
