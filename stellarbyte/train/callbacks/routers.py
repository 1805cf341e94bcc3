"""Keeps the routers of a mixture of experts up to date: the number of the step, and biases that even the load."""

from typing import Any

import torch
from transformers import TrainerCallback

from stellarbyte.train.ranks import sum_over_ranks


class Routers(TrainerCallback):
    """`router_top_p_steps` counts steps of the optimizer, also after a run was continued.

    Args:
        balance_rate: of `ByteTransformer.balance_experts` after each step; None: biases stay.
    """

    def __init__(self, balance_rate: float | None) -> None:
        self.balance_rate = balance_rate
        self._load: torch.Tensor | None = None

    def remember(self, expert_load: torch.Tensor) -> None:
        """[layers with experts, E] of one of the batches of this step."""
        self._load = expert_load.clone() if self._load is None else self._load + expert_load

    def on_step_begin(self, args: Any, state: Any, control: Any, *, model: Any, **_: Any) -> None:
        model.set_training_step(state.global_step)
        self._load = None

    def on_step_end(self, args: Any, state: Any, control: Any, *, model: Any, **_: Any) -> None:
        if self.balance_rate is not None and self._load is not None:
            model.balance_experts(sum_over_ranks(self._load), self.balance_rate)
