"""transformers' Trainer for a ByteTransformer: losses without logits, exact resumption, whole checkpoints."""

import os
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import DataLoader, Subset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainingArguments
from transformers.trainer_callback import ExportableState

from stellarbyte.train.callbacks.divergence import Divergence
from stellarbyte.train.callbacks.ema import Ema
from stellarbyte.train.callbacks.guard import leave_signals_to_the_parent
from stellarbyte.train.callbacks.routers import Routers
from stellarbyte.train.checkpoints import Checkpoints
from stellarbyte.train.config.run import Train
from stellarbyte.train.metrics import held_out_loss
from stellarbyte.train.optimizers import make_optimizer
from stellarbyte.train.rows import RunData, ShuffledStream, num_rows

TRAINED_FILE = "model.safetensors"  # of a checkpoint whose model has frozen weights: the trained ones
STATE_FILE = "trainer_state.json"


class ByteTrainer(Trainer):
    """Trains as `arguments.training_arguments` says, on `batch_rows` rows a step.

    Every row of every batch is decided by the data and the seed alone, so that a run that continues from a checkpoint
    computes the numbers of one that was never interrupted.

    Args:
        ema, divergence: None: not wanted.
        saves_only_trained: checkpoints hold the trainable parameters, as of an adapter, and not the frozen ones.
    """

    optimizer: torch.optim.Optimizer | None
    control: TrainerControl

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        data: RunData,
        settings: Train,
        checkpoints: Checkpoints,
        *,
        batch_rows: int,
        ema: Ema | None,
        divergence: Divergence | None,
        callbacks: list[TrainerCallback],
        saves_only_trained: bool,
    ) -> None:
        self.data = data
        self.settings = settings
        self.checkpoints = checkpoints
        self.batch_rows = batch_rows
        self.ema = ema
        self.divergence = divergence
        self.saves_only_trained = saves_only_trained
        self.routers = next((callback for callback in callbacks if isinstance(callback, Routers)), None)
        own = [callback for callback in (divergence, ema) if callback is not None]
        super().__init__(
            model=model,
            args=args,
            data_collator=data.collate,
            train_dataset=data.train,
            eval_dataset=data.held_out,
            callbacks=[*own, *callbacks],
        )
        self.remove_callback(PrinterCallback)

    def _get_train_sampler(self, train_dataset: Any = None) -> ShuffledStream:
        length = self.args.max_steps * self.batch_rows
        return ShuffledStream(num_rows(self.data.train), length, self.args.seed)

    def get_train_dataloader(self) -> DataLoader[Any]:
        loader = super().get_train_dataloader()
        loader.worker_init_fn = leave_signals_to_the_parent  # rows are not random: workers need no seeds
        return loader

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            self.optimizer = make_optimizer(self.model if model is None else model, self.settings)
        return self.optimizer

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        inputs = {**inputs, "skip_logits": True, "smoothing": self.settings.label_smoothing}
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if self.routers is not None:
            self.routers.remember(outputs["expert_load"])
        return (loss, outputs) if return_outputs else loss

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        loss: torch.Tensor = super().training_step(model, inputs, num_items_in_batch)
        if self.divergence is not None:
            self.divergence.remember(inputs, loss)
        return loss

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Loss, perplexity and bits per byte of the held-out rows, summed over tokens; each rank takes its share."""
        dataset: Any = self.data.held_out if eval_dataset is None else eval_dataset
        start = time.perf_counter()
        rows = range(self.args.process_index, num_rows(dataset), self.args.world_size)
        loader = DataLoader(
            Subset(dataset, rows),
            batch_size=self.args.eval_batch_size,
            collate_fn=self.data.collate,
            generator=torch.Generator(),  # otherwise an evaluation would change the dropout of later steps
        )
        found = held_out_loss(
            self.model,
            loader,
            self.args.device,
            bytes_per_token=self.data.bytes_per_token,
            autocast=self.accelerator.autocast(),
        )
        metrics = found.as_metrics() | {"eval_runtime": time.perf_counter() - start}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if not self.saves_only_trained:
            super().save_model(output_dir, _internal_call)
        elif self.args.should_save:
            folder = Path(self.args.output_dir if output_dir is None else output_dir)
            trained = {n: p.detach().cpu().contiguous() for n, p in self.model.named_parameters() if p.requires_grad}
            save_file(trained, folder / TRAINED_FILE)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """As transformers' own, but into a folder that gets its name when it is complete."""
        self.store_flos()
        with self.checkpoints.staged(self.state.global_step) as folder:
            self.save_model(str(folder), _internal_call=True)
            self._save_optimizer_and_scheduler(str(folder))
            self._save_scaler(str(folder))
            self._save_rng_state(str(folder))
            if self.args.should_save:
                if self.ema is not None:
                    self.ema.save(folder)
                self._note_best()
                self._note_callbacks()
                self.state.save_to_json(str(folder / STATE_FILE))
        if self.args.should_save:
            self.checkpoints.remove_old(keep=self.settings.keep, best=self.state.best_model_checkpoint)

    def _note_best(self) -> None:
        if self.state.best_global_step:
            best = os.path.join(self.args.output_dir, f"checkpoint-{self.state.best_global_step}")
            if self.state.best_global_step == self.state.global_step or os.path.isdir(best):
                self.state.best_model_checkpoint = best

    def _note_callbacks(self) -> None:
        exportable = [c for c in (*self.callback_handler.callbacks, self.control) if isinstance(c, ExportableState)]
        self.state.stateful_callbacks = {type(callback).__name__: callback.state() for callback in exportable}

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.ema is not None:
            self.ema.load(Path(resume_from_checkpoint))
        if not self.saves_only_trained:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        self._load_trained(Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        best = Path(self.state.best_model_checkpoint)
        if self.ema is not None:
            self.ema.load(best)
        if self.saves_only_trained:
            self._load_trained(best)
        else:
            super()._load_best_model()

    @torch.no_grad()
    def _load_trained(self, folder: Path) -> None:
        found = load_file(folder / TRAINED_FILE)
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(found[name])

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Epochs are those of the data; to the Trainer, all steps are one epoch."""
        self.state.epoch = self.state.global_step * self.batch_rows / num_rows(self.data.train)
        super().log(logs, start_time)
