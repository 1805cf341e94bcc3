"""From the settings of a run to transformers' TrainingArguments, and the counts of rows and steps."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import TrainingArguments

from stellarbyte.train.config.run import Stop, Train
from stellarbyte.train.errors import TrainError


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Attributes: batch_rows: of one step, on all ranks; accumulated: batches of a rank in a step; num_steps."""

    batch_rows: int
    accumulated: int
    num_steps: int


def schedule(settings: Train, *, sequence: int, rows: int, ranks: int) -> Schedule:
    """How `rows` rows of `sequence` tokens become steps.

    Raises:
        TrainError: batch_tokens is no multiple of a forward on every rank, or larger than all epochs.
    """
    of_all_ranks = settings.micro_batch * sequence * ranks
    if settings.batch_tokens % of_all_ranks:
        ranked = f"×{ranks} (micro_batch × sequence × ranks)" if ranks > 1 else " (micro_batch × sequence)"
        raise TrainError(
            f"train.batch_tokens {settings.batch_tokens} is not a multiple of "
            f"{settings.micro_batch}×{sequence}{ranked}."
        )
    batch_rows = settings.batch_tokens // sequence
    num_steps = int(settings.epochs * rows / batch_rows)
    if num_steps == 0:
        raise TrainError(
            f"The data has {rows:,} rows of {sequence} tokens: {settings.epochs:g} epochs are less than one step of "
            f"{batch_rows:,} rows; make train.batch_tokens smaller."
        )
    if settings.warmup >= num_steps:
        raise TrainError(f"train.warmup ({settings.warmup}) must be less than the {num_steps} steps of the run.")
    return Schedule(batch_rows=batch_rows, accumulated=settings.batch_tokens // of_all_ranks, num_steps=num_steps)


def training_arguments(
    settings: Train,
    stop: Stop,
    *,
    folder: Path,
    seed: int,
    track: Sequence[str],
    workers: int,
    plan: Schedule,
    evaluates: bool,
) -> TrainingArguments:
    """Every step is logged: a run that continues then has the losses of one that was not interrupted."""
    every = {"eval": settings.evaluate_every, "save": settings.checkpoint_every}
    if not evaluates:
        every["eval"] = None
    keeps_best = stop.patience is not None
    scheduler = {"num_cycles": settings.cycles} if settings.schedule == "cosine_with_restarts" else None
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=plan.num_steps,
        per_device_train_batch_size=settings.micro_batch,
        per_device_eval_batch_size=settings.micro_batch,
        gradient_accumulation_steps=plan.accumulated,
        average_tokens_across_devices=True,
        learning_rate=settings.lr,
        lr_scheduler_type="constant_with_warmup" if settings.schedule == "constant" else settings.schedule,
        lr_scheduler_kwargs=scheduler,
        warmup_steps=settings.warmup,
        max_grad_norm=settings.clip,
        seed=seed,
        data_seed=seed,
        bf16=settings.precision == "bf16",
        tf32=settings.precision != "fp32" if torch.cuda.is_available() else None,
        torch_compile=settings.compile,
        eval_strategy="no" if every["eval"] is None else "steps",
        eval_steps=every["eval"],
        save_strategy="no" if every["save"] is None else "steps",
        save_steps=500 if every["save"] is None else every["save"],
        load_best_model_at_end=keeps_best,
        metric_for_best_model="eval_loss" if keeps_best else None,
        greater_is_better=False if keeps_best else None,
        restore_callback_states_from_checkpoint=True,
        logging_strategy="steps",
        logging_steps=1,
        logging_nan_inf_filter=False,
        report_to=list(track),
        disable_tqdm=True,
        log_level="error",
        remove_unused_columns=False,
        dataloader_num_workers=workers,
        dataloader_persistent_workers=workers > 0,
        dataloader_pin_memory=torch.cuda.is_available(),
        ddp_find_unused_parameters=False,
        ddp_broadcast_buffers=False,
        use_cpu=not torch.cuda.is_available(),
    )
