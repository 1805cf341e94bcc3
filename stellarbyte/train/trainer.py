"""transformers' Trainer for a ByteTransformer: losses without logits, exact resumption, whole checkpoints."""

import os
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import DataLoader, Dataset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainingArguments, set_seed
from transformers.trainer_callback import ExportableState

from stellarbyte.train.callbacks.divergence import Divergence
from stellarbyte.train.callbacks.ema import Ema
from stellarbyte.train.callbacks.guard import leave_signals_to_the_parent
from stellarbyte.train.callbacks.routers import Routers
from stellarbyte.train.checkpoints import Checkpoints
from stellarbyte.train.config.run import Train
from stellarbyte.train.data.packing import Batch
from stellarbyte.train.metrics import held_out_loss
from stellarbyte.train.optimizers import make_optimizer
from stellarbyte.train.parallel.layout import Layout
from stellarbyte.train.parallel.sharding import (
    ShardedModel,
    clip_gradients,
    fill,
    gathered,
    gathered_weights,
    gradients_of,
    is_sharded,
    optimizer_part,
    release_gathered,
)
from stellarbyte.train.rows import RankBatches, RankRows, RunData, ShuffledStream, num_rows

WEIGHT_FILES = "model*.safetensors"  # of a checkpoint; where the model has frozen weights, they hold the trained ones
STATE_FILE, OPTIMIZER_FILE, SCHEDULER_FILE = "trainer_state.json", "optimizer.pt", "scheduler.pt"


class ByteTrainer(Trainer):
    """Trains as `arguments.training_arguments` says, on `batch_rows` rows a step.

    Every row of every batch is decided by the data and the seed alone, so that a run that continues from a checkpoint
    computes the numbers of one that was never interrupted. Checkpoints hold whole tensors, so that a run continues on
    any number of ranks.

    Args:
        model: sharded, if the layout is (`stellarbyte.train.parallel.sharding.shard`).
        rows: of data.train, in the form in which they are learned.
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
        layout: Layout,
        *,
        rows: Dataset[Batch],
        batch_rows: int,
        ema: Ema | None,
        divergence: Divergence | None,
        callbacks: list[TrainerCallback],
        saves_only_trained: bool,
    ) -> None:
        self.data = data
        self.rows = rows
        self.settings = settings
        self.checkpoints = checkpoints
        self.layout = layout
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
            train_dataset=self.rows,
            eval_dataset=data.held_out,
            callbacks=[*own, *callbacks],
        )
        self.remove_callback(PrinterCallback)

    @property
    def data_rank(self) -> int:
        return self.layout.data_rank(self.args.process_index)

    def get_train_dataloader(self) -> DataLoader[Any]:
        stream = ShuffledStream(num_rows(self.data.train), self.args.max_steps * self.batch_rows, self.args.seed)
        ranks = self.layout.data_ranks
        return DataLoader(
            self.rows,
            batch_sampler=RankBatches(stream, size=self.args.train_batch_size, rank=self.data_rank, ranks=ranks),
            collate_fn=self.data.collate,
            num_workers=self.args.dataloader_num_workers,
            persistent_workers=self.args.dataloader_persistent_workers,
            pin_memory=self.args.dataloader_pin_memory,
            worker_init_fn=leave_signals_to_the_parent,  # rows are not random: workers need no seeds
        )

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        if not is_sharded(model):  # its parts are there
            super()._move_model_to_device(model, device)

    def _wrap_model(self, model: nn.Module, training: bool = True, dataloader: Any = None) -> nn.Module:
        """As transformers' own. The Trainer has accelerate wrap what comes back unwrapped, in DDP."""
        if not is_sharded(model):
            wrapped: nn.Module = super()._wrap_model(model, training, dataloader)
            return wrapped
        return ShardedModel(model, torch.bfloat16 if self.args.bf16 else None)

    def _clip_grad_norm(self, model: nn.Module) -> torch.Tensor:
        if not is_sharded(self.model):
            norm: torch.Tensor = super()._clip_grad_norm(model)
            return norm
        return clip_gradients(gradients_of(model), self.args.max_grad_norm)

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
        loader = DataLoader(
            RankRows(dataset, rank=self.data_rank, ranks=self.layout.data_ranks),
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
            counts=self.layout.is_first_of_group(self.args.process_index),
        )
        release_gathered(self.model)
        metrics = found.as_metrics() | {"eval_runtime": time.perf_counter() - start}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        folder = Path(self.args.output_dir if output_dir is None else output_dir)
        if self.saves_only_trained:
            trained = gathered({name: p.detach() for name, p in self.model.named_parameters() if p.requires_grad})
            if self.args.should_save:
                tensors = {name: tensor.cpu().contiguous() for name, tensor in trained.items()}
                save_file(tensors, folder / "model.safetensors")
        elif is_sharded(self.model):
            weights = gathered_weights(self.model)
            if self.args.should_save:
                self.model.save_pretrained(folder, state_dict=weights)
        else:
            super().save_model(str(folder), _internal_call)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        state = gathered(self.optimizer.state_dict())  # type: ignore[union-attr]
        if self.args.should_save:
            torch.save(state, Path(output_dir) / OPTIMIZER_FILE)
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_FILE)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        assert self.optimizer is not None
        whole = torch.load(Path(checkpoint) / OPTIMIZER_FILE, map_location="cpu", weights_only=True, mmap=True)
        self.optimizer.load_state_dict(optimizer_part(whole, self.optimizer))
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_FILE, weights_only=True))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Of ranks that divide the run otherwise than those of the checkpoint: from the seed, the step and the rank."""
        if checkpoint is not None and self.checkpoints.layout_in(Path(checkpoint)) == self.layout:
            super()._load_rng_state(checkpoint)
        else:
            set_seed((self.args.seed + 1_000_003 * self.state.global_step + self.data_rank) % 2**32)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """As transformers' own, but into a folder that gets its name when it is complete."""
        self.store_flos()
        with self.checkpoints.staged(self.state.global_step) as folder:
            self.save_model(str(folder), _internal_call=True)
            self._save_optimizer_and_scheduler(str(folder))
            self._save_scaler(str(folder))
            self._save_rng_state(str(folder))
            if self.ema is not None:
                self.ema.save(folder)
            if self.args.should_save:
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
        self._load_weights(Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        best = Path(self.state.best_model_checkpoint)
        if self.ema is not None:
            self.ema.load(best)
        self._load_weights(best)

    def _load_weights(self, folder: Path) -> None:
        found = {name: tensor for file in folder.glob(WEIGHT_FILES) for name, tensor in load_file(file).items()}
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad or not self.saves_only_trained:
                fill(parameter, found[name])

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Epochs are those of the data; to the Trainer, all steps are one epoch."""
        self.state.epoch = self.state.global_step * self.batch_rows / num_rows(self.data.train)
        super().log(logs, start_time)
