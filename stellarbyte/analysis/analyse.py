"""All figures of one model: first its files, tensor by tensor, then the loaded model."""

import dataclasses
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from stellarbyte.analysis.adapters import AdapterFigures, analyse_adapter
from stellarbyte.analysis.attention import MAX_TOKENS, HeadFigures, attention_weights, head_figures
from stellarbyte.analysis.errors import AnalysisError
from stellarbyte.analysis.parameters import Count, count_groups, count_parts, parameters_of
from stellarbyte.analysis.quality import Quality, measure_quality
from stellarbyte.analysis.radar import Axis, radar_axes
from stellarbyte.analysis.spectrum import Spectrum, evenly_spaced, spectra
from stellarbyte.analysis.speed import GRIDS, Speed, measure_speed
from stellarbyte.analysis.structure import LayerKind, layer_kinds
from stellarbyte.analysis.text import Text, TokenizedText, load_tokenizer, tokenize
from stellarbyte.analysis.weights import WeightStatistics, open_weights, weight_statistics
from stellarbyte.checkpoint.info import ModelInfo, describe
from stellarbyte.checkpoint.native import Checkpoint, load_model, open_checkpoint
from stellarbyte.checkpoint.progress import Progress
from stellarbyte.config import ByteModelConfig
from stellarbyte.model.transformer import ByteTransformer

SHOWN_LAYERS, SHOWN_HEADS = 4, 8
SERVING_DTYPES = {"cpu": torch.float32, "cuda": torch.bfloat16}  # by type of device

Tell = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is wanted.

    Attributes:
        name: the model's, as the page shows it.
        text_is_given: not the sample; a model without a tokenizer is then an error.
        device: "cpu" or "cuda".
    """

    name: str
    checkpoint: Path
    text: Text
    text_is_given: bool
    adapters: tuple[Path, ...]
    measures_speed: bool
    device: str


@dataclass(frozen=True, kw_only=True)
class AttentionFigures:
    """Attributes: labels: of the T tokens. num_tokens: of the whole text. layers, heads: whose weights are kept, as
    weights_LHTS. means_LTS: over all heads of each of those layers. figures: of every head of every layer."""

    labels: tuple[str, ...]
    num_tokens: int
    layers: tuple[int, ...]
    heads: tuple[int, ...]
    weights_LHTS: torch.Tensor
    means_LTS: torch.Tensor
    figures: tuple[HeadFigures, ...]


@dataclass(frozen=True, kw_only=True)
class Analysis:
    """Everything that the report shows. None, or (): not measured, because there is no tokenizer, or not wanted."""

    name: str
    config: ByteModelConfig
    info: ModelInfo
    groups: tuple[Count, ...]
    parts: tuple[Count, ...]
    kinds: tuple[LayerKind, ...]
    weights: tuple[WeightStatistics, ...]
    spectra: tuple[Spectrum, ...]
    text: Text | None
    attention: AttentionFigures | None
    quality: Quality | None
    speeds: tuple[Speed, ...]
    axes: tuple[Axis, ...]
    adapters: tuple[AdapterFigures, ...]
    device: str
    dtype: str
    versions: dict[str, str]


def analyse(request: Request, *, progress: Progress, tell: Tell) -> Analysis:
    """Measure everything.

    Args:
        progress: gets the bytes of weights read, and all.
        tell: gets the name of each step that begins.

    Raises:
        CheckpointError, AnalysisError: the model, the text or an adapter cannot be analysed.
    """
    checkpoint = open_checkpoint(request.checkpoint)
    config = checkpoint.config
    tokenized = _tokenized(request, config)
    parameters = parameters_of(config)
    weights, of_matrices = _read_weights(checkpoint, progress)
    tell("loading the model")
    model = load_model(request.checkpoint, dtype=SERVING_DTYPES[request.device], device=request.device)
    attention = quality = None
    if tokenized is not None:
        tell("attention and quality")
        attention = observe_attention(model, tokenized)
        quality = measure_quality(model, tokenized)
    adapters = []
    for folder in request.adapters:
        tell(f"adapter {folder}")
        adapters.append(analyse_adapter(model, folder, () if tokenized is None else tokenized.ids))
    speeds: list[Speed] = []
    if request.measures_speed:
        tell("speed")
        speeds = list(measure_speed(model, *GRIDS[request.device]))
    info = describe(checkpoint)
    return Analysis(
        name=request.name,
        config=config,
        info=info,
        groups=tuple(count_groups(parameters)),
        parts=tuple(count_parts(parameters)),
        kinds=tuple(layer_kinds(config)),
        weights=weights,
        spectra=of_matrices,
        text=None if tokenized is None else request.text,
        attention=attention,
        quality=quality,
        speeds=tuple(speeds),
        axes=tuple(_axes(info, model, quality, speeds)),
        adapters=tuple(adapters),
        device=request.device,
        dtype=str(model.dtype).removeprefix("torch."),
        versions={name: version(name) for name in ("stellarbyte", "torch", "transformers")},
    )


def _tokenized(request: Request, config: ByteModelConfig) -> TokenizedText | None:
    tokenizer = load_tokenizer(request.checkpoint)
    if tokenizer is not None:
        return tokenize(request.text, tokenizer, config)
    if request.text_is_given:
        raise AnalysisError(f"{request.checkpoint / 'tokenizer.json'} is missing; --text needs a tokenizer.")
    return None


def _read_weights(
    checkpoint: Checkpoint, progress: Progress
) -> tuple[tuple[WeightStatistics, ...], tuple[Spectrum, ...]]:
    """Of one tensor after the other, so that no two are needed at once."""
    statistics: list[WeightStatistics] = []
    found: list[Spectrum] = []
    total, done = sum(info.num_bytes for info in checkpoint.tensors.values()), 0
    with open_weights(checkpoint) as read:
        for parameter in parameters_of(checkpoint.config):
            tensor = read(parameter.name)
            statistics.append(weight_statistics(parameter, tensor))
            found.extend(spectra(parameter, tensor))
            done += checkpoint.tensors[parameter.name].num_bytes
            progress(done, total)
    return tuple(statistics), tuple(found)


def observe_attention(model: ByteTransformer, tokenized: TokenizedText) -> AttentionFigures:
    """On the first MAX_TOKENS tokens of the text."""
    ids = tokenized.ids[: min(MAX_TOKENS, model.config.max_position_embeddings)]
    weights_LHTS = attention_weights(model, ids)
    layers = evenly_spaced(weights_LHTS.shape[0], SHOWN_LAYERS)
    heads = evenly_spaced(weights_LHTS.shape[1], SHOWN_HEADS)
    return AttentionFigures(
        labels=tokenized.labels[: len(ids)],
        num_tokens=len(tokenized.ids),
        layers=tuple(layers),
        heads=tuple(heads),
        weights_LHTS=weights_LHTS[layers][:, heads],
        means_LTS=weights_LHTS[layers].mean(dim=1),
        figures=tuple(head_figures(weights_LHTS, max(1, model.config.sink_tokens))),
    )


def _axes(info: ModelInfo, model: ByteTransformer, quality: Quality | None, speeds: list[Speed]) -> list[Axis]:
    """Memory is that of the measured dtype; speed that of one sequence after the shortest prompt."""
    dtype = str(model.dtype).removeprefix("torch.")
    return radar_axes(
        {
            "size": float(info.num_parameters),
            "speed": next((speed.decoded_tokens_per_s for speed in speeds if speed.batch == 1), None),
            "memory": float(info.weight_bytes[dtype] + info.kv_bytes_full_sequence[dtype]),
            "quality": None if quality is None else quality.bits_per_byte,
        }
    )


def write_json(analysis: Analysis, file: Path) -> None:
    """Every number of the report. Numbers of attention maps are rounded to 6 decimals; NaN and infinity become null.

    Raises:
        OSError: the file cannot be written.
    """
    content = {
        field.name: _plain(getattr(analysis, field.name))
        for field in dataclasses.fields(analysis)
        if field.name != "config"
    }
    content["config"] = analysis.config.to_dict()
    file.write_text(json.dumps(content, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def _plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return [_plain(row) for row in value] if value.dim() else round(float(value), 6)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
        if isinstance(value, Speed):
            fields |= {name: getattr(value, name) for name in ("prompt_tokens_per_s", "decoded_tokens_per_s")}
        return fields
    if isinstance(value, dict):
        return {name: _plain(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
