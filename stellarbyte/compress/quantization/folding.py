"""Factors of the inputs of linears that change nothing: what comes before is divided by them.

y = W x = (W · s) (x / s). The division goes into what makes x: the gain of a norm, the values of attention, or the ups
of a gated MLP. So AWQ and SmoothQuant can choose s to make W easier to round.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from stellarbyte.config import ByteModelConfig
from stellarbyte.model.decoder import ByteDecoderLayer
from stellarbyte.model.mlp import ByteMLP
from stellarbyte.model.norm import ByteRMSNorm

# K inputs, D head dim


@dataclass(frozen=True, kw_only=True)
class Fold:
    """An input whose factors can be folded.

    Attributes:
        name: of the input, for reports.
        linears: all modules that read it.
        divide: divides what makes the input by factors [K].
        tie: factors [K] → the nearest factors that can be folded, such as those that are equal for some inputs.
    """

    name: str
    linears: tuple[nn.Linear, ...]
    divide: Callable[[torch.Tensor], None]
    tie: Callable[[torch.Tensor], torch.Tensor] = lambda factors_K: factors_K

    @torch.no_grad()
    def apply(self, factors_K: torch.Tensor) -> None:
        """Multiply the columns of the linears, and divide what comes before. Parameters must be in float32."""
        for linear in self.linears:
            linear.weight.data = linear.weight.data * factors_K
        self.divide(factors_K)


def folds(layer: ByteDecoderLayer, config: ByteModelConfig) -> tuple[list[Fold], dict[str, str]]:
    """The inputs of a layer whose factors can be folded, and the others, each with the reason."""
    found: list[Fold] = []
    left_out: dict[str, str] = {}
    attention, dense = layer.self_attn, layer.mlp if isinstance(layer.mlp, ByteMLP) else None
    of_attention = (attention.q_proj, attention.k_proj, attention.v_proj)
    no_norm = "no norm comes directly before, since norms come after branches" if not config.deepnorm else (
        "its norm makes the residual stream, too (deepnorm)"
    )  # fmt: skip
    has_norms = layer.input_layernorm is not None and not config.deepnorm
    if config.parallel_residual and has_norms:
        if dense is None:
            left_out["attention_input"] = "routers and experts read it, too (parallel_residual)"
        else:
            readers = (*of_attention, dense.gate_proj, dense.up_proj)
            found.append(_after_norm("attention_input", layer.input_layernorm, readers))
    elif has_norms:
        found.append(_after_norm("attention_input", layer.input_layernorm, of_attention))
    else:
        left_out["attention_input"] = no_norm
    found.append(_attended(layer, config))
    if dense is None:
        left_out["mlp_input"] = "routers and experts read it"
        return found, left_out
    if not config.parallel_residual:
        if has_norms:
            found.append(_after_norm("mlp_input", layer.post_attention_layernorm, (dense.gate_proj, dense.up_proj)))
        else:
            left_out["mlp_input"] = no_norm
    found.append(Fold(name="gated", linears=(dense.down_proj,), divide=partial(_divide_rows, dense.up_proj)))
    return found, left_out


def _after_norm(name: str, norm: ByteRMSNorm | None, linears: tuple[nn.Linear, ...]) -> Fold:
    assert norm is not None

    def divide(factors_K: torch.Tensor) -> None:
        gain_K = norm.gain / factors_K
        norm.weight.data = gain_K - 1 if norm.zero_centered else gain_K

    return Fold(name=name, linears=linears, divide=divide)


def _attended(layer: ByteDecoderLayer, config: ByteModelConfig) -> Fold:
    """The outputs of heads are sums of values, and linear in them. Heads of one group share values, and so factors."""
    assert config.num_key_value_heads is not None and config.head_dim is not None
    kv_heads, head_dim, attention = config.num_key_value_heads, config.head_dim, layer.self_attn

    def by_group(factors_K: torch.Tensor) -> torch.Tensor:
        return factors_K.view(kv_heads, -1, head_dim)

    def tie(factors_K: torch.Tensor) -> torch.Tensor:
        groups = by_group(factors_K)
        return groups.mean(dim=1, keepdim=True).expand_as(groups).reshape(-1)

    def divide(factors_K: torch.Tensor) -> None:
        _divide_rows(attention.v_proj, by_group(factors_K)[:, 0].reshape(-1))

    return Fold(name="attended", linears=(attention.o_proj,), divide=divide, tie=tie)


def _divide_rows(linear: nn.Linear, factors_N: torch.Tensor) -> None:
    linear.weight.data = linear.weight.data / factors_N[:, None]
    if linear.bias is not None:
        linear.bias.data = linear.bias.data / factors_N
