"""XPos and RoPE rotations by relative offset (numerics: "XPos").

Both position encodings depend on distances only, so queries and keys are rotated by their offset from a nearby
base position instead of by absolute position: the XPos factors stay near 1 and every float format is exact enough
at any position.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from stellarbyte.config import ByteModelConfig

# Tables are always made on the CPU, also while a model is being built on the meta device.
CPU_FLOAT64: dict[str, Any] = {"dtype": torch.float64, "device": "cpu"}


def inverse_frequencies(rope: dict[str, Any], head_dim: int, length: int) -> torch.Tensor:
    """θ_j for j = 0..head_dim/2-1, float64; 0 for the last pairs where only a part of each head is rotated.

    Args:
        rope: a validated `rope_parameters`.
        length: tokens of the longest sequence that will be rotated; only longrope depends on it.
    """
    rotated = rotated_channels(rope, head_dim)
    exponents = torch.arange(0, rotated, 2, **CPU_FLOAT64) / rotated
    frequencies = rope["rope_theta"] ** -exponents
    match rope["rope_type"]:
        case "default":
            pass
        case "linear":
            frequencies = frequencies / rope["factor"]
        case "llama3":
            frequencies = _llama3(frequencies, rope)
        case "yarn":
            frequencies = _yarn(frequencies, rope, rotated)
        case "longrope":
            factors = rope["long_factor" if is_long(rope, length) else "short_factor"]
            frequencies = frequencies / torch.tensor(factors, **CPU_FLOAT64)
        case other:
            raise ValueError(f"rope_parameters: unknown rope_type {other!r}")
    return F.pad(frequencies, (0, (head_dim - rotated) // 2))


def rotated_channels(rope: dict[str, Any], head_dim: int) -> int:
    """Channels of a head that are rotated: `partial_rotary_factor` of all."""
    factor = rope.get("partial_rotary_factor")
    return head_dim if factor is None else int(head_dim * factor)


def is_long(rope: dict[str, Any], length: int) -> bool:
    """Whether sequences of up to `length` tokens take longrope's long factors (Ding et al. 2024)."""
    return rope["rope_type"] == "longrope" and length > rope["original_max_position_embeddings"]


def _llama3(frequencies: torch.Tensor, rope: dict[str, Any]) -> torch.Tensor:
    """Llama 3.1's scaling: low frequencies are divided by `factor`, high ones kept, with a smooth step between."""
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    turns = rope["original_max_position_embeddings"] * frequencies / (2 * math.pi)  # in the original context
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * (kept + (1 - kept) / rope["factor"])


def _yarn(frequencies: torch.Tensor, rope: dict[str, Any], rotated: int) -> torch.Tensor:
    """YaRN (Peng et al. 2023), "NTK by parts": pairs with many turns in the original context are kept."""
    original, theta = rope["original_max_position_embeddings"], rope["rope_theta"]

    def pair_with_turns(turns: float) -> float:
        return rotated * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first, last = pair_with_turns(rope.get("beta_fast") or 32), pair_with_turns(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, rotated - 1)
    width = max(last - first, 0.001)
    slowed = ((torch.arange(rotated // 2, **CPU_FLOAT64) - first) / width).clamp(0, 1)
    return frequencies * (1 - slowed + slowed / rope["factor"])


def attention_factor(rope: dict[str, Any]) -> float:
    """YaRN's and longrope's factor for queries and for keys; 1 for the other types."""
    if rope["rope_type"] not in ("yarn", "longrope"):
        return 1.0
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    if rope["rope_type"] == "longrope":
        original = rope["original_max_position_embeddings"]
        return 1.0 if rope["factor"] <= 1 else math.sqrt(1 + math.log(rope["factor"]) / math.log(original))

    def mscale(weight: float) -> float:
        return 1.0 if rope["factor"] <= 1 else 0.1 * weight * math.log(rope["factor"]) + 1.0

    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return mscale(rope["mscale"]) / mscale(rope["mscale_all_dim"])
    return mscale(1.0)


class RotaryCache:
    """cos and sin of distance · θ_j for distances 0..length-1, computed in float64, kept in float32 per device.

    One is shared by all layers with this rotation. It grows by doubling when a longer distance is reserved.
    """

    def __init__(self, frequencies: torch.Tensor) -> None:
        self.frequencies = frequencies
        self._tables: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = {}

    def tables(self, length: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin, each [at least `length`, D/2] float32 on `device`."""
        found = self._tables.get(device)
        if found is None or len(found[0]) < length:
            rows = max(1024, 1 << (length - 1).bit_length())
            angles = torch.outer(torch.arange(rows, **CPU_FLOAT64), self.frequencies)
            found = angles.cos().float().to(device), angles.sin().float().to(device)
            self._tables[device] = found
        return found


class XPosRotaryEmbedding(nn.Module):
    """The rotations of a model's layers, which may differ, and their common XPos decay."""

    def __init__(self, config: ByteModelConfig) -> None:
        super().__init__()
        assert config.head_dim is not None  # ByteModelConfig sets it
        self.head_dim = config.head_dim
        self.kinds = config.rotations
        self.ropes = {"global": config.rope_parameters, "local": config.local_rope_parameters}
        self.multiplier = config.head_dim**-0.5 if config.attention_multiplier is None else config.attention_multiplier
        self.scale_base = config.xpos_scale_base
        self.gamma = config.xpos_gamma
        self.use_xpos = config.use_xpos
        self.raw_decay = nn.Parameter(torch.empty(config.head_dim // 2)) if config.xpos_learnable_scale else None
        self._rotations: dict[tuple[str, bool], Rotation] = {}
        self.reset_parameters()

    def of_layer(self, layer: int, length: int) -> "Rotation":
        """The rotation of a layer, one object for all layers that share it.

        `length`: tokens of the longest sequence that will be rotated; longrope chooses its factors by it.
        """
        kind = self.kinds[layer]
        rope = self.ropes.get(kind)
        key = kind, rope is not None and is_long(rope, length)
        if key not in self._rotations:
            self._rotations[key] = self._make(rope, length)
        return self._rotations[key]

    def reserve(self, length: int, device: torch.device) -> None:
        """Make what sequences of up to `length` tokens need on a device. A model compiled without it is compiled
        again at its second call, for which the tables exist."""
        device = torch.empty(0, device=device).device  # with its number, as that of tensors
        for layer in range(len(self.kinds)):
            self.of_layer(layer, length).cache.tables(length + 1, device)

    def changes_with(self, before: int, after: int) -> bool:
        """Whether some layer is rotated in another way when sequences grow from `before` to `after` tokens."""
        return any(is_long(rope, before) != is_long(rope, after) for rope in self.ropes.values() if rope is not None)

    def _make(self, rope: dict[str, Any] | None, length: int) -> "Rotation":
        if rope is None:
            nothing = torch.zeros(self.head_dim // 2, **CPU_FLOAT64)
            return Rotation(embedding=self, cache=RotaryCache(nothing), score_scale=self.multiplier, decays=False)
        frequencies = inverse_frequencies(rope, self.head_dim, length)
        factor, gain = attention_factor(rope) ** 2, None
        if factor != 1 and not frequencies.all():
            gain, factor = torch.where(frequencies > 0, factor, 1.0).float(), 1.0
        return Rotation(
            embedding=self,
            cache=RotaryCache(frequencies),
            score_scale=self.multiplier * factor,
            decays=self.use_xpos,
            query_gain=gain,
        )

    def _paper_log_zeta(self) -> torch.Tensor:
        """log ζ_j of the paper, [D/2] float64, all below 0."""
        pairs = self.head_dim // 2
        j = torch.arange(pairs, **CPU_FLOAT64)
        return torch.log((j / pairs + self.gamma) / (1 + self.gamma))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start the learnable decay at the paper's values: softplus(raw) = -log ζ."""
        if self.raw_decay is not None:
            self.raw_decay.copy_(torch.log(torch.expm1(-self._paper_log_zeta())))

    def log_decay(self, device: torch.device) -> torch.Tensor:
        """log ζ_j / b, [D/2] float32, never above 0, so that scores stay bounded while it is trained."""
        if self.raw_decay is not None:
            return -F.softplus(self.raw_decay.float()) / self.scale_base
        return (self._paper_log_zeta() / self.scale_base).float().to(device)


@dataclass(frozen=True, kw_only=True)
class Rotation:
    """Rotates the queries and keys of some layers. `XPosRotaryEmbedding.of_layer` makes it.

    Score of a query at m and a key at n from the same base P, both rotated by their offset from P:
    Σ_j ζ_j^((m-n)/b) · Re[q_j · conj(k_j) · e^{i(m-n)θ_j}]. Without XPos ζ = 1; without rotation θ = 0, too. Scores
    must be multiplied by `score_scale`, which holds 1/sqrt(D) or `attention_multiplier`, and the attention factors of
    YaRN and longrope. Where only a part of the pairs is rotated, those factors are for that part: `query_gain`, which
    `rotate_queries` multiplies with.
    """

    embedding: XPosRotaryEmbedding
    cache: RotaryCache
    score_scale: float
    decays: bool
    query_gain: torch.Tensor | None = None  # of each pair, [D/2] float32 on the CPU; None: all are 1

    def log_decay(self, device: torch.device) -> torch.Tensor | None:
        """As `XPosRotaryEmbedding.log_decay`; None without XPos."""
        return self.embedding.log_decay(device) if self.decays else None

    def rotate_queries(self, q: torch.Tensor, offsets: torch.Tensor, max_offset: int) -> torch.Tensor:
        """q_n · e^{i·offset·θ} · ζ^(offset/b) · gain.

        Args:
            q: [..., H, D].
            offsets: signed distance of each query from its base, integers [...], |offset| ≤ max_offset.
        """
        if self.query_gain is not None:
            q = (q * self.query_gain.to(q.device).repeat(2)).to(q.dtype)
        return self._rotate(q, offsets, max_offset, decay_sign=1)

    def rotate_keys(self, k: torch.Tensor, offsets: torch.Tensor, max_offset: int) -> torch.Tensor:
        """k_n · e^{i·offset·θ} · ζ^(-offset/b); rotations add up, so a stored key is moved to another base by
        rotating it by the distance between the bases. Shapes as in `rotate_queries`."""
        return self._rotate(k, offsets, max_offset, decay_sign=-1)

    def _rotate(self, x: torch.Tensor, offsets: torch.Tensor, max_offset: int, decay_sign: int) -> torch.Tensor:
        cos_table, sin_table = self.cache.tables(max_offset + 1, x.device)
        distance = offsets.abs()
        cos = cos_table[distance].unsqueeze(-2)  # [..., 1, D/2]: the same for every head
        sin = (sin_table[distance] * offsets.sign().unsqueeze(-1)).unsqueeze(-2)
        log_decay = self.log_decay(x.device)
        if log_decay is not None:
            decay = torch.exp(decay_sign * offsets.unsqueeze(-1) * log_decay).unsqueeze(-2)
            cos, sin = cos * decay, sin * decay
        first, second = x.float().chunk(2, dim=-1)  # pairs are (j, j + D/2)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
