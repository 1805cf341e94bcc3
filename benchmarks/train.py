"""Training on one device: tokens per second, share of its peak, memory, and what transformers' Trainer costs.

    python -m benchmarks.train                                    a 110M model at 1,024 tokens, bf16; needs a GPU
    python -m benchmarks.train --only dense packed --steps 20
    torchrun --nproc-per-node 2 -m benchmarks.train --only ddp fsdp    several devices
    python -m benchmarks.train --shape tiny --no-record               tries it on a CPU

Rows are random tokens: the speed does not depend on them. Time counts from one optimizer step to another, logging and
guards included, after the steps that compile.
"""

import argparse
import contextlib
import io
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch.utils.data import Dataset
from transformers import TrainerCallback

from benchmarks.support.record import write_result
from stellarbyte.train.config.run import Pretrain
from stellarbyte.train.data.packing import Batch, collate, packed_row
from stellarbyte.train.launch import make_trainer, num_active_parameters, plan_of
from stellarbyte.train.metrics import flops_per_token, peak_flops
from stellarbyte.train.models import make_model
from stellarbyte.train.optimizers import make_optimizer
from stellarbyte.train.parallel.layout import layout_of
from stellarbyte.train.ranks import ranks_expected
from stellarbyte.train.rows import RunData

SHAPES: dict[str, dict[str, Any]] = {
    "110m": {
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "tie_word_embeddings": True,
        "use_xpos": False,
        "max_position_embeddings": 1024,
    },
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "tie_word_embeddings": True,
        "use_xpos": False,
        "max_position_embeddings": 1024,
    },
}
VOCABULARY = {"110m": 32768, "tiny": 512}
NATIVE = {"use_xpos": True, "sliding_window": 256, "sink_tokens": 4, "qk_norm": True}


class RandomRows(Dataset[Batch]):
    """Rows of random tokens in documents of `document` tokens."""

    def __init__(self, num_rows: int, sequence: int, document: int, vocabulary: int) -> None:
        self.num_rows, self.sequence, self.document, self.vocabulary = num_rows, sequence, document, vocabulary

    def __len__(self) -> int:
        return self.num_rows

    def __getitem__(self, row: int) -> Batch:
        generator = torch.Generator().manual_seed(row)
        ids = torch.randint(self.vocabulary, (self.sequence,), generator=generator).numpy()
        documents = [ids[start : start + self.document] for start in range(0, self.sequence, self.document)]
        return packed_row([(document, document) for document in documents], self.sequence, 0)


class StepTimes(TrainerCallback):
    """Seconds between the ends of steps, and the most memory of the device."""

    def __init__(self, skipped: int) -> None:
        self.skipped = skipped
        self.ends_s: list[float] = []

    def on_step_end(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
        wait()
        if state.global_step == self.skipped and torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        if state.global_step >= self.skipped:
            self.ends_s.append(time.perf_counter())

    @property
    def median_s(self) -> float:
        return statistics.median(b - a for a, b in zip(self.ends_s, self.ends_s[1:], strict=False))


def variants(shape: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """By name: fields of the model, tokens of a document, changed settings."""
    half = {"moe_intermediate_size": shape["intermediate_size"] // 2, "num_experts": 8, "num_experts_per_tok": 2}
    return {
        "dense": {},
        "muon": {"train": {"optimizer": "muon"}},
        "packed": {"document": 256},
        "native": {"document": 256, "model": NATIVE},
        "moe": {"model": half},
        "recompute": {"train": {"recompute_every": 1}},
        "not compiled": {"train": {"compile": False}},
    }


def config_of(options: argparse.Namespace, variant: dict[str, Any], folder: Path) -> Pretrain:
    settings = {
        "batch_tokens": options.batch_tokens,
        "micro_batch": options.micro_batch,
        "epochs": 1.0,
        "lr": 1e-4,
        "precision": "bf16",
        "compile": True,
    }
    return Pretrain.model_validate(
        {
            "run": {"dir": str(folder), "plots": False},
            "model": SHAPES[options.shape] | variant.get("model", {}),
            "data": {"shards": str(folder), "sequence": options.sequence, "workers": 2},
            "train": settings | variant.get("train", {}),
            "parallel": variant.get("parallel", {}),
        }
    )


def data_of(options: argparse.Namespace, variant: dict[str, Any], folder: Path) -> RunData:
    vocabulary = VOCABULARY[options.shape]
    rows = (options.steps + options.skipped) * options.batch_tokens // options.sequence
    return RunData(
        train=RandomRows(rows, options.sequence, variant.get("document", options.sequence), vocabulary),
        held_out=None,
        collate=collate,
        fingerprint="0" * 64,
        licenses=(),
        bytes_per_token=None,
        tokenizer=folder,
        vocab_size=vocabulary,
        special_ids={"pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1},
    )


def measure(options: argparse.Namespace, variant: dict[str, Any]) -> dict[str, float]:
    """A run by the Trainer, as `stellarbyte train pretrain` makes it."""
    with tempfile.TemporaryDirectory() as name:
        config, data = config_of(options, variant, Path(name)), data_of(options, variant, Path(name))
        layout = layout_of(config.parallel, ranks_expected())
        plan = plan_of(config, data, layout)
        trainer, _guard = make_trainer("pretrain", config, data, plan, layout, Console(file=io.StringIO()))
        if "attention" in variant:
            trainer.model.config._attn_implementation = variant["attention"]
        times = StepTimes(options.skipped)
        trainer.add_callback(times)
        trainer._save_checkpoint = lambda *_: None  # a checkpoint of the end is not what is measured
        trainer.train()
        model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
        return figures(options, model, times.median_s, trainer.args.world_size)


def measure_loop(options: argparse.Namespace, variant: dict[str, Any]) -> dict[str, float]:
    """The same steps by the shortest loop: forward, backward, clip, step. No logs, no guards, no loader."""
    with tempfile.TemporaryDirectory() as name:
        config, data = config_of(options, variant, Path(name)), data_of(options, variant, Path(name))
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model = make_model(config, data).to(device).train()
        model.model.rotary.reserve(options.sequence, device)
        optimizer = make_optimizer(model, config.train)
        compiled: Any = torch.compile(model) if config.train.compile else model
        layout = layout_of(config.parallel, ranks_expected())
        plan = plan_of(config, data, layout)
        batch: Any = data.collate([data.train[row] for row in range(config.train.micro_batch)])
        batch = {key: tensor.to(device) for key, tensor in batch.items()}
        tokens = config.train.batch_tokens
        times = []
        torch.set_float32_matmul_precision("high")
        for step in range(options.skipped + options.steps):
            if step == options.skipped and torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            wait()
            start = time.perf_counter()
            for _ in range(plan.accumulated):
                with torch.autocast(device.type, torch.bfloat16):
                    loss = compiled(**batch, skip_logits=True, num_items_in_batch=tokens).loss
                loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            wait()
            times.append(time.perf_counter() - start)
        return figures(options, model, statistics.median(times[options.skipped :]), 1)


def loss_memory(options: argparse.Namespace) -> dict[str, float]:
    """The most memory of one forward and backward pass with the logits of all tokens, and without."""
    with tempfile.TemporaryDirectory() as name:
        config, data = config_of(options, {}, Path(name)), data_of(options, {}, Path(name))
        model = make_model(config, data).cuda().train()
        batch: Any = data.collate([data.train[row] for row in range(config.train.micro_batch)])
        batch = {key: tensor.cuda() for key, tensor in batch.items()}
        found = {}
        for label, skips in (("with all logits", False), ("without", True)):
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            with torch.autocast("cuda", torch.bfloat16):
                loss = model(**batch, skip_logits=skips).loss
            loss.backward()
            found[label] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
            model.zero_grad()
            del loss
        return {f"peak GiB {label}": value for label, value in found.items()}


def figures(options: argparse.Namespace, model: Any, step_s: float, ranks: int) -> dict[str, float]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    active = num_active_parameters(model)
    per_token = flops_per_token(model.config, active, options.sequence)
    tok_s = options.batch_tokens / step_s
    found = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "active": active,
        "step_ms": round(step_s * 1000, 2),
        "tok_s": round(tok_s),
    }
    if (peak := peak_flops(device)) is not None:
        found["mfu"] = round(tok_s * per_token / (peak * ranks), 4)
        found["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    return found


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=list(SHAPES), default="110m")
    parser.add_argument("--sequence", type=int, default=1024)
    parser.add_argument("--batch-tokens", type=int, default=524288)
    parser.add_argument("--micro-batch", type=int, default=64, help="rows of one forward")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--skipped", type=int, default=4, help="steps before the measured ones: they compile")
    parser.add_argument("--only", nargs="+", help="names of variants")
    parser.add_argument("--no-record", action="store_true", help="print only")
    options = parser.parse_args()
    if_named: dict[str, dict[str, Any]] = {  # need several ranks, or minutes to compile
        "ddp": {},
        "fsdp": {"parallel": {"fsdp": int(os.environ.get("WORLD_SIZE", "1"))}},
        "packed flex": {"document": 256, "attention": "flex_attention"},
        "native flex": {"document": 256, "model": NATIVE, "attention": "flex_attention"},
    }
    known = variants(SHAPES[options.shape])
    runs: dict[str, dict[str, float]] = {}
    for name in options.only or [*known, "loop", "loss"]:
        torch.compiler.reset()
        if name == "loop":
            runs[name] = measure_loop(options, {})
        elif name == "loss":
            runs[name] = loss_memory(options) if torch.cuda.is_available() else {}
        else:
            runs[name] = measure(options, (known | if_named)[name])
        if os.environ.get("RANK", "0") == "0":
            print(f"{name:>14}  {runs[name]}", flush=True)
    if os.environ.get("RANK", "0") == "0" and not options.no_record:
        settings = {key: getattr(options, key) for key in ("shape", "sequence", "batch_tokens", "micro_batch", "steps")}
        write_result("train", {"settings": settings, "ranks": int(os.environ.get("WORLD_SIZE", "1")), "runs": runs})
    with contextlib.suppress(Exception):
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
