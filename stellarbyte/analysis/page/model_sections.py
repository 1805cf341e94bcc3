"""Sections of the page about the model's files: parameters, structure, weights."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from stellarbyte.analysis.analyse import Analysis
from stellarbyte.analysis.page.html import Content, Element, details, element, table
from stellarbyte.analysis.parameters import Count
from stellarbyte.analysis.pictures.gallery import Picture
from stellarbyte.analysis.pictures.overview import axis_value, share
from stellarbyte.analysis.pictures.style import number
from stellarbyte.analysis.radar import Axis
from stellarbyte.analysis.spectrum import EXACT_SIDE, EXPERTS_PER_STACK, RANDOMIZED_VALUES, Spectrum
from stellarbyte.analysis.structure import LayerKind, layer_runs
from stellarbyte.analysis.weights import OUTLIER_CHANNEL, SMALL, WeightStatistics

_MOST_OUTLIERS = 12


@dataclass(frozen=True, kw_only=True)
class PageParts:
    """What sections are made of. `words`: by name, in the page's language."""

    analysis: Analysis
    words: Mapping[str, str]
    pictures: Mapping[str, Picture] = field(repr=False)

    def section(self, name: str, *content: Content) -> Element:
        """Headed by the word of that name, which is also its anchor."""
        heading = element("h2", self.words[name], id=f"{name}-heading")
        return element("section", heading, *content, id=name, aria_labelledby=f"{name}-heading")

    def paragraph(self, name: str, **values: object) -> Element:
        return element("p", self.words[name].format(**values))

    def picture(self, name: str, alt: str) -> Element:
        """In the page's theme; it leads to the file, which a phone can show larger."""
        one = self.pictures[name]
        image = element("img", src=one.file, alt=alt, width=one.width, height=one.height, loading="lazy")
        dark = element("source", srcset=one.dark_file, media="(prefers-color-scheme: dark)")
        return element("figure", element("a", element("picture", dark, image), href=one.file))


def parameters_section(parts: PageParts) -> Element:
    words, analysis = parts.words, parts.analysis
    total = [words["total"], "", f"{analysis.info.num_parameters:,}", "100%"]
    groups = [
        [words[f"group_{one.name}"], str(one.num_tensors), f"{one.num_parameters:,}", share(one.share)]
        for one in analysis.groups
    ]
    of_parts = [
        [one.name, _shapes(one), str(one.num_tensors), f"{one.num_parameters:,}", share(one.share)]
        for one in analysis.parts
    ]
    numbers = [words["tensors"], words["num_parameters"], words["share"]]
    return parts.section(
        "parameters",
        parts.paragraph("parameters_text"),
        parts.picture("parameters", words["alt_parameters"]),
        table([words["group"], *numbers], [*groups, total], caption=words["group"]),
        details(words["part"], table([words["part"], words["shape"], *numbers], of_parts, caption=words["part"])),
    )


def _shapes(count: Count) -> str:
    return "; ".join(" × ".join(f"{size:,}" for size in shape) for shape in count.shapes)


def structure_section(parts: PageParts) -> Element:
    words = parts.words
    head = [words["layers"], words["attention_column"], words["rotation_column"], words["feed_forward"]]
    rows = [_kind_row(parts, kind) for kind in parts.analysis.kinds]
    return parts.section(
        "structure",
        parts.paragraph("structure_text"),
        parts.picture("structure", words["alt_structure"]),
        table(head, rows, caption=words["structure"]),
    )


def _kind_row(parts: PageParts, kind: LayerKind) -> list[str]:
    words, config = parts.words, parts.analysis.config
    window = words["no_window"] if kind.window is None else words["window_of"].format(window=f"{kind.window:,}")
    if kind.window is not None and config.sink_tokens:
        window += words["with_sinks"].format(sinks=config.sink_tokens)
    method = "XPos" if config.use_xpos else "RoPE"
    return [
        ", ".join(layer_runs(kind.layers)),
        window,
        words[f"rotation_{kind.rotation}"].format(method=method),
        words["group_experts" if kind.has_experts else "group_mlp"],
    ]


def radar_section(parts: PageParts) -> Element:
    words, axes = parts.words, parts.analysis.axes
    has_picture = "radar" in parts.pictures
    head = [words[name] for name in ("axis", "value", "scores_0", "scores_1", "scale", "score")]
    rows = [
        [
            f"{words[f'axis_{axis.name}']}: {words[f'meaning_{axis.name}']}",
            axis_value(axis, words),
            _end(axis, axis.worst, words),
            _end(axis, axis.best, words),
            words[f"scale_{axis.kind}"],
            f"{axis.score:.3f}",
        ]
        for axis in axes
    ]
    return parts.section(
        "radar",
        parts.paragraph("radar_text"),
        parts.picture("radar", words["alt_radar"]) if has_picture else parts.paragraph("radar_few"),
        table(head, rows, caption=words["radar"]),
    )


def _end(axis: Axis, value: float, words: Mapping[str, str]) -> str:
    return axis_value(
        Axis(name=axis.name, value=value, score=0, worst=axis.worst, best=axis.best, kind=axis.kind), words
    )


def sparsity_section(parts: PageParts) -> Element:
    words, weights = parts.words, parts.analysis.weights
    by_part: dict[str, list[WeightStatistics]] = {}
    for one in weights:
        by_part.setdefault(one.part, []).append(one)
    numbers = [words["rms"], words["zeros"], words["near_zero"]]
    means = [
        [part, *(f(statistics.fmean(values)) for f, values in _columns(of_part))] for part, of_part in by_part.items()
    ]
    each = [[one.name, number(one.rms), share(one.zeros), share(one.small)] for one in weights]
    return parts.section(
        "sparsity",
        parts.paragraph("sparsity_text", small=SMALL, normal=share(math.erf(SMALL / math.sqrt(2)))),
        parts.picture("sparsity", words["alt_sparsity"]),
        table([f"{words['part']} ({words['all_layers']})", *numbers], means, caption=words["sparsity"]),
        details(words["each_tensor"], table([words["tensor"], *numbers], each, caption=words["each_tensor"])),
    )


def _columns(of_part: Sequence[WeightStatistics]) -> list[tuple[Callable[[float], str], list[float]]]:
    return [
        (number, [one.rms for one in of_part]),
        (share, [one.zeros for one in of_part]),
        (share, [one.small for one in of_part]),
    ]


def outliers_section(parts: PageParts) -> Element:
    words = parts.words
    ranked = sorted(parts.analysis.weights, key=lambda one: -one.peak)
    head = [words[name] for name in ("tensor", "peak", "kurtosis", "outlier_channels", "largest_channel")]
    rows = [
        [
            one.name,
            number(one.peak),
            number(one.kurtosis),
            "—" if one.num_channels is None else f"{one.num_outlier_channels:,} / {one.num_channels:,}",
            _channel(one, words),
        ]
        for one in ranked
    ]
    return parts.section(
        "outliers",
        parts.paragraph("outliers_text", times=OUTLIER_CHANNEL),
        parts.picture("outliers", words["alt_outliers"]),
        table(head, rows[:_MOST_OUTLIERS], caption=words["outliers"]),
        details(words["each_tensor"], table(head, rows, caption=words["each_tensor"])),
    )


def _channel(one: WeightStatistics, words: Mapping[str, str]) -> str:
    if one.largest_channel is None:
        return "—"
    expert, channel, times = one.largest_channel
    name = "channel_at" if expert is None else "expert_channel_at"
    return words[name].format(expert=expert, channel=channel, times=number(times))


def spectra_section(parts: PageParts) -> Element:
    words = parts.words
    by_part: dict[str, list[Spectrum]] = {}
    for one in parts.analysis.spectra:
        by_part.setdefault(one.part, []).append(one)
    numbers = [words[name] for name in ("largest_value", "stable_rank", "effective_rank", "full_rank")]
    rows = [
        [
            part,
            str(len(of_part)),
            number(statistics.median(one.largest for one in of_part)),
            number(statistics.median(one.stable_rank for one in of_part)),
            _median([one.effective_rank for one in of_part]),
            f"{of_part[0].num_values:,}",
            words[f"method_{of_part[0].method}"],
        ]
        for part, of_part in by_part.items()
    ]
    each = [
        [
            one.name if one.expert is None else f"{one.name} [{one.expert}]",
            number(one.largest),
            number(one.stable_rank),
            number(one.effective_rank),
            f"{one.num_values:,}",
            words[f"method_{one.method}"],
        ]
        for one in parts.analysis.spectra
    ]
    head = [f"{words['part']} ({words['medians']})", words["matrices"], *numbers, words["method"]]
    return parts.section(
        "spectra",
        parts.paragraph("spectra_text", side=f"{EXACT_SIDE:,}", count=RANDOMIZED_VALUES, experts=EXPERTS_PER_STACK),
        parts.picture("spectra", words["alt_spectra"]),
        parts.picture("ranks", words["alt_ranks"]),
        table(head, rows, caption=words["spectra"]),
        details(
            words["each_tensor"],
            table([words["tensor"], *numbers, words["method"]], each, caption=words["each_tensor"]),
        ),
    )


def _median(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return number(statistics.median(known) if known else None)
