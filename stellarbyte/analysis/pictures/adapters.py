"""The picture of an adapter: how much it changes each module, and where it changes the logits."""

import numpy as np
from matplotlib.figure import Figure

from stellarbyte.analysis.adapters import AdapterFigures
from stellarbyte.analysis.analyse import Analysis
from stellarbyte.analysis.pictures.style import Pen, heat_map, layer_ticks, layer_width, new_figure, short_name


def draw_adapter(analysis: Analysis, adapter: AdapterFigures, pen: Pen) -> Figure:
    """‖ΔW‖ / ‖W‖ by layer and part above, the change of the logits by layer below, if it was measured."""
    num_layers = analysis.config.num_hidden_layers
    inside = [change for change in adapter.modules if change.layer is not None]
    parts = list(dict.fromkeys(short_name(change.part) for change in inside))
    effects = [effect for effect in adapter.effects if not effect.is_whole]
    heights = ([1.6 + 0.24 * len(parts)] if parts else []) + ([2.8] if effects else [])
    figure = new_figure(layer_width(num_layers), sum(heights) or 1.0)
    panels = list(figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights).flat) if heights else []
    if parts:
        values = np.full((len(parts), num_layers), np.nan)
        for change in inside:
            if change.relative is not None and change.layer is not None:
                values[parts.index(short_name(change.part)), change.layer] = change.relative * 100
        heat_map(panels[0], pen, values, parts, title=pen.words["change_title"], label="%", least=0)
    if effects:
        axes = panels[-1]
        at = [num_layers if effect.layer is None else effect.layer for effect in effects]
        axes.bar(at, [effect.kl for effect in effects], color=pen.theme.accent)
        ticks, labels = layer_ticks(num_layers), [str(layer) for layer in layer_ticks(num_layers)]
        if num_layers in at:
            ticks, labels = [*ticks, num_layers], [*labels, pen.words["outside_layers"]]
        axes.set_xticks(ticks, labels)
        axes.set_title(pen.words["effect_title"])
        axes.set_xlabel(pen.words["layer"])
        axes.set_ylabel(pen.words["kl"])
        axes.grid(axis="y", alpha=0.6)
        axes.set_axisbelow(True)
    return figure
