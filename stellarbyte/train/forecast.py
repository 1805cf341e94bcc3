"""What a run would do: its steps, its memory, and its time by a measured step. Writes nothing."""

import contextlib
import resource
import time
from dataclasses import dataclass
from typing import Any

import torch

from stellarbyte.model.transformer import ByteTransformer
from stellarbyte.train.config.run import LoraRun, Pretrain, Sft
from stellarbyte.train.launch import num_active_parameters, plan_of
from stellarbyte.train.metrics import flops_per_token, peak_flops
from stellarbyte.train.models import make_model, model_config
from stellarbyte.train.optimizers import make_optimizer
from stellarbyte.train.parallel.layout import Layout, layout_of, refuse_undivided
from stellarbyte.train.ranks import ranks_expected
from stellarbyte.train.rows import RunData, num_rows

MEASURED = 2  # batches, after one that is not measured


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """Attributes: state_bytes: of weights, gradients, optimizer and averages; peak_bytes: measured, of the device or of
    the process; step_s: seconds of one step on one rank."""

    parameters: int
    trained_parameters: int
    rows: int
    epochs: float
    steps: int
    batch_tokens: int
    batch_rows: int
    accumulated: int
    state_bytes: int
    peak_bytes: int
    device: str
    layout: Layout
    step_s: float
    mfu: float | None

    @property
    def tokens(self) -> int:
        return self.steps * self.batch_tokens


def forecast(config: Pretrain | Sft | LoraRun, data: RunData) -> Forecast:
    """Raises TrainError and CheckpointError, as the run would."""
    layout = layout_of(config.parallel, max(ranks_expected(), config.parallel.fsdp * config.parallel.tensor))
    refuse_undivided(model_config(config, data), layout.tensor)
    plan = plan_of(config, data, layout)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(config.run.seed)
    model = make_model(config, data).to(device).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = make_optimizer(model, config.train)
    rows = [data.train[number % num_rows(data.train)] for number in range(config.train.micro_batch)]
    collated: Any = data.collate(rows)
    batch = {name: tensor.to(device) for name, tensor in collated.items()}
    is_half = config.train.precision == "bf16"
    context = torch.autocast(device.type, torch.bfloat16) if is_half else contextlib.nullcontext()
    seconds = []
    for _ in range(1 + MEASURED):
        start = time.perf_counter()
        with context:
            loss = model(**batch, skip_logits=True, smoothing=config.train.label_smoothing).loss
        loss.backward()
        _wait_for(device)
        seconds.append(time.perf_counter() - start)
    start = time.perf_counter()
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.step()
    _wait_for(device)
    step_s = plan.accumulated * min(seconds[1:]) + time.perf_counter() - start
    peak = peak_flops(device)
    flops = flops_per_token(model.config, num_active_parameters(model), config.data.sequence)
    per_rank = plan.accumulated * config.train.micro_batch * config.data.sequence
    return Forecast(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        trained_parameters=sum(parameter.numel() for parameter in trained),
        rows=num_rows(data.train),
        epochs=config.train.epochs,
        steps=plan.num_steps,
        batch_tokens=config.train.batch_tokens,
        batch_rows=plan.batch_rows,
        accumulated=plan.accumulated,
        state_bytes=_state_bytes(model, trained, optimizer, has_averages=config.train.ema is not None),
        peak_bytes=_peak_bytes(device),
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        layout=layout,
        step_s=step_s,
        mfu=None if peak is None else flops * per_rank / step_s / peak,
    )


def forecast_lines(found: Forecast) -> list[tuple[str, str]]:
    """The forecast as (label, text) for people."""
    size = found.batch_tokens
    accumulated = f", {found.accumulated} accumulated" if found.accumulated > 1 else ""
    speed = f"{found.step_s:.3g} s a step on one rank of {found.device}, {size / found.step_s:,.0f} tokens/s"
    lines = [
        ("parameters", f"{found.parameters:,}, of which {found.trained_parameters:,} are trained"),
        ("data", f"{found.rows:,} rows, {found.epochs:g} epochs"),
        ("batch", f"{size:,} tokens in {found.batch_rows:,} rows{accumulated}"),
        ("steps", f"{found.steps:,}, {found.tokens:,} tokens"),
        ("memory", f"{_gib(found.state_bytes)} of weights and optimizer, {_gib(found.peak_bytes)} at the peak"),
        ("speed", speed if found.mfu is None else f"{speed}, MFU {found.mfu:.1%}"),
        ("time", _duration(found.steps * found.step_s)),
    ]
    if found.layout.is_sharded:
        lines.append(("ranks", f"{found.layout}; memory and speed were measured on one that holds the whole model"))
    return lines


def _state_bytes(
    model: ByteTransformer, trained: list[torch.nn.Parameter], optimizer: torch.optim.Optimizer, *, has_averages: bool
) -> int:
    states = [state for inner in getattr(optimizer, "optimizers", (optimizer,)) for state in inner.state.values()]
    held = sum(value.nbytes for state in states for value in state.values() if torch.is_tensor(value))
    of_trained = sum(parameter.nbytes for parameter in trained)
    return sum(p.nbytes for p in model.parameters()) + of_trained * (2 if has_averages else 1) + held


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"


def _duration(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    minutes, left = divmod(rest, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {left} s" if minutes else f"{seconds:.1f} s"
