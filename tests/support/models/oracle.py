"""What a ByteTransformer must compute, in float64, from the formulas alone: no cache, no blocks, none of our code.

`logprobs` spells out every pair of positions at once, for the sizes of tests: memory grows with the square of the
length. `banded_logprobs` is for long streams: it takes the rows in turn and only the keys that they see.
"""

import math
from collections.abc import Callable, Mapping

import torch

from stellarbyte.config import ByteModelConfig
from tests.support.models import expert_oracle

Weights = Mapping[str, torch.Tensor]


# (config, layer, queries, keys, values), the last three [T, H, D] → [T, H, D]. With sinks of the
# softmax, their logits [H] come last.
Attend = Callable[..., torch.Tensor]


def logprobs(
    weights: Weights, config: ByteModelConfig, token_ids: list[int], attend: Attend | None = None
) -> torch.Tensor:
    """log p(next token) after every position, [T, V] float64; `attend` None: the config's windows and sinks."""
    return _logprobs(weights, config, token_ids, list(range(len(token_ids))), _attend if attend is None else attend)


def banded_logprobs(
    weights: Weights, config: ByteModelConfig, token_ids: list[int], positions: list[int]
) -> torch.Tensor:
    """log p(next token) after the given positions of a long sequence, [len(positions), V] float64."""
    return _logprobs(weights, config, token_ids, positions, _attend_in_bands)


def _logprobs(
    weights: Weights, config: ByteModelConfig, token_ids: list[int], positions: list[int], attend: Attend
) -> torch.Tensor:
    w = {name: tensor.double() for name, tensor in weights.items()}
    x = hidden_states(weights, config, token_ids, attend)[-1]
    x = _rms_norm(x[positions], w["model.norm.weight"], config)
    head = w.get("lm_head.weight", w["model.embed_tokens.weight"])
    return _capped(x @ head.T * config.logits_multiplier, config.logits_softcap).log_softmax(dim=-1)


def hidden_states(
    weights: Weights, config: ByteModelConfig, token_ids: list[int], attend: Attend | None = None
) -> list[torch.Tensor]:
    """The input of every layer and the output of the last, [T, hidden] float64 each; `attend` None: windows and
    sinks."""
    w = {name: tensor.double() for name, tensor in weights.items()}
    states = [w["model.embed_tokens.weight"][torch.tensor(token_ids)] * config.embedding_multiplier]
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        of_layer = {name.removeprefix(prefix): t for name, t in w.items() if name.startswith(prefix)}
        holder = f"model.layers.{config.expert_layers[layer]}."  # of the experts that the layer uses
        of_layer |= {name.removeprefix(holder): t for name, t in w.items() if name.startswith(f"{holder}mlp.experts.")}
        states.append(_layer(of_layer, config, layer, states[-1], _attend if attend is None else attend))
    return states


def _layer(w: Weights, config: ByteModelConfig, layer: int, x: torch.Tensor, attend: Attend) -> torch.Tensor:
    def finished(y: torch.Tensor, norm: str, scale: str) -> torch.Tensor:
        if config.branch_norms != "before":
            y = _rms_norm(y, w[norm], config)
        return config.residual_multiplier * y * w.get(scale, torch.tensor(1.0))

    def attention(y: torch.Tensor) -> torch.Tensor:
        out = _attention(w, config, layer, y, attend)
        return finished(out, "attention_output_norm.weight", "attention_scale.weight")

    def mlp(y: torch.Tensor) -> torch.Tensor:
        if config.expert_layers[layer] is not None:
            out = expert_oracle.mixture(w, config, y)
        else:
            gate = expert_oracle.gate(config.hidden_act, _linear(w, "mlp.gate_proj", y))
            out = _linear(w, "mlp.down_proj", gate * _linear(w, "mlp.up_proj", y))
        return finished(out, "mlp_output_norm.weight", "mlp_scale.weight")

    def both(y: torch.Tensor) -> torch.Tensor:
        return attention(y) + mlp(y)

    alpha = (2 * config.num_hidden_layers) ** 0.25
    branches = [(both, "input_layernorm")]
    if not config.parallel_residual:
        branches = [(attention, "input_layernorm"), (mlp, "post_attention_layernorm")]
    for branch, norm in branches:
        if config.branch_norms == "after":
            x = x + branch(x)
        elif config.deepnorm:
            x = _rms_norm(alpha * x + branch(x), w[f"{norm}.weight"], config)
        else:
            x = x + branch(_rms_norm(x, w[f"{norm}.weight"], config))
    return x


def _attention(w: Weights, config: ByteModelConfig, layer: int, x: torch.Tensor, attend: Attend) -> torch.Tensor:
    length, dim, num_kv_heads = len(x), _head_dim(config), config.num_key_value_heads
    assert num_kv_heads is not None  # the config fills it in
    q, k, v = (_linear(w, f"self_attn.{name}_proj", x) for name in "qkv")
    if config.qk_norm and not config.qk_norm_per_head:
        q, k = _rms_norm(q, w["self_attn.q_norm.weight"], config), _rms_norm(k, w["self_attn.k_norm.weight"], config)
    q, k, v = (y.view(length, -1, dim) for y in (q, k, v))
    if config.qk_norm and config.qk_norm_per_head:
        q, k = _rms_norm(q, w["self_attn.q_norm.weight"], config), _rms_norm(k, w["self_attn.k_norm.weight"], config)
    groups = config.num_attention_heads // num_kv_heads
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    sink = (w["self_attn.softmax_sink"],) if config.softmax_sink else ()
    return _linear(w, "self_attn.o_proj", attend(config, layer, q, k, v, *sink).flatten(1))


def _attend(
    config: ByteModelConfig,
    layer: int,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sink_H: torch.Tensor | None = None,
) -> torch.Tensor:
    """Every pair (m, n): Re[q_m · conj(k_n) · e^{i·distance·θ}] · ζ^(distance/b)."""
    length, sinks, window = len(q), config.sink_tokens, config.windows[layer]
    m, n = torch.arange(length)[:, None], torch.arange(length)[None, :]
    distance, visible = m - n, n <= m
    if window is not None:
        visible = visible & ((n > m - window) | (n < sinks))
        distance = torch.where(n < sinks, m.clamp(max=window + sinks - 1) - n, distance)
    scores = pair_scores(config, layer, q, k, distance).masked_fill(~visible, -math.inf)
    return torch.einsum("hmn,nhd->mhd", softmax(scores, sink_H), v)


def softmax(scores: torch.Tensor, sink_H: torch.Tensor | None) -> torch.Tensor:
    """e^s / (Σ e^s + e^sink) of scores [H, M, N]."""
    largest = scores.amax(dim=-1, keepdim=True)
    exponentials = (scores - largest).exp()
    total = exponentials.sum(dim=-1, keepdim=True)
    if sink_H is not None:
        total = total + (sink_H[:, None, None] - largest).exp()
    return exponentials / total


def pair_scores(
    config: ByteModelConfig, layer: int, q: torch.Tensor, k: torch.Tensor, distance: torch.Tensor
) -> torch.Tensor:
    """[H, M, N] scores of queries [M, H, D] and keys [N, H, D] at the given distances [M, N]."""
    dim = _head_dim(config)
    theta, zeta = _frequencies(config, layer)
    turned = torch.polar(torch.ones_like(distance[..., None] * theta), distance[..., None] * theta)
    turned = turned * zeta ** (distance.clamp(min=0)[..., None] / config.xpos_scale_base)
    as_complex = [torch.complex(t[..., : dim // 2], t[..., dim // 2 :]) for t in (q, k)]
    products = torch.einsum("mhj,nhj,mnj->hmn", as_complex[0], as_complex[1].conj(), turned).real
    return _capped(products * _score_scale(config), config.attention_softcap)


def _attend_in_bands(
    config: ByteModelConfig,
    layer: int,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sink_H: torch.Tensor | None = None,
    rows: int = 256,
) -> torch.Tensor:
    """`rows` queries in turn, over the sinks and the keys that they see; those are turned relative to the first one."""
    window = config.windows[layer]
    sinks = 0 if window is None else config.sink_tokens
    out = torch.empty_like(q)
    for start in range(0, len(q), rows):
        m = torch.arange(start, min(start + rows, len(q)))
        first = 0 if window is None else max(0, start - window + 1)
        n = torch.arange(first, int(m[-1]) + 1)
        visible = n <= m[:, None]
        if window is not None:
            visible &= (n > m[:, None] - window) & (n >= sinks)
        near = _scores(config, layer, q[m], m - first, k[n], n - first).masked_fill(~visible, -math.inf)
        s = torch.arange(min(sinks, int(m[-1]) + 1))
        met_at = m if window is None else m.clamp(max=window + sinks - 1)
        far = _scores(config, layer, q[m], met_at, k[s], s).masked_fill(s > m[:, None], -math.inf)
        probabilities = softmax(torch.cat([far, near], dim=-1), sink_H)
        out[m] = torch.einsum("hmn,nhd->mhd", probabilities, torch.cat([v[s], v[n]]))
    return out


def _scores(
    config: ByteModelConfig, layer: int, q: torch.Tensor, m: torch.Tensor, k: torch.Tensor, n: torch.Tensor
) -> torch.Tensor:
    """[H, M, N] scores of queries at m and keys at n, both small: float64 holds ζ to the power of either."""
    turned = [
        _turn(config, layer, t, positions, sign).transpose(0, 1) for t, positions, sign in ((q, m, 1), (k, n, -1))
    ]
    return _capped(turned[0] @ turned[1].transpose(1, 2) * _score_scale(config), config.attention_softcap)


def _turn(config: ByteModelConfig, layer: int, t: torch.Tensor, positions: torch.Tensor, sign: int) -> torch.Tensor:
    """The textbook's absolute form: t · e^{i·position·θ} · ζ^(±position/b), as pairs of reals."""
    half = _head_dim(config) // 2
    theta, zeta = _frequencies(config, layer)
    turns = torch.polar(zeta ** (sign * positions[:, None] / config.xpos_scale_base), positions[:, None] * theta)
    turned = torch.complex(t[..., :half], t[..., half:]) * turns[:, None]
    return torch.cat([turned.real, turned.imag], dim=-1)


def _frequencies(config: ByteModelConfig, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """θ_j (0 without rotation) and ζ_j (1 without XPos)."""
    dim = _head_dim(config)
    j = torch.arange(dim // 2, dtype=torch.float64)
    kind = "global" if config.layer_rotations is None else config.layer_rotations[layer]
    if kind == "none":
        return torch.zeros_like(j), torch.ones_like(j)
    rope = config.local_rope_parameters if kind == "local" else config.rope_parameters
    assert rope is not None and rope["rope_type"] == "default"
    rotated = dim * rope.get("partial_rotary_factor", 1.0)
    theta = torch.where(2 * j < rotated, rope["rope_theta"] ** (-2 * j / rotated), 0)
    zeta = (2 * j / dim + config.xpos_gamma) / (1 + config.xpos_gamma)
    return theta, zeta if config.use_xpos else torch.ones_like(zeta)


def _score_scale(config: ByteModelConfig) -> float:
    return 1 / math.sqrt(_head_dim(config)) if config.attention_multiplier is None else config.attention_multiplier


def _capped(x: torch.Tensor, cap: float | None) -> torch.Tensor:
    return x if cap is None else cap * torch.tanh(x / cap)


def _head_dim(config: ByteModelConfig) -> int:
    assert config.head_dim is not None  # the config fills it in
    return config.head_dim


def _linear(w: Weights, name: str, x: torch.Tensor) -> torch.Tensor:
    out = x @ w[f"{name}.weight"].T
    return out + w[f"{name}.bias"] if f"{name}.bias" in w else out


def _rms_norm(x: torch.Tensor, weight: torch.Tensor, config: ByteModelConfig) -> torch.Tensor:
    gain = 1 + weight if config.zero_centered_norms else weight
    return x / (x.pow(2).mean(dim=-1, keepdim=True) + config.rms_norm_eps).sqrt() * gain
