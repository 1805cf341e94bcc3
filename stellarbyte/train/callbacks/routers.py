"""Tells the routers of a mixture of experts the number of the step."""

from typing import Any

from transformers import TrainerCallback


class Routers(TrainerCallback):
    """`router_top_p_steps` counts steps of the optimizer, also after a run was continued."""

    def on_step_begin(self, args: Any, state: Any, control: Any, *, model: Any, **_: Any) -> None:
        model.set_training_step(state.global_step)
