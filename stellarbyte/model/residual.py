"""Adding a branch to the residual stream: LayerScale, DropPath, DeepNorm."""

from collections.abc import Callable

import torch
from torch import nn

from stellarbyte.config import ByteModelConfig
from stellarbyte.model.norm import ByteRMSNorm


class LayerScale(nn.Module):
    """A learned factor per channel (Touvron et al. 2021, "Going deeper with Image Transformers")."""

    def __init__(self, size: int, start: float) -> None:
        super().__init__()
        self.start = start
        self.weight = nn.Parameter(torch.full((size,), start))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight

    @property
    def gain(self) -> torch.Tensor:
        """The factor of each channel."""
        return self.weight


class DropPath(nn.Module):
    """Stochastic depth (Huang et al. 2016): in training a sample skips the branch with chance `rate`.

    The first dimension of x counts samples. Kept samples are divided by 1 - rate, so the mean is unchanged.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training or self.rate == 0:
            return x
        kept = torch.empty(x.shape[0], *[1] * (x.dim() - 1), dtype=x.dtype, device=x.device).bernoulli_(1 - self.rate)
        return x * kept / (1 - self.rate)

    def extra_repr(self) -> str:
        return f"rate={self.rate}"


def deepnorm_alpha(config: ByteModelConfig) -> float:
    """Factor of the residual stream in a decoder of N layers: (2N)^1/4 (Wang et al. 2022, table 2); 1 without."""
    return (2 * config.num_hidden_layers) ** 0.25 if config.deepnorm else 1.0


def deepnorm_beta(config: ByteModelConfig) -> float:
    """Gain of the initial v, o and MLP weights: (8N)^-1/4; 1 without DeepNorm."""
    return (8 * config.num_hidden_layers) ** -0.25 if config.deepnorm else 1.0


class Residual(nn.Module):
    """x + m · branch(norm(x)), or norm(α·x + m · branch(x)) with DeepNorm; dropout and DropPath on the branch.

    m is `residual_multiplier`. Layers own the norms, under the names in checkpoints.
    """

    def __init__(self, config: ByteModelConfig, layer: int) -> None:
        super().__init__()
        self.deepnorm = config.deepnorm
        self.alpha = deepnorm_alpha(config)
        self.multiplier = config.residual_multiplier
        self.dropout = nn.Dropout(config.residual_dropout)
        self.drop_path = DropPath(config.drop_path_rate * layer / max(1, config.num_hidden_layers - 1))

    def branch_input(self, x: torch.Tensor, norm: ByteRMSNorm | None) -> torch.Tensor:
        """What a branch reads of the residual stream x, or of a memory of it."""
        return x if self.deepnorm or norm is None else norm(x)

    def forward(
        self, x: torch.Tensor, branch: Callable[[torch.Tensor], torch.Tensor], norm: ByteRMSNorm | None
    ) -> torch.Tensor:
        """`norm` None: the branch reads x itself."""
        out = branch(self.branch_input(x, norm))
        out = self.drop_path(self.dropout(out if self.multiplier == 1 else self.multiplier * out))
        if self.deepnorm:
            assert norm is not None  # ByteModelConfig
            return norm(self.alpha * x + out)
        return x + out
