"""Runs a training from its settings: from the data to the finished model."""

import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from rich.console import Console
from transformers import EarlyStoppingCallback, TrainerCallback, set_seed
from transformers.utils import logging as transformers_logging

from stellarbyte.checkpoint.hugging_face.tokenizer import read_tokenizer
from stellarbyte.checkpoint.info import TrainingRecord
from stellarbyte.checkpoint.native import open_checkpoint
from stellarbyte.checkpoint.source import resolve_model
from stellarbyte.checkpoint.staging import refuse_existing, staged_folder
from stellarbyte.checkpoint.weights_hash import states_of, weights_hash
from stellarbyte.lora import save_adapter
from stellarbyte.model.transformer import ByteTransformer
from stellarbyte.train.arguments import Schedule, schedule, training_arguments
from stellarbyte.train.callbacks.divergence import Divergence
from stellarbyte.train.callbacks.ema import Ema
from stellarbyte.train.callbacks.guard import Guard
from stellarbyte.train.callbacks.progress import ProgressBar
from stellarbyte.train.callbacks.routers import Routers
from stellarbyte.train.card import versions, write_card
from stellarbyte.train.checkpoints import Checkpoints
from stellarbyte.train.config.run import LoraRun, Pretrain, Sft
from stellarbyte.train.data.folder_lock import sole_writer
from stellarbyte.train.errors import TrainError
from stellarbyte.train.metrics import flops_per_token, peak_flops
from stellarbyte.train.models import make_model, model_config
from stellarbyte.train.parallel.layout import Layout, layout_of, refuse_undivided
from stellarbyte.train.parallel.messages import each_warning_once
from stellarbyte.train.parallel.sharding import fill, gathered_weights, shard
from stellarbyte.train.plots import draw_run
from stellarbyte.train.ranks import is_first_rank, rank_expected, ranks_expected, wait_for_all
from stellarbyte.train.rows import RunData, ShiftedRows, num_rows
from stellarbyte.train.trainer import ByteTrainer

_METRICS = ("eval_loss", "eval_perplexity", "eval_bits_per_byte", "eval_tokens")
MODEL_FOLDER, ADAPTER_FOLDER = "model", "adapter"  # in the run's folder, where it names no output

Config = Pretrain | Sft | LoraRun


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Attributes: folder: of the finished model or adapter; None: the run was stopped by the signal `number`."""

    folder: Path | None
    step: int
    number: int | None = None


@each_warning_once()
def train(
    kind: str,
    config: Config,
    data: RunData,
    *,
    resume: bool,
    console: Console,
    callbacks: Sequence[TrainerCallback] = (),
    compare: Callable[[ByteTrainer], Mapping[str, float]] | None = None,
) -> Outcome:
    """Train to the last step, or until a signal; every rank calls it.

    `callbacks` see the run; with train.evaluate_base, the first evaluation comes before the run begins.
    `compare` gives more figures for the card, once the last step is done.

    Raises:
        TrainError, CheckpointError: a setting does not fit the data or the machine, a checkpoint is of another run, a
            step would not be finite, or a file cannot be written.
    """
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message=".*lr_scheduler.step.*")
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    _refuse_unmeasured(config, data)
    layout = layout_of(config.parallel, ranks_expected())
    refuse_undivided(model_config(config, data), layout.tensor)
    plan = plan_of(config, data, layout)
    folder = config.run.dir
    target = config.run.output
    if target is None:
        target = folder / (ADAPTER_FOLDER if kind == "lora" else MODEL_FOLDER)
    refuse_existing(target)
    with sole_writer(folder, "training into") if rank_expected() == 0 else nullcontext():
        trainer, guard = make_trainer(kind, config, data, plan, layout, console, callbacks)
        last = trainer.checkpoints.last()
        if last is not None:
            if not resume:
                raise TrainError(f"{folder} has {last.name}; continue with --resume, or give another run.dir.")
            trainer.checkpoints.refuse_other_origin(last)
            if is_first_rank():
                console.print(_continuing(trainer.checkpoints, last))
        base = trainer.evaluate() if config.train.evaluate_base else None  # an adapter begins as no change
        try:
            trainer.train(resume_from_checkpoint=None if last is None else str(last))
        finally:
            guard.restore()
            _progress_bar(trainer).close()
        if guard.stopped:
            return Outcome(folder=None, step=trainer.state.global_step, number=guard.number or signal.SIGTERM)
        if trainer.ema is not None:
            trainer.ema.put_into_model()
        if data.held_out is not None and not _evaluated_last(trainer):
            trainer.evaluate()
        compared = {} if compare is None else compare(trainer)
        wait_for_all()
        weights = gathered_weights(trainer.model) if layout.is_sharded else None
        if is_first_rank():
            model = trainer.model if weights is None else _whole_model(config, data, weights)
            _write_result(kind, config, data, trainer, model, target, base, compared)
            if config.run.plots:
                draw_run(trainer.state.log_history, folder)
        wait_for_all()
        return Outcome(folder=target, step=trainer.state.global_step)


def plan_of(config: Config, data: RunData, layout: Layout) -> Schedule:
    """Rows and steps on these ranks. Raises TrainError."""
    rows = num_rows(data.train)
    return schedule(config.train, sequence=config.data.sequence, rows=rows, ranks=layout.data_ranks)


def _continuing(checkpoints: Checkpoints, last: Path) -> str:
    before, now = checkpoints.layout_in(last), checkpoints.layout
    if before == now:
        return f"Continuing after {last.name}."
    return f"Continuing after {last.name}, which {before} made, on {now}: with the same rows, and other dropout."


def _whole_model(config: Config, data: RunData, weights: Mapping[str, torch.Tensor]) -> ByteTransformer:
    """The finished model of a sharded run, as it would be without."""
    model = make_model(config, data)
    for name, parameter in model.named_parameters():
        fill(parameter, weights[name])
    return model


def _refuse_unmeasured(config: Config, data: RunData) -> None:
    if data.held_out is None:
        for name, value in (
            ("stop.patience", config.stop.patience),
            ("train.evaluate_every", config.train.evaluate_every),
            ("train.evaluate_base", config.train.evaluate_base or None),
        ):
            if value is not None:
                raise TrainError(f"{name} needs held-out data, of which there is none; set held_out above 0.")


def make_trainer(
    kind: str,
    config: Config,
    data: RunData,
    plan: Schedule,
    layout: Layout,
    console: Console,
    watching: Sequence[TrainerCallback] = (),
) -> tuple[ByteTrainer, Guard]:
    settings = config.train
    _prepare_trackers(config.run.track)
    args = training_arguments(
        settings,
        config.stop,
        folder=config.run.dir,
        seed=config.run.seed,
        track=config.run.track,
        workers=config.data.workers,
        plan=plan,
        evaluates=data.held_out is not None,
    )
    set_seed(config.run.seed)
    model = make_model(config, data)
    num_active = num_active_parameters(model)
    device = args.device  # the ranks find each other
    if settings.compile:
        model.model.rotary.reserve(config.data.sequence, device)
    if layout.is_sharded:
        shard(model, layout, device)
    guard = Guard()
    peak = peak_flops(device)
    progress = ProgressBar(
        console,
        batch_tokens=settings.batch_tokens,
        flops_per_token=flops_per_token(model.config, num_active, config.data.sequence),
        peak_flops=None if peak is None else peak * args.world_size,
    )
    callbacks = [guard, progress, *watching]
    if model.config.num_experts:
        callbacks.append(Routers(settings.balance_rate))
    if config.stop.patience is not None:
        callbacks.append(EarlyStoppingCallback(config.stop.patience))
    shift = config.data.position_shift
    origin = {
        "data": data.fingerprint,
        "sequence": config.data.sequence,
        "packing": config.data.packing,
        "position_shift": shift,
        "batch_tokens": settings.batch_tokens,
        "seed": config.run.seed,
    }
    trainer = ByteTrainer(
        model,
        args,
        data,
        settings,
        Checkpoints(config.run.dir, origin, layout),
        layout,
        rows=ShiftedRows(data.train, largest=shift, seed=config.run.seed) if shift else data.train,
        batch_rows=plan.batch_rows,
        ema=None if settings.ema is None else Ema(model, settings.ema),
        divergence=Divergence(config.run.dir) if config.stop.nan else None,
        callbacks=callbacks,
        saves_only_trained=kind == "lora",
    )
    if data_rank := layout.data_rank(args.process_index):  # the weights are alike on all ranks; dropout is not
        set_seed(config.run.seed + data_rank)
    return trainer, guard


def _progress_bar(trainer: ByteTrainer) -> ProgressBar:
    return next(each for each in trainer.callback_handler.callbacks if isinstance(each, ProgressBar))


def _prepare_trackers(names: Sequence[str]) -> None:
    for name in names:
        if find_spec(name) is None:
            command = f"{sys.executable} -m pip install {name}"
            raise TrainError(f"run.track names {name}, which is not installed: {command}.")
    os.environ.setdefault("SWANLAB_MODE", "local")  # to its cloud only if the user says so


def num_active_parameters(model: ByteTransformer) -> int:
    """Parameters that one token uses at most: not those of experts that it does not choose."""
    config = model.config
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    used = config.num_experts_per_tok / config.num_experts if config.num_experts else 0
    return int(sum(p.numel() for p in model.parameters()) - experts * (1 - used))


def _evaluated_last(trainer: ByteTrainer) -> bool:
    """Whether the weights are those of the last evaluation: it came after the last step, and they were not changed."""
    if trainer.ema is not None or trainer.state.best_model_checkpoint is not None:
        return False
    evaluated = [entry["step"] for entry in trainer.state.log_history if "eval_loss" in entry]
    return bool(evaluated) and evaluated[-1] == trainer.state.global_step


def _write_result(
    kind: str,
    config: Config,
    data: RunData,
    trainer: ByteTrainer,
    model: ByteTransformer,
    target: Path,
    base: Mapping[str, float] | None,
    compared: Mapping[str, float],
) -> None:
    history = trainer.state.log_history
    losses = [entry["loss"] for entry in history if "loss" in entry]
    evaluations = [entry for entry in history if "eval_loss" in entry]
    held_out = {name: evaluations[-1][name] for name in evaluations[-1] if name in _METRICS} if evaluations else {}
    if base is not None:
        held_out |= {f"base_{name.removeprefix('eval_')}": base[name] for name in ("eval_loss", "eval_perplexity")}
    held_out |= compared
    steps = trainer.state.global_step
    record = TrainingRecord(
        kind=kind,
        base=config.model.path,
        base_sha256=None if config.model.path is None else _hash_of(config.model.path),
        data_sha256=data.fingerprint,
        licenses=data.licenses,
        tokens=steps * config.train.batch_tokens,
        steps=steps,
        epochs=steps * trainer.batch_rows / num_rows(data.train),
        loss=losses[-1],
        tokens_per_s=_progress_bar(trainer).tokens_per_second,
        held_out=held_out,
        settings=config.model_dump(mode="json", exclude_unset=True),
        versions=versions(),
    )
    with staged_folder(target) as staging:
        if kind == "lora":
            save_adapter(model, staging)
        else:
            model.save_pretrained(staging)
            read_tokenizer(data.tokenizer).write(staging)
        write_card(record, staging, name=config.run.dir.name)


def _hash_of(path: str) -> str:
    """Of a model's weights, as the server shows it."""
    return weights_hash(states_of(open_checkpoint(resolve_model(path)).files))
