"""Pictures of weights: sparsity, outliers and singular values, by layer and part."""

from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from stellarbyte.analysis.analyse import Analysis
from stellarbyte.analysis.pictures.style import Pen, heat_map, layer_ticks, layer_width, new_figure, short_name
from stellarbyte.analysis.spectrum import Spectrum
from stellarbyte.analysis.weights import SMALL, WeightStatistics

# P parts, L layers


def draw_sparsity(analysis: Analysis, pen: Pen) -> Figure:
    """Zeros, and numbers near zero."""
    rows, columns = _table(analysis.weights), analysis.config.num_hidden_layers
    figure = new_figure(layer_width(columns), 2.2 + 0.42 * len(rows))
    upper, lower = figure.subplots(2, 1)
    zeros_PL = _filled(rows, columns, lambda one: one.zeros * 100)
    small_PL = _filled(rows, columns, lambda one: one.small * 100)
    heat_map(
        upper, pen, zeros_PL, list(rows), title=pen.words["zeros_title"], label="%", least=0, most=_above(zeros_PL)
    )
    title = pen.words["small_title"].format(small=SMALL)
    heat_map(lower, pen, small_PL, list(rows), title=title, label="%", least=0, most=_above(small_PL))
    return figure


def draw_outliers(analysis: Analysis, pen: Pen) -> Figure:
    """The largest number and the kurtosis, of matrices."""
    rows, columns = _table(_matrices(analysis)), analysis.config.num_hidden_layers
    figure = new_figure(layer_width(columns), 2.2 + 0.5 * len(rows))
    upper, lower = figure.subplots(2, 1)
    peaks_PL = _filled(rows, columns, lambda one: one.peak)
    kurtoses_PL = _filled(rows, columns, lambda one: np.nan if one.kurtosis is None else np.log10(one.kurtosis))
    heat_map(upper, pen, peaks_PL, list(rows), title=pen.words["peak_title"], label="max |w| / rms")
    heat_map(lower, pen, kurtoses_PL, list(rows), title=pen.words["kurtosis_title"], label="log10")
    return figure


def draw_spectra(analysis: Analysis, pen: Pen) -> Figure:
    """Singular values relative to the largest: a panel for each part, a line for each layer's (first) matrix."""
    by_part = _by_part(analysis)
    columns = min(4, len(by_part))
    rows = -(-len(by_part) // columns)
    figure = new_figure(2.8 * columns + 1, 2.4 * rows + 0.4)
    panels: list[Axes] = list(figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flat)
    last = max(1, analysis.config.num_hidden_layers - 1)
    colours = ScalarMappable(Normalize(0, last), "viridis")  # of whose ends both can be seen on both grounds
    for panel, (part, of_part) in zip(panels, by_part.items(), strict=False):
        for spectrum in of_part:
            if spectrum.expert not in (None, 0) or spectrum.largest == 0:
                continue
            at = [index / max(1, spectrum.num_values - 1) for index, _ in spectrum.curve]
            values = [max(value / spectrum.largest, 1e-8) for _, value in spectrum.curve]
            colour = pen.theme.text if spectrum.layer is None else colours.cmap(spectrum.layer / last)
            panel.plot(at, values, color=colour, linewidth=0.9)
        panel.set_title(short_name(part), fontsize="small")
        panel.set_yscale("log")
        panel.set_ylim(1e-4, 1.5)
        panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))  # no formula
        panel.grid(alpha=0.6)
    for panel in panels[len(by_part) :]:
        panel.set_visible(False)
    figure.supxlabel(pen.words["index_share"], fontsize="medium")
    figure.supylabel("σᵢ / σ₀", fontsize="medium")
    ticks = layer_ticks(analysis.config.num_hidden_layers)
    figure.colorbar(colours, ax=panels, label=pen.words["layer"], ticks=ticks)
    return figure


def draw_ranks(analysis: Analysis, pen: Pen) -> Figure:
    """Effective and stable rank by layer, as shares of the full rank; experts are averaged."""
    figure = new_figure(layer_width(analysis.config.num_hidden_layers), 5.2)
    panels = figure.subplots(1, 2)
    for panel, key in zip(panels, ("effective_rank", "stable_rank"), strict=True):
        for place, (part, of_part) in enumerate(_by_part(analysis).items()):
            points: dict[int, list[float]] = {}
            for spectrum in of_part:
                value = getattr(spectrum, key)
                if spectrum.layer is not None and value is not None:
                    points.setdefault(spectrum.layer, []).append(value / spectrum.num_values)
            if points:
                style = "-" if place < len(pen.theme.cycle) else "--"
                means = [float(np.mean(values)) for values in points.values()]
                panel.plot(list(points), means, style, marker="o", markersize=3, linewidth=1.2, label=short_name(part))
        panel.set_title(pen.words[key])
        panel.set_xlabel(pen.words["layer"])
        panel.set_xticks(layer_ticks(analysis.config.num_hidden_layers))
        panel.set_ylim(bottom=0)
        panel.grid(alpha=0.6)
    panels[0].set_ylabel(pen.words["rank_share"])
    handles, labels = panels[1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize="small")
    return figure


def _matrices(analysis: Analysis) -> list[WeightStatistics]:
    return [one for one in analysis.weights if one.num_channels is not None]


def _by_part(analysis: Analysis) -> dict[str, list[Spectrum]]:
    found: dict[str, list[Spectrum]] = {}
    for spectrum in analysis.spectra:
        found.setdefault(spectrum.part, []).append(spectrum)
    return found


def _table(statistics: Sequence[WeightStatistics]) -> dict[str, list[WeightStatistics]]:
    """Those within layers by the short name of their part."""
    found: dict[str, list[WeightStatistics]] = {}
    for one in statistics:
        if one.layer is not None:
            found.setdefault(short_name(one.part), []).append(one)
    return found


def _filled(
    rows: dict[str, list[WeightStatistics]], columns: int, value: Callable[[WeightStatistics], float]
) -> np.ndarray:
    """[P, L]; NaN: the layer has no such part."""
    table_PL = np.full((len(rows), columns), np.nan)
    for place, of_row in enumerate(rows.values()):
        for one in of_row:
            assert one.layer is not None  # as `_table` chose
            table_PL[place, one.layer] = value(one)
    return table_PL


def _above(table_PL: np.ndarray) -> float:
    """The end of a scale that starts at 0."""
    return max(float(np.nanmax(table_PL)), 0.1)
