"""What a ByteTransformer must compute, in float64, from the formulas alone.

The whole sequence at once, every pair of positions spelled out: no cache, no blocks, no rotation of single keys, and
no code of the library. Written for the sizes of tests: memory grows with the square of the length.
"""

import math
from collections.abc import Mapping

import torch

from stellarbyte.config import ByteModelConfig

Weights = Mapping[str, torch.Tensor]


def logprobs(weights: Weights, config: ByteModelConfig, token_ids: list[int]) -> torch.Tensor:
    """log p(next token) after every position, [T, V] float64."""
    w = {name: tensor.double() for name, tensor in weights.items()}
    x = w["model.embed_tokens.weight"][torch.tensor(token_ids)]
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        x = _layer({name.removeprefix(prefix): t for name, t in w.items() if name.startswith(prefix)}, config, layer, x)
    x = _rms_norm(x, w["model.norm.weight"], config.rms_norm_eps)
    head = w.get("lm_head.weight", w["model.embed_tokens.weight"])
    return (x @ head.T).log_softmax(dim=-1)


def _layer(w: Weights, config: ByteModelConfig, layer: int, x: torch.Tensor) -> torch.Tensor:
    eps = config.rms_norm_eps

    def attention(y: torch.Tensor) -> torch.Tensor:
        return _attention(w, config, layer, y) * w.get("attention_scale.weight", torch.tensor(1.0))

    def mlp(y: torch.Tensor) -> torch.Tensor:
        gate = _gate(config.hidden_act, _linear(w, "mlp.gate_proj", y))
        out = _linear(w, "mlp.down_proj", gate * _linear(w, "mlp.up_proj", y))
        return out * w.get("mlp_scale.weight", torch.tensor(1.0))

    def both(y: torch.Tensor) -> torch.Tensor:
        return attention(y) + mlp(y)

    alpha = (2 * config.num_hidden_layers) ** 0.25
    branches = [(both, "input_layernorm")]
    if not config.parallel_residual:
        branches = [(attention, "input_layernorm"), (mlp, "post_attention_layernorm")]
    for branch, norm in branches:
        weight = w[f"{norm}.weight"]
        if config.deepnorm:
            x = _rms_norm(alpha * x + branch(x), weight, eps)
        else:
            x = x + branch(_rms_norm(x, weight, eps))
    return x


def _attention(w: Weights, config: ByteModelConfig, layer: int, x: torch.Tensor) -> torch.Tensor:
    length, dim = len(x), config.head_dim
    q = _linear(w, "self_attn.q_proj", x).view(length, config.num_attention_heads, dim)
    k = _linear(w, "self_attn.k_proj", x).view(length, config.num_key_value_heads, dim)
    v = _linear(w, "self_attn.v_proj", x).view(length, config.num_key_value_heads, dim)
    if config.qk_norm:
        q = _rms_norm(q, w["self_attn.q_norm.weight"], config.rms_norm_eps)
        k = _rms_norm(k, w["self_attn.k_norm.weight"], config.rms_norm_eps)
    groups = config.num_attention_heads // config.num_key_value_heads
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)

    window, sinks = config.windows[layer], config.sink_tokens
    m, n = torch.arange(length)[:, None], torch.arange(length)[None, :]
    distance, visible = m - n, n <= m
    if window is not None:
        visible = visible & ((n > m - window) | (n < sinks))
        distance = torch.where(n < sinks, m.clamp(max=window + sinks - 1) - n, distance)

    j = torch.arange(dim // 2, dtype=torch.float64)
    theta = config.rope_parameters["rope_theta"] ** (-2 * j / dim)
    turned = torch.polar(torch.ones_like(distance[..., None] * theta), distance[..., None] * theta)
    if config.use_xpos:
        zeta = (2 * j / dim + config.xpos_gamma) / (1 + config.xpos_gamma)
        turned = turned * zeta ** (distance.clamp(min=0)[..., None] / config.xpos_scale_base)
    as_complex = [torch.complex(t[..., : dim // 2], t[..., dim // 2 :]) for t in (q, k)]
    scores = torch.einsum("mhj,nhj,mnj->hmn", as_complex[0], as_complex[1].conj(), turned).real / math.sqrt(dim)
    probabilities = scores.masked_fill(~visible, -math.inf).softmax(dim=-1)
    return _linear(w, "self_attn.o_proj", torch.einsum("hmn,nhd->mhd", probabilities, v).flatten(1))


def _linear(w: Weights, name: str, x: torch.Tensor) -> torch.Tensor:
    out = x @ w[f"{name}.weight"].T
    return out + w[f"{name}.bias"] if f"{name}.bias" in w else out


def _rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x / (x.pow(2).mean(dim=-1, keepdim=True) + eps).sqrt() * weight


def _gate(name: str, x: torch.Tensor) -> torch.Tensor:
    if name == "silu":
        return x / (1 + torch.exp(-x))
    if name == "gelu":
        return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
