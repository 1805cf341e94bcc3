"""Pictures of attention: weights of some layers and heads on a text, and figures of all heads."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from stellarbyte.analysis.analyse import Analysis, AttentionFigures
from stellarbyte.analysis.pictures.style import Pen, heat_map, layer_ticks, new_figure

# T tokens as queries, S as keys, L layers, H heads


def draw_attention(analysis: Analysis, place: int, pen: Pen) -> Figure:
    """One of the shown layers: the mean over its heads with the tokens, and some heads. Keys that a query does not see
    are blank; a line marks where sinks end."""
    attention = analysis.attention
    assert attention is not None  # the caller
    layer, length = attention.layers[place], len(attention.labels)
    window = analysis.config.windows[layer]
    columns = 4
    rows = -(-len(attention.heads) // columns)
    figure = new_figure(10.5, 9.0 + 2.3 * rows)
    upper, lower = figure.subfigures(2, 1, height_ratios=[9.0, 2.3 * rows], squeeze=False).flat
    axes = upper.subplots()
    visible_TS = _visible(length, window, analysis.config.sink_tokens)
    image = _map(axes, attention.means_LTS[place].numpy(), visible_TS, pen)
    labels = [pen.shown(label) for label in attention.labels]
    size = 9 if length <= 32 else 7
    axes.set_xticks(range(length), labels, rotation=90, fontsize=size)
    axes.set_yticks(range(length), labels, fontsize=size)
    axes.set_xlabel(pen.words["key"])
    axes.set_ylabel(pen.words["query"])
    seen = pen.words["no_window"] if window is None else pen.words["window_of"].format(window=f"{window:,}")
    axes.set_title(pen.words["attention_title"].format(layer=layer, seen=seen))
    if window is not None and analysis.config.sink_tokens:
        axes.axvline(analysis.config.sink_tokens - 0.5, color=pen.theme.cycle[1], linewidth=1)
    upper.colorbar(image, ax=axes, label=pen.words["weight"], pad=0.02)
    panels = list(lower.subplots(rows, columns, squeeze=False).flat)
    for panel, head, weights_TS in zip(panels, attention.heads, attention.weights_LHTS[place], strict=False):
        _map(panel, weights_TS.numpy(), visible_TS, pen)
        panel.set_title(pen.words["head_number"].format(head=head), fontsize="small")
        panel.set_xticks([])
        panel.set_yticks([])
    for panel in panels[len(attention.heads) :]:
        panel.set_visible(False)
    return figure


def draw_heads(attention: AttentionFigures, pen: Pen) -> Figure:
    """Figures of every head: layers across, heads down."""
    layers = attention.figures[-1].layer + 1
    names = ["first", "distance", "entropy"]
    if any(one.nothing > 1e-6 for one in attention.figures):
        names.append("nothing")
    num_heads = len(attention.figures) // layers
    figure = new_figure(11.0, len(names) * max(1.8, 0.4 + 0.12 * num_heads) / 2 * 1.6 + 0.8)
    panels: list[Axes] = list(figure.subplots(-(-len(names) // 2), 2, squeeze=False).flat)
    for panel, name in zip(panels, names, strict=False):
        values_HL = np.array([getattr(one, name) for one in attention.figures]).reshape(layers, num_heads).T
        limits = {"least": 0.0, "most": 1.0} if name in ("first", "nothing") else {"least": 0.0}
        heat_map(
            panel, pen, values_HL, [str(head) for head in range(num_heads)],
            title=pen.words[f"heads_{name}"], label="", **limits,
        )  # fmt: skip
        panel.set_ylabel(pen.words["head"])
        panel.set_yticks(layer_ticks(num_heads), [str(head) for head in layer_ticks(num_heads)])
    for panel in panels[len(names) :]:
        panel.set_visible(False)
    return figure


def _visible(length: int, window: int | None, sinks: int) -> np.ndarray:
    """[T, S] true where a query sees a key."""
    query_T1, key_1S = np.arange(length)[:, None], np.arange(length)[None]
    visible_TS: np.ndarray = key_1S <= query_T1
    return visible_TS if window is None else visible_TS & ((key_1S > query_T1 - window) | (key_1S < sinks))


def _map(axes: Axes, weights_TS: np.ndarray, visible_TS: np.ndarray, pen: Pen) -> AxesImage:
    """Colours grow with the square root of the weight, so that small ones can be told from none."""
    masked = np.ma.masked_where(~visible_TS, weights_TS)
    axes.set_facecolor(pen.theme.line)
    return axes.imshow(masked, cmap=pen.theme.colormap, norm=PowerNorm(0.5, vmin=0, vmax=1), interpolation="nearest")
