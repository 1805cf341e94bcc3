"""FlexAttention's compiled kernels, and a run in bfloat16 on the card."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from stellarbyte.train.config.run import Pretrain
from stellarbyte.train.launch import train
from tests.support.models.byte_transformer import VARIANTS, make_model, random_tokens
from tests.support.training.rows import run_data

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device here"),
]

TOKENS = torch.tensor([random_tokens(200), random_tokens(200, seed=1)])
DOCUMENTS = torch.tensor([[0] * 77 + [1] * 100 + [2] * 23, [0] * 200])


@pytest.mark.parametrize("variant", ["mistral", "qwen2", "xpos window sinks", "norms before and after"])
@pytest.mark.parametrize("packed", [False, True])
def test_flex_attention_has_the_loss_and_gradients_of_eager_attention(variant: str, packed: bool) -> None:
    found = []
    for implementation in ("eager", "flex_attention"):
        model = make_model(attn_implementation=implementation, **VARIANTS[variant]).cuda().train()
        arguments: dict[str, Any] = {"document_ids": DOCUMENTS.cuda()} if packed else {}
        loss = model(TOKENS.cuda(), labels=TOKENS.cuda(), **arguments).loss
        loss.backward()
        found.append([loss.detach(), *(parameter.grad for parameter in model.parameters())])
    for ours, reference in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(ours, reference, atol=2e-4, rtol=1e-3)


def test_a_windows_mask_of_all_pairs_is_never_in_memory() -> None:
    model = (
        make_model(attn_implementation="flex_attention", **VARIANTS["mistral"], max_position_embeddings=16384)
        .cuda()
        .train()
    )
    tokens = torch.tensor([random_tokens(16384)], device="cuda")
    torch.compiler.reset()  # of a function that was compiled many times before, torch computes the rest uncompiled
    model(tokens, labels=tokens, skip_logits=True).loss.backward()  # compiles
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    model(tokens, labels=tokens, skip_logits=True).loss.backward()
    one_float_mask = 16384 * 16384 * 4
    assert torch.cuda.max_memory_allocated() - before < one_float_mask


@pytest.mark.parametrize("compiles", [False, True])
def test_a_run_in_bfloat16_learns(tmp_path: Path, compiles: bool) -> None:
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
    settings = {
        "batch_tokens": 192,
        "micro_batch": 4,
        "epochs": 30,
        "lr": 0.01,
        "precision": "bf16",
        "compile": compiles,
        "checkpoint_every": 20,
    }
    config = Pretrain.model_validate(
        {
            "run": {"dir": str(tmp_path / "run"), "plots": False},
            "model": shape | {"sliding_window": 12, "sink_tokens": 2},
            "data": {"shards": str(tmp_path), "sequence": 24},
            "train": settings | {"ema": 0.5, "optimizer": "muon"},
        }
    )
    data = run_data(tmp_path, num_rows=16)
    console = Console(file=io.StringIO())
    assert train("pretrain", config, data, resume=False, console=console).folder is not None
    newest = max((tmp_path / "run").glob("checkpoint-*"), key=lambda path: path.stat().st_mtime)
    history = json.loads((newest / "trainer_state.json").read_text())["log_history"]
    losses = [entry["loss"] for entry in history if "loss" in entry]
    assert losses[-1] < 0.5 * losses[0]
