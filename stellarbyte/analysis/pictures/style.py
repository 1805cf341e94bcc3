"""What all pictures share: colours of both themes, fonts, words, and how they are saved."""

import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.rcsetup import cycler

from stellarbyte.analysis.pictures.fonts import Fonts

DPI = 110


@dataclass(frozen=True, kw_only=True)
class Theme:
    """Attributes: ending: of the files' names. cycle: colours of groups and lines."""

    ending: str
    ground: str
    text: str
    muted: str
    line: str
    accent: str
    soft: str
    colormap: str
    cycle: tuple[str, ...]


LIGHT = Theme(
    ending="",
    ground="#ffffff",
    text="#1a1f2e",
    muted="#565e72",
    line="#d9dde6",
    accent="#3a4fd0",
    soft="#e8ebfc",
    colormap="YlGnBu",
    cycle=("#3a4fd0", "#c2571a", "#14713f", "#9a3fa8", "#b0851a", "#1f8a9e", "#ab2218", "#6b7280", "#7f5a3c"),
)
DARK = Theme(
    ending="-dark",
    ground="#171b25",
    text="#e7eaf2",
    muted="#a3acc0",
    line="#2d3446",
    accent="#9dadff",
    soft="#262d52",
    colormap="viridis",
    cycle=("#9dadff", "#ffb07c", "#6fd79b", "#e09cec", "#e8cf75", "#7cd5e4", "#ff9d92", "#b6bccb", "#d0ab8c"),
)


@dataclass(frozen=True, kw_only=True)
class Pen:
    """What a drawing function needs beside figures. `words`: by name, in the pictures' language."""

    words: Mapping[str, str]
    fonts: Fonts
    theme: Theme

    def shown(self, text: str) -> str:
        """Text from outside, such as a token: with glyphs for every character."""
        return self.fonts.shown(text)


@contextmanager
def drawing(pen: Pen) -> Iterator[None]:
    """Figures made and saved within have the pen's fonts and colours; a $ in a text starts no formula."""
    theme = pen.theme
    settings: Any = {  # names of settings, which matplotlib types one by one
        "font.family": list(pen.fonts.families),
        "text.parse_math": False,
        "axes.unicode_minus": True,
        "axes.prop_cycle": cycler(color=theme.cycle),
        "axes.titlesize": "medium",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "figure.dpi": DPI,
        **dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor", "legend.facecolor"), theme.ground),
        **dict.fromkeys(("text.color", "axes.labelcolor", "axes.titlecolor", "legend.labelcolor"), theme.text),
        **dict.fromkeys(("xtick.color", "ytick.color"), theme.muted),
        **dict.fromkeys(("axes.edgecolor", "grid.color", "legend.edgecolor"), theme.line),
    }
    with matplotlib.rc_context(settings):
        yield


def new_figure(width: float, height: float) -> Figure:
    """In inches. Without pyplot: no window system is asked."""
    return Figure(figsize=(width, height), layout="constrained")


def save(figure: Figure, file: Path) -> tuple[int, int]:
    """Write a PNG and return its width and height in pixels. Raises OSError."""
    figure.savefig(file, dpi=DPI)
    with file.open("rb") as stream:  # the canvas rounds in ways of its own
        header = stream.read(24)
    width, height = struct.unpack(">II", header[16:])
    return width, height


def short_name(part: str) -> str:
    """Of a part within a layer: without its module and without the ending of weights. `mlp.gate` is the router."""
    name = f"router.{part.removeprefix('mlp.gate.')}" if part.startswith("mlp.gate.") else part
    return name.removesuffix(".weight").removeprefix("self_attn.").removeprefix("mlp.")


def layer_width(num_layers: int) -> float:
    """Inches of a picture with one column for each layer."""
    return min(14.0, max(6.0, 3.0 + 0.28 * num_layers))


def heat_map(
    axes: Axes,
    pen: Pen,
    values: np.ndarray,
    rows: Sequence[str],
    *,
    title: str,
    label: str,
    least: float | None = None,
    most: float | None = None,
) -> None:
    """`values` [rows, layers]; NaN: the layer has no such part, and the ground shows."""
    image = axes.imshow(
        np.ma.masked_invalid(values),
        aspect="auto",
        interpolation="nearest",
        cmap=pen.theme.colormap,
        vmin=least,
        vmax=most,
    )
    axes.set_yticks(range(len(rows)), rows, fontsize="small")
    axes.set_xticks(layer_ticks(values.shape[1]))
    axes.set_xlabel(pen.words["layer"])
    axes.set_title(title)
    axes.set_facecolor(pen.theme.ground)
    assert axes.figure is not None
    bar = axes.figure.colorbar(image, ax=axes, label=label, pad=0.02)
    bar.outline.set_edgecolor(pen.theme.line)


def layer_ticks(num_layers: int) -> list[int]:
    """Numbers of layers at an axis: at most about 16."""
    return list(range(0, num_layers, max(1, -(-num_layers // 16))))


def number(value: float | None) -> str:
    """Three significant digits, thousands separated; — for None."""
    if value is None:
        return "—"
    if value != 0 and not 1e-3 <= abs(value) < 1e6:
        return f"{value:.2e}"
    return f"{float(f'{value:.3g}'):,.10g}"
