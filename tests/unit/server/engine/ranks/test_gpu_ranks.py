"""The GPU model on several ranks, by Triton's interpreter: the answers of one rank, with the oracle's probabilities."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from stellarbyte import ByteTransformer
from stellarbyte.backends.gpu import steps
from stellarbyte_server.protocol.messages import Delta, merged
from stellarbyte_server.protocol.request import GenerationRequest
from tests.support.engines.engine import make_request
from tests.support.engines.engine_core import drain
from tests.support.gpu.gpu_engine import GpuEngine
from tests.support.gpu.ranks import GpuRanksEngine
from tests.support.models import oracle
from tests.support.models.byte_transformer import make_model

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="ranks in threads need Triton's interpreter; on cards: tests/gpu/test_ranks.py"
)

VOCABULARY = 259
OLMO2 = {"branch_norms": "after", "qk_norm": True, "qk_norm_per_head": False}
WINDOW = {"sliding_window": 7, "sink_tokens": 2}
BIASES = {"use_xpos": False, "attention_bias": True, "attention_output_bias": True, "mlp_bias": True}
CASES = {
    "plain": ({}, 2),
    "windows, one key-value head": (WINDOW | {"num_key_value_heads": 1}, 2),
    "biases, heads that 2 does not divide": (BIASES | {"num_attention_heads": 3, "num_key_value_heads": 3}, 2),
    "norms over all heads": (OLMO2 | {"num_key_value_heads": 1}, 2),
    "deepnorm, tied, multipliers": (
        {"deepnorm": True, "tie_word_embeddings": True, "embedding_multiplier": 3.0, "logits_softcap": 5.0}, 2
    ),
    "parallel residual, 4 ranks": ({"parallel_residual": True, "num_attention_heads": 4}, 4),
}  # fmt: skip


@pytest.fixture(autouse=True)
def small_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """A card of one multiprocessor."""
    monkeypatch.setattr(steps, "num_multiprocessors_of", lambda _: 1)


Start = Callable[..., GpuRanksEngine]


@pytest.fixture
def start() -> Iterator[Start]:
    started: list[GpuRanksEngine] = []

    def start_ranks(*told: Any, **options: Any) -> GpuRanksEngine:
        started.append(GpuRanksEngine(*told, **options))
        return started[-1]

    yield start_ranks
    for engine in started:
        engine.close()


def tiny_model(**overrides: Any) -> ByteTransformer:
    shape = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
    return make_model(vocab_size=VOCABULARY, intermediate_size=36, head_dim=16, eos_token_id=256, **(shape | overrides))


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return torch.randint(250, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def answers(engine: GpuRanksEngine | GpuEngine, requests: list[GenerationRequest]) -> list[Delta]:
    said = drain(engine.core(), *requests, limit_s=600)
    return [merged([item for item in said[request.request_id] if isinstance(item, Delta)]) for request in requests]


def request(number: int, length: int = 9, max_tokens: int = 4, **fields: Any) -> GenerationRequest:
    told = {"return_token_ids": True, "ignore_eos": True, "logprobs": 2, "seed": number} | fields
    return make_request(prompt_of(length, number), max_tokens, request_id=str(number), **told)


def assert_oracle(model: ByteTransformer, asked: GenerationRequest, answer: Delta, limit: float = 1e-4) -> None:
    """The log-probabilities of an answer are those of its tokens by the oracle."""
    tokens = [*asked.prompt_token_ids, *answer.token_ids]
    expected = oracle.logprobs(model.state_dict(), model.config, tokens)
    assert len(answer.logprobs) == len(answer.token_ids)
    for place, told in enumerate(answer.logprobs, len(asked.prompt_token_ids) - 1):
        assert abs(told.logprob - expected[place, told.token_id]) <= limit


@pytest.mark.parametrize(("changes", "ranks"), list(CASES.values()), ids=list(CASES))
def test_answers_have_the_probabilities_of_the_oracle(start: Start, changes: dict[str, Any], ranks: int) -> None:
    """Of a greedy and a random request in one batch, and of a prompt; the prompts take more than one step."""
    model = tiny_model(**changes)
    requests = [request(0), request(1, 13, temperature=0.9, top_p=0.8), request(2, 6, prompt_logprobs=1)]
    engine = start(model, ranks, max_num_batched_tokens=8)
    found = answers(engine, requests)
    for asked, answer in zip(requests, found, strict=True):
        assert_oracle(model, asked, answer)
    expected = oracle.logprobs(model.state_dict(), model.config, list(requests[2].prompt_token_ids))
    for place, told in enumerate(found[2].prompt_logprobs):
        assert abs(told.logprob - expected[place, told.token_id]) <= 1e-4
