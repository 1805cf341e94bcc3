"""Sections of the page about the running model: attention, quality, speed, adapters."""

import statistics
from collections.abc import Mapping

from stellarbyte.analysis.adapters import EFFECT_TOKENS, RANK_SHARE, AdapterFigures, Effect
from stellarbyte.analysis.attention import HeadFigures
from stellarbyte.analysis.page.html import Content, Element, details, element, table
from stellarbyte.analysis.page.model_sections import PageParts
from stellarbyte.analysis.pictures.overview import share
from stellarbyte.analysis.pictures.style import number
from stellarbyte.analysis.speed import DECODED_TOKENS, ROUNDS, Speed


def attention_section(parts: PageParts) -> Element | None:
    """None: attention was not observed."""
    attention, words = parts.analysis.attention, parts.words
    if attention is None:
        return None
    text = parts.analysis.text
    name = words["the_given_text"] if text is None or text.name is None else text.name
    pictures = [
        parts.picture(f"attention-{layer}", words["alt_attention"].format(layer=layer, count=len(attention.heads)))
        for layer in attention.layers
    ]
    by_layer: dict[int, list[HeadFigures]] = {}
    for one in attention.figures:
        by_layer.setdefault(one.layer, []).append(one)
    fields = ["first", "distance", "entropy"]
    if parts.analysis.config.softmax_sink:  # without it, rounding would be shown
        fields.append("nothing")
    means = [
        [str(layer), *(number(statistics.fmean(getattr(one, name) for one in of_layer)) for name in fields)]
        for layer, of_layer in by_layer.items()
    ]
    each = [[f"{one.layer}, {one.head}", *(number(getattr(one, name)) for name in fields)] for one in attention.figures]
    sinks = parts.analysis.config.sink_tokens
    first = words["first_tokens"].format(count=sinks) if sinks > 1 else words["first_token"]
    titles = [words[name] for name in fields]
    return parts.section(
        "attention",
        parts.paragraph("attention_text", shown=len(attention.labels), count=attention.num_tokens, text=name),
        pictures,
        element("h3", words["heads"]),
        parts.paragraph("heads_text", first=first),
        parts.picture("heads", words["alt_heads"]),
        table([words["layer"], *titles], means, caption=words["heads"]),
        details(
            words["heads"],
            table([f"{words['layer']}, {words['head']}", *titles], each, caption=words["heads"]),
        ),
    )


def quality_section(parts: PageParts) -> Element | None:
    """None: quality was not measured."""
    quality, words, text = parts.analysis.quality, parts.words, parts.analysis.text
    if quality is None or text is None:
        return None
    rows = [
        [words["bits_per_byte"], f"{quality.bits_per_byte:.4f}"],
        [words["perplexity"], number(quality.perplexity)],
        [words["text"], words["the_given_text"] if text.name is None else text.name],
        [words["bytes"], f"{quality.num_bytes:,}"],
        [words["num_tokens"], f"{quality.num_tokens:,}"],
    ]
    warning: list[Content] = []
    if quality.num_unknown:
        warning.append(parts.paragraph("unknown_text", count=f"{quality.num_unknown:,}"))
    return parts.section(
        "quality",
        parts.paragraph("quality_text", context=f"{quality.context:,}"),
        warning,
        table([words["quality"], words["value"]], rows, caption=words["quality"]),
    )


def speed_section(parts: PageParts) -> Element | None:
    """None: speed was not measured."""
    analysis, words = parts.analysis, parts.words
    if not analysis.speeds:
        return None
    head = [
        words[name] for name in ("length", "batch_column", "prompt_time", "prompt_rate", "step_time", "decoding_rate")
    ]
    rows = [_speed_row(speed, words) for speed in analysis.speeds]
    return parts.section(
        "speed",
        parts.paragraph(
            "speed_text", device=analysis.device, dtype=analysis.dtype, rounds=ROUNDS, steps=DECODED_TOKENS
        ),
        parts.picture("speed", words["alt_speed"]),
        table(head, rows, caption=words["speed"]),
    )


def _speed_row(speed: Speed, words: Mapping[str, str]) -> list[str]:
    cells = [f"{speed.length:,}", str(speed.batch)]
    if speed.prompt_s is None or speed.step_s is None:
        return [*cells, words["out_of_memory"], "—", "—", "—"]
    return [
        *cells,
        number(speed.prompt_s * 1000),
        number(speed.prompt_tokens_per_s),
        number(speed.step_s * 1000),
        number(speed.decoded_tokens_per_s),
    ]


def adapters_section(parts: PageParts) -> Element | None:
    """None: no adapter was given."""
    if not parts.analysis.adapters:
        return None
    return parts.section(
        "adapters",
        parts.paragraph("adapter_text", share=share(RANK_SHARE), tokens=EFFECT_TOKENS),
        [_adapter(parts, place, adapter) for place, adapter in enumerate(parts.analysis.adapters)],
    )


def _adapter(parts: PageParts, place: int, adapter: AdapterFigures) -> list[Element]:
    words = parts.words
    head = [words[name] for name in ("tensor", "rank", "rank_used", "effective_rank", "norm", "relative")]
    modules = [
        [
            change.name,
            "—" if change.rank is None else str(change.rank),
            "—" if change.rank_used is None else str(change.rank_used),
            number(change.effective_rank),
            number(change.norm),
            "—" if change.relative is None else share(change.relative),
        ]
        for change in adapter.modules
    ]
    effects = [[_where(effect, words), number(effect.kl), number(effect.rms)] for effect in adapter.effects]
    effect_table = table([words["active"], words["kl"], words["logit_rms"]], effects, caption=words["effect_title"])
    return [
        element("h3", adapter.name),
        parts.paragraph("adapter_parameters", count=f"{adapter.num_parameters:,}", modules=f"{len(adapter.modules):,}"),
        parts.picture(f"adapter-{place}", words["alt_adapter"]),
        *([effect_table] if effects else []),
        details(words["each_module"], table(head, modules, caption=f"{adapter.name}: {words['each_module']}")),
    ]


def _where(effect: Effect, words: Mapping[str, str]) -> str:
    if effect.is_whole:
        return words["whole_adapter"]
    return words["outside_layers"] if effect.layer is None else words["of_layer"].format(layer=effect.layer)
