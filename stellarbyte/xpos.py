"""XPos and RoPE rotations by relative offset (numerics: "XPos").

Both position encodings depend on distances only, so queries and keys are rotated by their offset from a nearby
base position instead of by absolute position: the XPos factors stay near 1 and every float format is exact enough
at any position.
"""

import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from stellarbyte.config import ByteModelConfig

# Tables are always made on the CPU, also while a model is being built on the meta device.
CPU_FLOAT64: dict[str, Any] = {"dtype": torch.float64, "device": "cpu"}


def inverse_frequencies(rope: dict[str, Any], head_dim: int) -> torch.Tensor:
    """θ_j for j = 0..head_dim/2-1, float64. `rope` is a validated `rope_parameters`."""
    theta: float = rope["rope_theta"]
    exponents = torch.arange(0, head_dim, 2, **CPU_FLOAT64) / head_dim
    frequencies = theta**-exponents
    match rope["rope_type"]:
        case "default":
            return frequencies
        case "linear":
            return frequencies / rope["factor"]
        case "llama3":
            return _llama3(frequencies, rope)
        case "yarn":
            return _yarn(frequencies, rope, head_dim)
        case other:
            raise ValueError(f"rope_parameters: unknown rope_type {other!r}")


def _llama3(frequencies: torch.Tensor, rope: dict[str, Any]) -> torch.Tensor:
    """Llama 3.1's scaling: low frequencies are divided by `factor`, high ones kept, with a smooth step between."""
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    turns = rope["original_max_position_embeddings"] * frequencies / (2 * math.pi)  # in the original context
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * (kept + (1 - kept) / rope["factor"])


def _yarn(frequencies: torch.Tensor, rope: dict[str, Any], head_dim: int) -> torch.Tensor:
    """YaRN (Peng et al. 2023), "NTK by parts": pairs with many turns in the original context are kept."""
    original, theta = rope["original_max_position_embeddings"], rope["rope_theta"]

    def pair_with_turns(turns: float) -> float:
        return head_dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first, last = pair_with_turns(rope.get("beta_fast") or 32), pair_with_turns(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    width = max(last - first, 0.001)
    slowed = ((torch.arange(head_dim // 2, **CPU_FLOAT64) - first) / width).clamp(0, 1)
    return frequencies * (1 - slowed + slowed / rope["factor"])


def attention_factor(rope: dict[str, Any]) -> float:
    """YaRN's factor for queries and for keys; 1 for the other types."""
    if rope["rope_type"] != "yarn":
        return 1.0
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])

    def mscale(weight: float) -> float:
        return 1.0 if rope["factor"] <= 1 else 0.1 * weight * math.log(rope["factor"]) + 1.0

    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return mscale(rope["mscale"]) / mscale(rope["mscale_all_dim"])
    return mscale(1.0)


class RotaryCache:
    """cos and sin of distance · θ_j for distances 0..length-1, computed in float64, kept in float32 per device.

    One is shared by all layers of a model. It grows by doubling when a longer distance is reserved.
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
    """Rotates queries and keys; one module serves every layer.

    Score of a query at m and a key at n from the same base P, both rotated by their offset from P:
    Σ_j ζ_j^((m-n)/b) · Re[q_j · conj(k_j) · e^{i(m-n)θ_j}]. Without XPos ζ = 1. Scores must be multiplied by
    `score_scale`, which holds 1/sqrt(D) and YaRN's attention factor.
    """

    def __init__(self, config: ByteModelConfig) -> None:
        super().__init__()
        rope = config.rope_parameters
        assert rope is not None and config.head_dim is not None  # ByteModelConfig sets both
        self.cache = RotaryCache(inverse_frequencies(rope, config.head_dim))
        self.score_scale = config.head_dim**-0.5 * attention_factor(rope) ** 2
        self.scale_base = config.xpos_scale_base
        self.gamma = config.xpos_gamma
        self.use_xpos = config.use_xpos
        self.raw_decay = nn.Parameter(torch.empty(config.head_dim // 2)) if config.xpos_learnable_scale else None
        self.reset_parameters()

    def _paper_log_zeta(self) -> torch.Tensor:
        """log ζ_j of the paper, [D/2] float64, all below 0."""
        pairs = len(self.cache.frequencies)
        j = torch.arange(pairs, **CPU_FLOAT64)
        return torch.log((j / pairs + self.gamma) / (1 + self.gamma))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start the learnable decay at the paper's values: softplus(raw) = -log ζ."""
        if self.raw_decay is not None:
            self.raw_decay.copy_(torch.log(torch.expm1(-self._paper_log_zeta())))

    def log_decay(self, device: torch.device) -> torch.Tensor | None:
        """log ζ_j / b, [D/2] float32, never above 0 (so scores stay bounded while it is trained); None without XPos."""
        if not self.use_xpos:
            return None
        if self.raw_decay is not None:
            return -F.softplus(self.raw_decay.float()) / self.scale_base
        return (self._paper_log_zeta() / self.scale_base).float().to(device)

    def rotate_queries(self, q: torch.Tensor, offsets: torch.Tensor, max_offset: int) -> torch.Tensor:
        """q_n · e^{i·offset·θ} · ζ^(offset/b).

        Args:
            q: [..., H, D].
            offsets: signed distance of each query from its base, integers [...], |offset| ≤ max_offset.
        """
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
