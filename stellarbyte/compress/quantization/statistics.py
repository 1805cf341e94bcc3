"""What calibration keeps of the inputs of linears: no input itself, but sums over all of them."""

import torch

# T rows, N outputs, K inputs


class InputStatistics:
    """Sums over the inputs x [..., K] of linears that share them.

    Attributes:
        gram_KK: Σ x xᵀ, float64.
        num_rows: number of inputs.
    """

    def __init__(self, num_inputs: int) -> None:
        self.gram_KK = torch.zeros(num_inputs, num_inputs, dtype=torch.float64)
        self.num_rows = 0
        self._sum_K = torch.zeros(num_inputs, dtype=torch.float64)
        self.largest_K = torch.zeros(num_inputs)

    def add(self, x: torch.Tensor) -> None:
        x_TK = x.detach().reshape(-1, x.shape[-1]).float()
        self.gram_KK += x_TK.T @ x_TK
        self.num_rows += len(x_TK)
        if len(x_TK):
            size_TK = x_TK.abs()
            self._sum_K += size_TK.sum(dim=0)
            self.largest_K = torch.maximum(self.largest_K, size_TK.amax(dim=0))

    @property
    def mean_K(self) -> torch.Tensor:
        """The mean size of each input, float32."""
        return (self._sum_K / max(1, self.num_rows)).float()

    def divide(self, factors_K: torch.Tensor) -> None:
        """The inputs are divided by factors, as `folding.Fold` does it."""
        factors_K = factors_K.double()
        self.gram_KK = self.gram_KK / torch.outer(factors_K, factors_K)
        self._sum_K = self._sum_K / factors_K
        self.largest_K = self.largest_K / factors_K.float()


def product_errors(gap_NK: torch.Tensor, gram_KK: torch.Tensor) -> torch.Tensor:
    """‖gap · X‖² of each output, [N] float64, with X the inputs of the Gram matrix."""
    gap_NK = gap_NK.double()
    return ((gap_NK @ gram_KK) * gap_NK).sum(dim=1)
