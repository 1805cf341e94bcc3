"""Pictures of a whole model: parameters by group, the radar, and speed."""

import math
from collections.abc import Callable, Mapping

import numpy as np
from matplotlib.figure import Figure

from stellarbyte.analysis.analyse import Analysis
from stellarbyte.analysis.pictures.style import Pen, new_figure, number
from stellarbyte.analysis.radar import Axis
from stellarbyte.analysis.speed import Speed
from stellarbyte.checkpoint.info import size


def draw_parameters(analysis: Analysis, pen: Pen) -> Figure:
    """A pie of the groups, with a legend that has the numbers."""
    figure = new_figure(8.6, 4.2)
    axes = figure.subplots()
    counts = analysis.groups
    wedges = axes.pie(
        [count.num_parameters for count in counts],
        startangle=90,
        counterclock=False,
        colors=[pen.theme.cycle[i % len(pen.theme.cycle)] for i in range(len(counts))],
        wedgeprops={"width": 0.42, "edgecolor": pen.theme.ground},
    )[0]
    axes.text(0, 0, f"{sum(count.num_parameters for count in counts):,}", ha="center", va="center", fontsize=13)
    labels = [
        f"{pen.words[f'group_{count.name}']}: {count.num_parameters:,} ({share(count.share)})" for count in counts
    ]
    figure.legend(wedges, labels, loc="outside right center", frameon=False)
    return figure


def share(value: float) -> str:
    """A share as a percentage; small ones are not 0."""
    return f"{value:.1%}" if value >= 0.001 or value == 0 else f"{value * 100:.1g}%"


def axis_value(axis: Axis, words: Mapping[str, str]) -> str:
    """The number of an axis with its unit."""
    if axis.name == "memory":
        return size(round(axis.value))
    if axis.name == "size":
        return words["unit_size"].format(value=f"{axis.value:,.0f}")
    return words[f"unit_{axis.name}"].format(value=number(axis.value))


def draw_radar(analysis: Analysis, pen: Pen) -> Figure:
    """Further out is smaller, faster or better."""
    figure = new_figure(8.0, 5.6)
    axes = figure.add_subplot(projection="polar")
    angles = [2 * math.pi * i / len(analysis.axes) for i in range(len(analysis.axes))]
    scores = [axis.score for axis in analysis.axes]
    axes.set_theta_offset(math.pi / 2)  # type: ignore[attr-defined]  # of polar axes
    axes.set_theta_direction(-1)  # type: ignore[attr-defined]
    axes.plot([*angles, angles[0]], [*scores, scores[0]], color=pen.theme.accent, linewidth=2, marker="o")
    axes.fill(angles, scores, color=pen.theme.accent, alpha=0.2)
    labels = [f"{pen.words[f'axis_{axis.name}']}\n{axis_value(axis, pen.words)}" for axis in analysis.axes]
    axes.set_xticks(angles, labels)
    axes.tick_params(axis="x", pad=26)
    axes.set_ylim(0, 1)
    axes.set_yticks([0.25, 0.5, 0.75, 1.0], ["0.25", "0.5", "0.75", "1"], fontsize="x-small")
    axes.grid(color=pen.theme.line)
    return figure


def draw_speed(analysis: Analysis, pen: Pen) -> Figure:
    """Tokens per second of prompts and of decoding, by batch, a bar for each length."""
    figure = new_figure(9.0, 3.8)
    kinds: list[tuple[str, Callable[[Speed], float | None]]] = [
        ("prompt_speed", lambda speed: speed.prompt_tokens_per_s),
        ("decoding_speed", lambda speed: speed.decoded_tokens_per_s),
    ]
    batches = list(dict.fromkeys(speed.batch for speed in analysis.speeds))
    lengths = list(dict.fromkeys(speed.length for speed in analysis.speeds))
    for axes, (title, value) in zip(figure.subplots(1, 2), kinds, strict=True):
        width = 0.8 / len(lengths)
        for place, length in enumerate(lengths):
            values = [value(speed) or 0.0 for speed in analysis.speeds if speed.length == length]
            at = np.arange(len(batches)) + (place - (len(lengths) - 1) / 2) * width
            bars = axes.bar(at, values, width * 0.92, label=pen.words["length_label"].format(length=f"{length:,}"))
            axes.bar_label(bars, [number(one) if one else "—" for one in values], fontsize="x-small", padding=2)
        axes.set_title(pen.words[title])
        axes.set_xticks(range(len(batches)), [str(batch) for batch in batches])
        axes.set_xlabel(pen.words["batch"])
        axes.margins(y=0.15)
        axes.grid(axis="y", alpha=0.6)
        axes.set_axisbelow(True)
    figure.axes[0].set_ylabel(pen.words["tokens_per_s"])
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(lengths))
    return figure
