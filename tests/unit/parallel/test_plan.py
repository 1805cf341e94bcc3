"""`stellarbyte info --plan`: its arithmetic is what ranks of a real model take."""

import json
from pathlib import Path
from typing import Any

import pytest

from stellarbyte.checkpoint.info import kept_tokens
from stellarbyte.cli.main import main
from stellarbyte.parallel.plan import plan_ranks
from tests.support.engines.engine import ModelEngine, make_request
from tests.support.engines.ranks import RanksInThreads
from tests.support.models.byte_transformer import EXPERT_VARIANTS, make_config, make_model

UNEVEN = {"num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True}


@pytest.mark.parametrize(
    ("changes", "ranks"),
    [(UNEVEN, 2), ({"num_key_value_heads": 1, "attention_output_bias": True}, 4),
     (EXPERT_VARIANTS["experts, shared with a gate, some layers dense"], 2)],
)  # fmt: skip
def test_planned_bytes_are_those_that_the_first_rank_takes(changes: dict[str, Any], ranks: int) -> None:
    model = make_model(**changes)
    engine = ModelEngine(model, backend=lambda *told: RanksInThreads(*told, ranks=ranks))
    engine.generate([make_request([1, 2, 3], 2)])
    divided = engine.executor.model
    assert isinstance(divided, RanksInThreads)
    measured = []
    for served, cache in zip(divided.models, divided.caches, strict=True):
        weights = {p.data_ptr(): p.nbytes for p in served.model.parameters()}
        tokens = cache.keys_LBSKD.shape[1] * cache.block_size
        measured.append((sum(weights.values()), (cache.keys_LBSKD.nbytes + cache.values_LBSKD.nbytes) // tokens))
    plans = plan_ranks(model.config, 100, devices=ranks)
    (plan,) = [plan for plan in plans if (plan.ranks, plan.dtype) == (ranks, "float32")]
    assert (plan.weight_bytes, plan.kv_bytes_per_token) == measured[0]
    assert all(weights <= plan.weight_bytes and kv <= plan.kv_bytes_per_token for weights, kv in measured)
    assert plan.cache_bytes is None and plan.replicas == 1


def test_the_memory_is_divided_into_weights_and_cache() -> None:
    config = make_config(num_attention_heads=8, num_key_value_heads=8, sliding_window=40, sink_tokens=8)
    assert kept_tokens(config) == 48
    plans = [plan for plan in plan_ranks(config, 48, devices=8, memory=10**6) if plan.dtype == "bfloat16"]
    assert [(plan.ranks, plan.replicas) for plan in plans] == [(n, 8 // n) for n in range(1, 9)]
    for plan in plans:
        assert plan.cache_bytes == 900_000 - plan.weight_bytes
        assert plan.cache_tokens == plan.cache_bytes // plan.kv_bytes_per_token
        assert plan.full_sequences == plan.cache_tokens / 48
    assert plan_ranks(config, 48, memory=1000)[0].cache_tokens == 0


def test_the_command_needs_a_config_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_config().save_pretrained(tmp_path)
    flags = ["info", str(tmp_path), "--plan", "--memory", "1.5GiB", "--gpus", "4"]
    assert main([*flags, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["memory"] == 3 * 2**29
    assert {(plan["dtype"], plan["ranks"], plan["replicas"]) for plan in told["plans"]} == {
        (dtype, ranks, 4 // ranks) for dtype in ("bfloat16", "float32") for ranks in (1, 2, 4)
    }
    assert main(flags) == 0
    text = capsys.readouterr().out
    assert "4 × 1.5 GiB" in text and "not run on several GPUs yet" in text
    assert main(["info", str(tmp_path), "--gpus", "2"]) == 1
    assert capsys.readouterr().err == "error: --memory and --gpus need --plan.\n"


@pytest.mark.parametrize("memory", ["80", "many", "80gb", "-1GB"])
def test_impossible_memory_is_refused(memory: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["info", "x", "--plan", f"--memory={memory}"])
    assert "must be a number of bytes with a unit" in capsys.readouterr().err
