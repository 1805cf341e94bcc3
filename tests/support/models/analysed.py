"""A tiny model with every part that an analysis shows, its adapters, and a font with Chinese glyphs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib.figure import Figure

from stellarbyte.analysis.analyse import Analysis, Request, analyse
from stellarbyte.analysis.pictures.style import DARK
from stellarbyte.analysis.text import read_text
from tests.support.models.adapters import write_adapter
from tests.support.models.byte_transformer import EXPERTS, W, make_model
from tests.support.training.byte_tokenizer import save_byte_tokenizer

Save = Callable[[Figure, Path], tuple[int, int]]
FULL: dict[str, Any] = EXPERTS | {
    "vocab_size": 300,
    "sliding_window": W,
    "sink_tokens": 4,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "layer_rotations": ["global", "none", "global"],
    "moe_layers": [0, 2],
    "expert_pools": [0, 0],
    "shared_expert_intermediate_size": 16,
    "softmax_sink": True,
}
HOSTILE = "<b>$x^$&\"'"  # a name that is HTML, and a formula that cannot be parsed
FAMILY = "Boxes for Tests"


def full_model(folder: Path) -> Path:
    """A checkpoint with windows, sinks of both kinds, layers without rotation, and experts of one pool."""
    make_model(**FULL).save_pretrained(folder)
    return save_byte_tokenizer(folder, vocab_size=300)


def full_analysis(folder: Path, *, text: str | None = None, language: str = "en") -> Analysis:
    """Everything is measured, with an adapter of a hostile name and one with DoRA and copies."""
    checkpoint = full_model(folder / "model")
    model = make_model(**FULL)
    adapters = (
        write_adapter(folder / HOSTILE, model, seed=1),
        write_adapter(folder / "dora", model, seed=2, use_dora=True, modules_to_save=("lm_head",)),
    )
    request = Request(
        name=f"model {HOSTILE}",
        checkpoint=checkpoint,
        text=read_text(text, language),
        text_is_given=text is not None,
        adapters=adapters,
        measures_speed=True,
        device="cpu",
    )
    return analyse(request, progress=_ignore, tell=_ignore)


def light_only(save: Save) -> Save:
    """`save` for light pictures; dark ones, which have the same size and texts, are their copies."""
    sizes: dict[Path, tuple[int, int]] = {}

    def save_light(figure: Figure, file: Path) -> tuple[int, int]:
        light = file.with_stem(file.stem.removesuffix(DARK.ending))
        if light not in sizes:
            sizes[light] = save(figure, light)
        if light != file:
            file.write_bytes(light.read_bytes())
        return sizes[light]

    return save_light


def _ignore(*_: object) -> None:
    """What a command would print."""


def write_font(file: Path, characters: set[str], family: str = FAMILY) -> Path:
    """A TrueType font whose glyphs are all one box."""
    pen = TTGlyphPen(None)
    for point, draw in (((100, 0), pen.moveTo), ((100, 800), pen.lineTo), ((900, 800), pen.lineTo)):
        draw(point)
    pen.closePath()
    box = pen.glyph()
    names = {ord(character): f"u{ord(character):05X}" for character in sorted(characters)}
    order = [".notdef", *names.values()]
    font = FontBuilder(1000, isTTF=True)
    font.setupGlyphOrder(order)
    font.setupCharacterMap(names)
    font.setupGlyf(dict.fromkeys(order, box))
    font.setupHorizontalMetrics(dict.fromkeys(order, (1000, 100)))
    font.setupHorizontalHeader(ascent=800, descent=-200)
    font.setupNameTable({"familyName": family, "styleName": "Regular"})
    font.setupOS2(sTypoAscender=800, usWeightClass=400)
    font.setupPost()
    font.save(file)
    return file
