"""A checkpoint's architecture and memory use, from its config and headers, and how it was trained; reads no weights."""

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from stellarbyte.checkpoint.errors import CheckpointError
from stellarbyte.checkpoint.native import Checkpoint, stored_dtype
from stellarbyte.checkpoint.quantized.origin import read_origin
from stellarbyte.checkpoint.safetensors_file import read_json
from stellarbyte.checkpoint.shapes import expected_shapes, matrix_names
from stellarbyte.config import ByteModelConfig
from stellarbyte.model.parts import module_path

RECORD_FILE = "training.json"  # beside the weights of a model that was trained here
BYTES_PER_ELEMENT = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """Figures of one checkpoint; sizes in bytes, lengths in tokens, dictionaries by serving dtype."""

    num_parameters: int
    num_active_parameters: int  # that one token uses at most
    stored_dtype: str
    disk_bytes: int
    weight_bytes: Mapping[str, int]
    gpu_weight_bytes: Mapping[str, int]  # by --quantization on a GPU, beside bfloat16; what is refused is absent
    kv_bytes_per_token: Mapping[str, int]
    context_length: int
    tokens_kept: int  # in the cache, of a full sequence
    kv_bytes_full_sequence: Mapping[str, int]
    is_constant_memory: bool  # whether a sequence stops growing once its window is full


def describe(checkpoint: Checkpoint) -> ModelInfo:
    """The figures of an opened checkpoint.

    A cache block holds the keys of every layer and is freed when no layer can see it: a window bounds the memory of a
    sequence only if every layer has one.
    """
    config = checkpoint.config
    kv_elements = 2 * config.num_hidden_layers * (config.num_key_value_heads or 0) * (config.head_dim or 0)
    is_constant = all(window is not None for window in config.windows)
    kept = kept_tokens(config)
    return ModelInfo(
        num_parameters=checkpoint.num_parameters,
        num_active_parameters=checkpoint.num_parameters - _num_idle_parameters(config),
        stored_dtype=str(stored_dtype(checkpoint)).removeprefix("torch."),
        disk_bytes=checkpoint.num_bytes,
        weight_bytes={dtype: checkpoint.num_parameters * size for dtype, size in BYTES_PER_ELEMENT.items()},
        gpu_weight_bytes=_gpu_weight_bytes(config),
        kv_bytes_per_token={dtype: kv_elements * size for dtype, size in BYTES_PER_ELEMENT.items()},
        context_length=config.max_position_embeddings,
        tokens_kept=kept,
        kv_bytes_full_sequence={dtype: kept * kv_elements * size for dtype, size in BYTES_PER_ELEMENT.items()},
        is_constant_memory=is_constant,
    )


def kept_tokens(config: ByteModelConfig) -> int:
    """Tokens of a sequence of full length that stay in the cache."""
    if any(window is None for window in config.windows) or config.sliding_window is None:
        return config.max_position_embeddings
    return min(config.max_position_embeddings, config.sliding_window + config.sink_tokens)


def describe_lines(checkpoint: Checkpoint) -> list[tuple[str, str]]:
    """`describe` and the architecture as (label, text) for people."""
    config, info, record = checkpoint.config, describe(checkpoint), read_record(checkpoint.path)
    return [
        ("path", str(checkpoint.path)),
        ("layers", _layers(config)),
        *([("experts", _experts(config))] if config.num_experts else []),
        ("hidden", str(config.hidden_size)),
        ("heads", f"{config.num_attention_heads} query, {config.num_key_value_heads} key/value, of {config.head_dim}"),
        ("vocabulary", f"{config.vocab_size}, {'tied' if config.tie_word_embeddings else 'separate'} output head"),
        ("position", _position(config)),
        ("window", _windows(config)),
        ("norms", _norms(config)),
        ("factors", _factors(config)),
        ("biases", _biases(config)),
        ("residual", _residual(config)),
        ("parameters", _parameters(info)),
        ("on disk", f"{size(info.disk_bytes)} ({_stored(checkpoint, info)})"),
        *_quantization_lines(checkpoint),
        ("weights", _by_dtype(info.weight_bytes)),
        ("on a GPU", f"{_by_dtype(info.gpu_weight_bytes)}, by --quantization"),
        ("KV per token", _by_dtype(info.kv_bytes_per_token)),
        ("KV when full", f"{_by_dtype(info.kv_bytes_full_sequence)} for {info.tokens_kept:,} tokens"),
        ("memory", _growth(config, info)),
        *([] if record is None else record_lines(record)),
    ]


def _gpu_weight_bytes(config: ByteModelConfig) -> dict[str, int]:
    """8 bits: with a float32 scale for each output; int4: with a word of 32 bits for 32 inputs, in slabs of 64, and a
    head in 8 bits. A tied head is a matrix of its own."""
    shapes, matrices = expected_shapes(config), matrix_names(config)
    if config.tie_word_embeddings:
        shapes["lm_head.weight"] = shapes["model.embed_tokens.weight"]
    in_8_bits = in_4_bits = 0
    for name, shape in shapes.items():
        count, num_inputs = math.prod(shape), shape[-1]
        if name not in matrices and name != "lm_head.weight":
            in_8_bits += 2 * count
            in_4_bits += 2 * count
            continue
        of_8_bits = count + 4 * count // num_inputs
        in_8_bits += of_8_bits
        of_4_bits = count // num_inputs * (32 * math.ceil(num_inputs / 64) + 4 * num_inputs // 32)
        in_4_bits += of_8_bits if name == "lm_head.weight" else of_4_bits
    found = {"int8": in_8_bits, "fp8": in_8_bits}
    takes_int4 = not config.num_experts and all(shapes[name][-1] % 32 == 0 for name in matrices)
    return found | ({"int4": in_4_bits} if takes_int4 else {})


def _num_idle_parameters(config: ByteModelConfig) -> int:
    """Parameters of the experts that a token does not choose; those of a pool count as used in each of its layers."""
    if not config.num_experts:
        return 0
    shapes = expected_shapes(config)
    idle = 0
    for layer, holder in enumerate(config.expert_layers):
        if holder is not None:
            prefix = module_path(holder, "mlp.experts.")
            of_one = sum(math.prod(shape[1:]) for name, shape in shapes.items() if name.startswith(prefix))
            idle -= config.num_experts_per_tok * of_one
            idle += config.num_experts * of_one if holder == layer else 0
    return idle


def _parameters(info: ModelInfo) -> str:
    if info.num_active_parameters == info.num_parameters:
        return f"{info.num_parameters:,}"
    return f"{info.num_parameters:,}, of which a token uses {info.num_active_parameters:,}"


def _stored(checkpoint: Checkpoint, info: ModelInfo) -> str:
    forms = Counter((matrix.kind, matrix.group_size) for matrix in checkpoint.quantized.values())
    kept = [f"{count} matrices in {kind}, groups of {group}" for (kind, group), count in forms.most_common()]
    return "; ".join([*kept, f"{'others in ' if kept else ''}{info.stored_dtype}"])


def _quantization_lines(checkpoint: Checkpoint) -> list[tuple[str, str]]:
    origin = read_origin(checkpoint.path)
    if origin is None:
        return []
    form = "as quantized" if checkpoint.quantized else "dequantized"
    return [("converted", "; ".join([f"from {origin.format}, {form}", *origin.notes]))]


def _layers(config: ByteModelConfig) -> str:
    num_dense = config.expert_layers.count(None)
    mlp = f"MLP {config.intermediate_size}, {config.hidden_act}"
    if num_dense == config.num_hidden_layers:
        return f"{num_dense} × (attention + {mlp})"
    parts = [f"{config.num_hidden_layers - num_dense} × (attention + experts, {config.hidden_act})"]
    if num_dense:
        parts.insert(0, f"{num_dense} × (attention + {mlp})")
    return " and ".join(parts)


def _experts(config: ByteModelConfig) -> str:
    chosen = f"{config.num_experts_per_tok} per token"
    if config.router_top_p is not None:
        least, most = config.min_experts_per_tok, config.num_experts_per_tok
        chosen = f"{least} to {most} per token, up to {config.router_top_p:g} of the scores"
    score = f"{config.router_score} scores{', renormalised' if config.norm_topk_prob else ''}"
    text = [f"{config.num_experts} of {config.moe_intermediate_size}, {chosen}, {score}"]
    if config.swiglu_limit is not None:
        text.append(f"SwiGLU clamped at {config.swiglu_limit:g}, α {config.swiglu_alpha:g}")
    if config.shared_expert_intermediate_size:
        gated = " with a gate" if config.shared_expert_gate else ""
        text.append(f"a shared one of {config.shared_expert_intermediate_size}{gated}")
    if config.moe_layers is not None:
        text.append(f"in layers {', '.join(map(str, config.moe_layers))}")
    if config.expert_pools is not None:
        text.append(f"{len(set(config.expert_pools))} pools")
    return "; ".join(text)


def size(num_bytes: int) -> str:
    """Bytes for people, in powers of 1024."""
    value, unit = float(num_bytes), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"


def _by_dtype(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{size(num_bytes)} in {dtype}" for dtype, num_bytes in sizes.items())


def _position(config: ByteModelConfig) -> str:
    assert config.rope_parameters is not None  # the config fills it in
    rope = _rope(config.rope_parameters)
    if set(config.rotations) != {"global"}:
        named = {"global": rope, "none": "none"}
        if config.local_rope_parameters is not None:
            named["local"] = _rope(config.local_rope_parameters)
        rope = "; ".join(f"{named[kind]} in {span}" for kind, span in _runs(config.rotations))
    method = f"XPos (base {config.xpos_scale_base}, γ {config.xpos_gamma})" if config.use_xpos else "RoPE"
    learned = ", learned decay" if config.xpos_learnable_scale else ""
    return f"{method}{learned}, {rope}, context {config.max_position_embeddings:,}"


def _rope(rope: Mapping[str, Any]) -> str:
    """One rotation; longrope's factors, a list for each pair, are left out."""
    scaling = {name: value for name, value in rope.items() if not isinstance(value, list)}
    kind, theta = scaling.pop("rope_type"), scaling.pop("rope_theta")
    part = scaling.pop("partial_rotary_factor", None) or 1
    text = f"θ {theta:g}" + ("" if part == 1 else f" on {part:.0%} of each head")
    return text if kind == "default" else f"{text}, {kind} " + ", ".join(f"{name} {scaling[name]}" for name in scaling)


def _runs(kinds: Sequence[Any]) -> Iterator[tuple[Any, str]]:
    """Runs of layers of one kind, such as 2–5."""
    for kind, layers in groupby(range(len(kinds)), key=lambda layer: kinds[layer]):
        numbers = list(layers)
        yield kind, str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]}–{numbers[-1]}"


def _windows(config: ByteModelConfig) -> str:
    counts = Counter(config.windows)
    if set(counts) == {None}:
        return "none: every layer sees the whole sequence"
    sinks = f", {config.sink_tokens} sink tokens" if config.sink_tokens else ""
    if None not in counts:
        return f"{config.sliding_window:,} tokens in every layer{sinks}"
    runs = [f"{'full' if window is None else f'{window:,}'} in {span}" for window, span in _runs(config.windows)]
    return f"by layer: {'; '.join(runs)}{sinks}"


def _norms(config: ByteModelConfig) -> str:
    where = {"before": "before", "after": "after", "both": "before and after"}[config.branch_norms] + " each branch"
    where = "after the sum (DeepNorm)" if config.deepnorm else where
    of_heads = "" if config.qk_norm_per_head else " over all heads"
    queries = f", of queries and keys{of_heads}" if config.qk_norm else ""
    return f"RMSNorm {where}, ε {config.rms_norm_eps:g}{queries}{', 1 + weight' if config.zero_centered_norms else ''}"


def _factors(config: ByteModelConfig) -> str:
    """What embeddings, scores, branches and logits are multiplied with, their soft caps, and sinks of the softmax."""
    told = []
    if config.attention_multiplier is not None:
        told.append(f"scores × {config.attention_multiplier:.6g}")
    others = {
        "embeddings": config.embedding_multiplier,
        "branches": config.residual_multiplier,
        "logits": config.logits_multiplier,
    }
    told += [f"{name} × {factor:.6g}" for name, factor in others.items() if factor != 1]
    caps = {"scores": config.attention_softcap, "logits": config.logits_softcap}
    told += [f"{name} capped at {cap:g}" for name, cap in caps.items() if cap is not None]
    if config.softmax_sink:
        told.append("a sink in the softmax of each head")
    return ", ".join(told) or "none"


def _biases(config: ByteModelConfig) -> str:
    options = {"q, k, v": config.attention_bias, "o": config.attention_output_bias, "MLP": config.mlp_bias}
    options |= {"experts": config.expert_bias, "router": config.router_bias}
    return ", ".join(name for name, is_on in options.items() if is_on) or "none"


def _residual(config: ByteModelConfig) -> str:
    options = {
        "LayerScale": config.layer_scale_init is not None,
        "DropPath in training": config.drop_path_rate > 0,
        "DeepNorm": config.deepnorm,
    }
    order = "parallel" if config.parallel_residual else "sequential"
    return ", ".join([order, *(name for name, is_on in options.items() if is_on)])


def _growth(config: ByteModelConfig, info: ModelInfo) -> str:
    if info.is_constant_memory:
        return f"constant: a sequence keeps at most {info.tokens_kept:,} tokens, however long it gets"
    if any(window is not None for window in config.windows):
        return "grows with the sequence: some layers have a window, but those without one keep every token"
    return "grows with the sequence"


@dataclass(frozen=True, kw_only=True)
class TrainingRecord:
    """Attributes: data_sha256: fingerprint of the data; tokens: read in all steps; base: the model that was trained
    further, or None; base_sha256: of its weights, None in older records, too; loss: of the last step; tokens_per_s:
    since the run was last started, evaluations included, or None; held_out: metrics of the last evaluation; versions:
    of the programs."""

    kind: str  # pretrain, sft or lora
    base: str | None
    data_sha256: str
    licenses: tuple[str, ...]
    tokens: int
    steps: int
    epochs: float
    loss: float
    tokens_per_s: float | None
    held_out: dict[str, float]
    settings: dict[str, Any]
    versions: dict[str, str]
    base_sha256: str | None = None

    def write(self, folder: Path) -> None:
        """Raises OSError."""
        text = json.dumps(dataclasses.asdict(self), indent=1, ensure_ascii=False)
        (folder / RECORD_FILE).write_text(text + "\n", encoding="utf-8")


def read_record(folder: Path) -> TrainingRecord | None:
    """The record in a checkpoint's folder; None: it was not trained here.

    Raises:
        CheckpointError: it is not one.
    """
    if not (folder / RECORD_FILE).is_file():
        return None
    content = read_json(folder / RECORD_FILE)
    names = {field.name for field in dataclasses.fields(TrainingRecord)}
    if not names - {"base_sha256"} <= content.keys() <= names or not isinstance(content["licenses"], list):
        raise CheckpointError(f"{folder / RECORD_FILE} was not written by stellarbyte train.")
    return TrainingRecord(**content | {"licenses": tuple(content["licenses"])})


def record_lines(record: TrainingRecord) -> list[tuple[str, str]]:
    """The record as (label, text) for people."""
    trained = f"{record.kind}, {record.steps:,} steps, {record.tokens:,} tokens, {record.epochs:.3g} epochs"
    if record.tokens_per_s is not None:
        trained += f", {record.tokens_per_s:,.0f} tokens/s"
    losses = f"{record.loss:.4f} in training"
    if "eval_loss" in record.held_out:
        losses += f", {record.held_out['eval_loss']:.4f} held out"
    seed = record.settings.get("run", {}).get("seed")
    return [
        ("trained", trained if record.base is None else f"{trained}, from {record.base}"),
        *([] if record.base_sha256 is None else [("base", f"sha {record.base_sha256[:12]}")]),
        *([] if seed is None else [("seed", str(seed))]),
        ("loss", losses),
        ("data", f"sha {record.data_sha256[:12]}, licences: {', '.join(record.licenses) or 'unknown'}"),
        ("made with", ", ".join(f"{name} {version}" for name, version in record.versions.items())),
    ]
