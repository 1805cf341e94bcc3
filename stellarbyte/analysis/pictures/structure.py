"""The picture of a model's structure: embedding, layers by kind, norm and head."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle

from stellarbyte.analysis.analyse import Analysis
from stellarbyte.analysis.pictures.style import Pen
from stellarbyte.analysis.structure import LayerKind, layer_runs
from stellarbyte.config import ByteModelConfig

_WIDTH, _COLUMNS = 10.0, 3
_BOX, _GAP, _KIND, _STRIP = 0.62, 0.3, 2.75, 0.72  # heights in inches
_NAMED_RUNS = 8


def draw_structure(analysis: Analysis, pen: Pen) -> Figure:
    """From the tokens at the top to the logits at the bottom."""
    config, words, kinds = analysis.config, pen.words, analysis.kinds
    rows = [kinds[i : i + _COLUMNS] for i in range(0, len(kinds), _COLUMNS)]
    height = 3 * (_BOX + _GAP) + _STRIP + len(rows) * (_KIND + 0.15) + _GAP + 0.2
    figure = Figure(figsize=(_WIDTH, height))
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    axes.set_xlim(0, _WIDTH)
    axes.set_ylim(height, 0)
    axes.axis("off")
    top = 0.1
    embedding = words["embedding_box"].format(vocabulary=f"{config.vocab_size:,}", hidden=f"{config.hidden_size:,}")
    _box(axes, pen, 1.5, top, _WIDTH - 3, _BOX, [words["group_embedding"], embedding], pen.theme.soft)
    top = _arrow(axes, pen, top + _BOX)
    top = _strip(axes, pen, kinds, config.num_hidden_layers, top)
    for row, of_row in enumerate(rows):
        width = (_WIDTH - 0.4) / len(of_row)
        for column, kind in enumerate(of_row):
            colour = pen.theme.cycle[(row * _COLUMNS + column) % len(pen.theme.cycle)]
            _kind(axes, pen, config, kind, 0.2 + column * width, top, width - 0.12, colour)
        top += _KIND + 0.15
    top = _arrow(axes, pen, top)
    _box(axes, pen, 3, top, _WIDTH - 6, _BOX, ["RMSNorm", words["norm_box"]], pen.theme.soft)
    top = _arrow(axes, pen, top + _BOX)
    head = words["tied_head" if config.tie_word_embeddings else "own_head"].format(vocabulary=f"{config.vocab_size:,}")
    _box(axes, pen, 1.5, top, _WIDTH - 3, _BOX, [words["group_head"], head], pen.theme.soft)
    return figure


def _kind(
    axes: Axes, pen: Pen, config: ByteModelConfig, kind: LayerKind, left: float, top: float, width: float, colour: str
) -> None:
    """A frame with a box for attention and one for the MLP or the experts."""
    words = pen.words
    frame = FancyBboxPatch(
        (left, top), width, _KIND, boxstyle="round,pad=0,rounding_size=0.08", fill=False, edgecolor=colour, linewidth=2
    )
    axes.add_patch(frame)
    title = words["kind_title"].format(count=len(kind.layers), layers=_named(kind.layers))
    axes.text(left + width / 2, top + 0.2, title, ha="center", va="center", color=colour, fontsize=10)
    window = words["no_window"] if kind.window is None else words["window_of"].format(window=f"{kind.window:,}")
    if kind.window is not None and config.sink_tokens:
        window += words["with_sinks"].format(sinks=config.sink_tokens)
    rotation = words[f"rotation_{kind.rotation}"].format(method="XPos" if config.use_xpos else "RoPE")
    heads = words["heads_box"].format(
        heads=config.num_attention_heads, kv_heads=config.num_key_value_heads, size=config.head_dim
    )
    sink = [words["softmax_sink"]] if config.softmax_sink else []
    inner = left + 0.12, width - 0.24
    _box(axes, pen, inner[0], top + 0.4, inner[1], 1.2, [words["group_attention"], heads, window, rotation, *sink], "")
    _box(axes, pen, inner[0], top + 1.7, inner[1], 0.93, _mlp_lines(pen, config, kind), "")


def _mlp_lines(pen: Pen, config: ByteModelConfig, kind: LayerKind) -> list[str]:
    words = pen.words
    if not kind.has_experts:
        inner = words["mlp_box"].format(size=f"{config.intermediate_size:,}", activation=config.hidden_act)
        return [words["group_mlp"], inner]
    chosen = str(config.num_experts_per_tok)
    if config.router_top_p is not None:
        chosen = f"{config.min_experts_per_tok}–{config.num_experts_per_tok}"
    lines = [
        words["group_experts"],
        words["experts_box"].format(count=config.num_experts, size=f"{config.moe_intermediate_size:,}", chosen=chosen),
    ]
    if config.shared_expert_intermediate_size:
        lines.append(words["shared_box"].format(size=f"{config.shared_expert_intermediate_size:,}"))
    if kind.num_pools < len(kind.layers):
        lines.append(words["pools_box"].format(count=kind.num_pools))
    return lines


def _strip(axes: Axes, pen: Pen, kinds: Sequence[LayerKind], num_layers: int, top: float) -> float:
    """A cell for each layer in its kind's colour; returns where the next thing begins."""
    colour_of = {
        layer: pen.theme.cycle[i % len(pen.theme.cycle)] for i, kind in enumerate(kinds) for layer in kind.layers
    }
    width = (_WIDTH - 0.4) / num_layers
    for layer in range(num_layers):
        cell = Rectangle(
            (0.2 + layer * width, top), width, 0.3, facecolor=colour_of[layer], edgecolor=pen.theme.ground, linewidth=1
        )
        axes.add_patch(cell)
        if layer % max(1, -(-num_layers // 32)) == 0:
            centre = 0.2 + (layer + 0.5) * width
            axes.text(centre, top + 0.42, str(layer), ha="center", va="center", fontsize=7, color=pen.theme.muted)
    return top + _STRIP


def _box(
    axes: Axes, pen: Pen, left: float, top: float, width: float, height: float, lines: Sequence[str], fill: str
) -> None:
    """The first line is the title. `fill` "": the ground."""
    axes.add_patch(
        FancyBboxPatch(
            (left, top),
            width,
            height,
            boxstyle="round,pad=0,rounding_size=0.06",
            facecolor=fill or pen.theme.ground,
            edgecolor=pen.theme.muted,
            linewidth=1,
        )
    )
    step = height / (len(lines) + 0.4)
    for place, line in enumerate(lines):
        first = place == 0
        axes.text(
            left + width / 2,
            top + step * (place + 0.7),
            line,
            ha="center",
            va="center",
            fontsize=9.5 if first else 8.5,
            color=pen.theme.text if first else pen.theme.muted,
        )


def _arrow(axes: Axes, pen: Pen, top: float) -> float:
    """Down to where the next box begins, which it returns."""
    style = {"arrowstyle": "-|>", "color": pen.theme.muted, "linewidth": 1.2}
    axes.annotate("", xy=(_WIDTH / 2, top + _GAP), xytext=(_WIDTH / 2, top), arrowprops=style)
    return top + _GAP


def _named(layers: Sequence[int]) -> str:
    """Their runs, the middle left out if there are many."""
    names = layer_runs(layers)
    return ", ".join([*names[:3], "…", names[-1]] if len(names) > _NAMED_RUNS else names)
