"""Intermediate results of a mixture-of-experts layer on the GPU."""

from dataclasses import dataclass

import torch

# T tokens, E experts, J chosen experts of a token, P = T · J pairs of a token and a chosen expert
# C hidden size, I intermediate size of an expert


@dataclass(frozen=True, kw_only=True)
class ExpertScratch:
    """For up to `max_rows` tokens at a time. Allocated once: graphs keep the addresses. Layers of one stream share it.

    Pair number p is choice p % J of token p // J.
    """

    max_rows: int
    logits: torch.Tensor  # float32, [T, E]; then what the choice goes by
    chosen: torch.Tensor  # int32, [T, J] experts, the best first
    gates: torch.Tensor  # float32, [T, J]
    arrivals: torch.Tensor  # int32, [T] programs that have computed logits of a token; 0 between launches
    counts: torch.Tensor  # int32, [E] pairs of each expert; 0 between layers
    lists: torch.Tensor  # int32, [E, T] numbers of each expert's pairs, in any order
    normed: torch.Tensor  # [T, C] of few tokens, in the model's dtype like the following
    hidden: torch.Tensor  # [P, I] gated
    outputs: torch.Tensor  # [P, C] each pair's term of the sum

    @classmethod
    def make(
        cls,
        *,
        max_rows: int,
        max_normed_rows: int,
        num_experts: int,
        top_k: int,
        hidden_size: int,
        intermediate_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> "ExpertScratch":
        """For layers of these sizes; `max_normed_rows`: largest number of tokens that the router norms."""

        def empty(size: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.empty(size, dtype=dtype, device=device)

        pairs = max_rows * top_k
        return cls(
            max_rows=max_rows,
            logits=empty(max_rows * num_experts, torch.float32),
            chosen=empty(pairs, torch.int32),
            gates=empty(pairs, torch.float32),
            arrivals=torch.zeros(max_rows, dtype=torch.int32, device=device),
            counts=torch.zeros(num_experts, dtype=torch.int32, device=device),
            lists=empty(num_experts * max_rows, torch.int32),
            normed=empty(max_normed_rows * hidden_size, dtype),
            hidden=empty(pairs * intermediate_size, dtype),
            outputs=empty(pairs * hidden_size, dtype),
        )
