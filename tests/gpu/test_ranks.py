"""Ranks on several cards against one card: whole engines of one process and of two, from the same files."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

if torch.cuda.device_count() < 2:
    pytest.skip(f"needs 2 CUDA devices; torch finds {torch.cuda.device_count()}", allow_module_level=True)
pytest.importorskip("triton", reason="Triton is not installed")

from stellarbyte.checkpoint.convert import convert
from stellarbyte_server.config.settings import EngineSettings
from stellarbyte_server.engine.core import EngineCore
from stellarbyte_server.engine.run.runner import PlanRunner
from stellarbyte_server.engine.start.load import build_core
from stellarbyte_server.protocol.messages import Delta, merged
from stellarbyte_server.protocol.request import GenerationRequest
from tests.support.engines.engine import make_request
from tests.support.engines.engine_core import drain
from tests.support.models import oracle
from tests.support.models.adapters import write_adapter
from tests.support.models.byte_transformer import make_model
from tests.support.models.quantized import write_quantized
from tests.support.servers.fake_engine import make_tokenizer

pytestmark = pytest.mark.gpu

SIZES: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8, "head_dim": 32}
CASES: dict[str, dict[str, Any]] = {
    "plain": {"num_key_value_heads": 4},
    "windows, one key-value head": {"num_key_value_heads": 1, "sliding_window": 32, "sink_tokens": 4},
    "norms over all heads": {"branch_norms": "after", "qk_norm": True, "qk_norm_per_head": False},
    "biases": {"use_xpos": False, "attention_bias": True, "attention_output_bias": True, "mlp_bias": True},
}

Start = Callable[..., EngineCore]


@pytest.fixture
def start() -> Iterator[Start]:
    """Engines; the ranks of each end with the test."""
    started: list[EngineCore] = []

    def start_core(folder: Path, ranks: int, **flags: Any) -> EngineCore:
        settings = EngineSettings(
            model=str(folder / "model"), device="cuda", tensor_parallel_size=ranks, max_model_len=1024,
            kv_cache_memory=2**28, max_num_seqs=16, max_num_batched_tokens=2048, **flags,
        )  # fmt: skip
        core, _ = build_core(settings)
        started.append(core)
        return core

    yield start_core
    for core in started:
        assert isinstance(core.runner, PlanRunner)
        close = getattr(core.runner.executor, "close", None)
        if close is not None:
            close()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def save(folder: Path, **changes: Any) -> Any:
    model = make_model(vocab_size=259, eos_token_id=256, max_position_embeddings=2048, **(SIZES | changes))
    model.save_pretrained(folder / "model")
    make_tokenizer().save(str(folder / "model" / "tokenizer.json"))
    return model


def request(number: int, length: int = 40, **fields: Any) -> GenerationRequest:
    told = {"return_token_ids": True, "ignore_eos": True, "logprobs": 1, "seed": number} | fields
    prompt = [(7 + number) * i % 250 for i in range(length)]
    return make_request(prompt, told.pop("max_tokens", 40), request_id=str(number), **told)


def answers(core: EngineCore, requests: list[GenerationRequest]) -> list[Delta]:
    said = drain(core, *requests, limit_s=300)
    return [merged([item for item in said[r.request_id] if isinstance(item, Delta)]) for r in requests]


REQUESTS = [request(0), request(1, 700), request(2, temperature=0.8, top_p=0.9), request(3, repetition_penalty=1.2)]


@pytest.mark.parametrize("changes", CASES.values(), ids=list(CASES))
def test_answers_have_the_probabilities_of_the_oracle(start: Start, changes: dict[str, Any], tmp_path: Path) -> None:
    """In float32: within graphs, alone and in a batch, with a prompt whose sums go in two shots; the second time from
    the prefix cache."""
    model = save(tmp_path, **changes)
    core = start(tmp_path, 2, dtype="float32")
    for requests in (REQUESTS[:1], REQUESTS, REQUESTS):
        for asked, answer in zip(requests, answers(core, requests), strict=True):
            tokens = [*asked.prompt_token_ids, *answer.token_ids]
            expected = oracle.logprobs(model.state_dict(), model.config, tokens)
            for place, told in enumerate(answer.logprobs, len(asked.prompt_token_ids) - 1):
                assert abs(told.logprob - expected[place, told.token_id]) <= 2e-3


def test_adapters_are_cut_alike(start: Start, tmp_path: Path) -> None:
    """Plain ones, one with DoRA, and one with a head, in one batch; tokens are those of one card."""
    model = save(tmp_path)
    write_adapter(tmp_path / "adapters" / "plain", model, seed=1)
    write_adapter(tmp_path / "adapters" / "dora", model, seed=2, use_dora=True)
    write_adapter(tmp_path / "adapters" / "head", model, seed=3, modules_to_save=("lm_head",))
    requests = [request(i, adapter=name) for i, name in enumerate(("plain", "dora", "head", None))]
    told = []
    for ranks in (1, 2):
        core = start(tmp_path, ranks, dtype="float32", adapter_dir=str(tmp_path / "adapters"), max_loras=4)
        told.append([list(answer.token_ids) for answer in answers(core, requests)])
    assert told[0] == told[1]


@pytest.mark.parametrize("form", ["none", "int8", "fp8", "int4", "awq", "compressed-tensors W8A8"])
def test_forms_of_weights_are_near_those_of_one_card(start: Start, form: str, tmp_path: Path) -> None:
    """In bfloat16: the log-probability of the same prompt, token by token."""
    flags = {"quantization": form} if form in ("int8", "fp8", "int4") else {}
    if form == "none" or flags:
        save(tmp_path)
    else:
        convert(write_quantized(tmp_path, form)[0], tmp_path / "model")
    asked = make_request([i * 5 % 90 + 1 for i in range(60)], 1, prompt_logprobs=0, ignore_eos=True)
    told = [
        torch.tensor([each.logprob for each in answers(start(tmp_path, ranks, **flags), [asked])[0].prompt_logprobs])
        for ranks in (1, 2)
    ]
    assert (told[0] - told[1]).abs().mean() <= 0.05
