"""A finished adapter beside the model without it, and beside an adapter that it may replace."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader

from stellarbyte.lora import (
    AdapterError,
    activate_lora,
    deactivate_lora,
    load_adapter,
    remove_lora,
)
from stellarbyte.model.transformer import ByteTransformer
from stellarbyte.train.callbacks.report import Messages
from stellarbyte.train.job.exact_match import exact_match
from stellarbyte.train.metrics import held_out_loss
from stellarbyte.train.trainer import ByteTrainer

_TRAINED, _PREVIOUS = "default", "previous"  # names in the model


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Called with a trainer whose steps are done; leaves its model as it was.

    Attributes: previous: folder of the other adapter, in PEFT's layout, of any rank and on any layers; None: there is
    none. has_exact_match: also count the answers that each gives token for token.
    """

    messages: Messages
    previous: Path | None
    has_exact_match: bool

    def __call__(self, trainer: ByteTrainer) -> Mapping[str, float]:
        """The figures for the card: previous_loss, and each one's exact_match. They are also sent."""
        figures: dict[str, float] = {}
        if self.has_exact_match:
            figures["eval_exact_match"] = self._exact_match(trainer)
            deactivate_lora(trainer.model)
            figures["base_exact_match"] = self._exact_match(trainer)
            activate_lora(trainer.model, _TRAINED)
        if self.previous is not None:
            figures |= self._of_previous(trainer, self.previous)
        self.messages.send("compared", figures=figures)
        return figures

    def _of_previous(self, trainer: ByteTrainer, folder: Path) -> dict[str, float]:
        try:
            load_adapter(trainer.model, folder, _PREVIOUS)
        except (AdapterError, ValueError) as error:
            self.messages.send("warning", message=f"The version before cannot be evaluated: {error}")
            return {}
        loss = held_out_loss(
            trainer.model,
            _batches(trainer),
            trainer.args.device,
            bytes_per_token=None,
            autocast=trainer.accelerator.autocast(),
        )
        figures = {"previous_loss": loss.loss} if math.isfinite(loss.loss) else {}
        if self.has_exact_match:
            figures["previous_exact_match"] = self._exact_match(trainer)
        remove_lora(trainer.model, _PREVIOUS)
        activate_lora(trainer.model, _TRAINED)
        return figures

    @staticmethod
    def _exact_match(trainer: ByteTrainer) -> float:
        assert isinstance(trainer.model, ByteTransformer)
        return exact_match(
            trainer.model, _batches(trainer), trainer.args.device, autocast=trainer.accelerator.autocast()
        )


def _batches(trainer: ByteTrainer) -> DataLoader[Any]:
    """Of the held-out rows, as an evaluation reads them."""
    assert trainer.data.held_out is not None, "the job has a validation file"
    return DataLoader(trainer.data.held_out, batch_size=trainer.args.eval_batch_size, collate_fn=trainer.data.collate)
