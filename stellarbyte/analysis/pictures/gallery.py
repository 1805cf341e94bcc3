"""All pictures of an analysis, in both themes."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from matplotlib.figure import Figure

from stellarbyte.analysis.analyse import Analysis
from stellarbyte.analysis.pictures.adapters import draw_adapter
from stellarbyte.analysis.pictures.attention import draw_attention, draw_heads
from stellarbyte.analysis.pictures.fonts import Fonts
from stellarbyte.analysis.pictures.overview import draw_parameters, draw_radar, draw_speed
from stellarbyte.analysis.pictures.structure import draw_structure
from stellarbyte.analysis.pictures.style import DARK, LIGHT, Pen, drawing, save
from stellarbyte.analysis.pictures.weights import draw_outliers, draw_ranks, draw_sparsity, draw_spectra

Draw = Callable[[Pen], Figure]


@dataclass(frozen=True, kw_only=True)
class Picture:
    """Attributes: file, dark_file: names in the report's folder. width, height: in pixels, of both."""

    file: str
    dark_file: str
    width: int
    height: int


def drawings(analysis: Analysis) -> Iterator[tuple[str, Draw]]:
    """Name and function of each picture that this analysis has figures for."""
    yield "parameters", partial(draw_parameters, analysis)
    yield "structure", partial(draw_structure, analysis)
    if len(analysis.axes) > 2:
        yield "radar", partial(draw_radar, analysis)
    yield "sparsity", partial(draw_sparsity, analysis)
    yield "outliers", partial(draw_outliers, analysis)
    yield "spectra", partial(draw_spectra, analysis)
    yield "ranks", partial(draw_ranks, analysis)
    if analysis.attention is not None:
        for place, layer in enumerate(analysis.attention.layers):
            yield f"attention-{layer}", partial(draw_attention, analysis, place)
        yield "heads", partial(draw_heads, analysis.attention)
    if analysis.speeds:
        yield "speed", partial(draw_speed, analysis)
    for number, adapter in enumerate(analysis.adapters):
        yield f"adapter-{number}", partial(draw_adapter, analysis, adapter)


def draw_all(analysis: Analysis, folder: Path, words: Mapping[str, str], fonts: Fonts) -> dict[str, Picture]:
    """Write each picture into `folder`, which must exist; returns them by name.

    Raises:
        OSError: a file cannot be written.
    """
    pictures = {}
    for name, draw in drawings(analysis):
        for theme in (LIGHT, DARK):
            pen = Pen(words=words, fonts=fonts, theme=theme)
            with drawing(pen):
                width, height = save(draw(pen), folder / f"{name}{theme.ending}.png")
        pictures[name] = Picture(
            file=f"{name}{LIGHT.ending}.png", dark_file=f"{name}{DARK.ending}.png", width=width, height=height
        )
    return pictures
