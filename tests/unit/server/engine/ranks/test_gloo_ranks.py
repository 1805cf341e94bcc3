"""An engine of several processes over gloo gives the same answers as one process, from the same files."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from stellarbyte_server.config.settings import EngineSettings
from stellarbyte_server.engine.core import EngineCore
from stellarbyte_server.engine.run.runner import PlanRunner
from stellarbyte_server.engine.start.load import build_core
from stellarbyte_server.protocol.messages import Delta, merged
from stellarbyte_server.protocol.request import GenerationRequest
from tests.support.engines.engine import make_request
from tests.support.engines.engine_core import drain
from tests.support.gpu.engine_process import run_engine
from tests.support.models import oracle
from tests.support.models.adapters import write_adapter
from tests.support.models.byte_transformer import EXPERTS, make_model
from tests.support.servers.fake_engine import make_tokenizer

VOCABULARY, BLOCK, LAYERS, HEAD_DIM = 259, 4, 3, 12
MIXED: dict[str, Any] = {"moe_layers": [1], "num_attention_heads": 6, "num_key_value_heads": 3, **EXPERTS}
WINDOWS: dict[str, Any] = {"sliding_window": 16, "sink_tokens": 4, "num_key_value_heads": 1, "qk_norm": True}
CASES = [
    pytest.param((MIXED, 2), id="experts, heads that 2 does not divide"),
    pytest.param((WINDOWS, 4), id="windows, one key-value head for 4 ranks", marks=pytest.mark.slow),
    pytest.param((MIXED | {"expert_bias": True, "attention_bias": True}, 3), id="biases", marks=pytest.mark.slow),
]


def save(folder: Path, changes: dict[str, Any]) -> Any:
    model = make_model(vocab_size=VOCABULARY, head_dim=HEAD_DIM, eos_token_id=256, **changes)
    model.save_pretrained(folder / "model")
    make_tokenizer().save(str(folder / "model" / "tokenizer.json"))
    write_adapter(folder / "adapters" / "plain", model, seed=1)
    write_adapter(folder / "adapters" / "dora", model, seed=2, use_dora=True)
    write_adapter(folder / "adapters" / "head", model, seed=3, modules_to_save=("lm_head",))
    return model


def start(folder: Path, num_kv_heads: int, ranks: int) -> EngineCore:
    """A core with 40 blocks, of which a rank's have `num_kv_heads` heads."""
    settings = EngineSettings(
        model=str(folder / "model"),
        device="cpu",
        tensor_parallel_size=ranks,
        adapter_dir=str(folder / "adapters"),
        max_loras=2,
        block_size=BLOCK,
        max_model_len=128,
        max_num_seqs=8,
        kv_cache_memory=40 * BLOCK * 2 * LAYERS * num_kv_heads * HEAD_DIM * 4,
    )
    core, info = build_core(settings)
    assert info.num_blocks == 40
    return core


@pytest.fixture(scope="module", params=CASES)
def engines(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, ...]]:
    changes, ranks = request.param
    folder = tmp_path_factory.mktemp("models")
    model = save(folder, changes)
    threads = torch.get_num_threads()
    num_kv_heads = model.config.num_key_value_heads
    one, several = start(folder, num_kv_heads, 1), start(folder, -(-num_kv_heads // ranks), ranks)
    torch.set_num_threads(threads)
    yield model, one, several
    assert isinstance(several.runner, PlanRunner)
    several.runner.executor.close()


def answers(core: EngineCore, requests: list[GenerationRequest]) -> list[Delta]:
    said = drain(core, *requests)
    return [merged([item for item in said[r.request_id] if isinstance(item, Delta)]) for r in requests]


def a_request(number: int, **fields: Any) -> GenerationRequest:
    prompt = [7 * i % 250 for i in range(number, 20 + 3 * number)]
    told = {"return_token_ids": True, "ignore_eos": True, "logprobs": 3, "seed": number} | fields
    return make_request([*b"a common prefix ", *prompt], 20, request_id=str(number), **told)


REQUESTS = [
    a_request(0),
    a_request(1, temperature=0.9, top_p=0.9),
    a_request(2, temperature=1.3, top_k=20, repetition_penalty=1.2, frequency_penalty=0.3),
    a_request(3, adapter="plain", adapter_scale=0.7),
    a_request(4, adapter="dora", temperature=0.7),
    a_request(5, adapter="head"),
    a_request(6, grammar='start: /[a-z ]{20}/ "!"', logprobs=None),
    a_request(7, prompt_logprobs=2, logit_bias=((65, 5.0),)),
]


def test_all_kinds_of_requests_at_once_are_answered_as_by_one_process(engines: tuple[Any, ...]) -> None:
    """Twice, so that the second time reads the prefix cache."""
    model, one, several = engines
    for _ in range(2):
        for expected, actual in zip(answers(one, REQUESTS), answers(several, REQUESTS), strict=True):
            assert (actual.text, actual.token_ids) == (expected.text, expected.token_ids)
            assert (actual.finish_reason, actual.num_tokens) == (expected.finish_reason, expected.num_tokens)
            for name in ("logprobs", "prompt_logprobs"):
                pairs = zip(getattr(expected, name), getattr(actual, name), strict=True)
                for of_one, of_several in pairs:
                    assert of_several.token_id == of_one.token_id
                    assert abs(of_several.logprob - of_one.logprob) <= 1e-4
    assert several.scheduler.totals.prefix_hits > 0
    if model.config.sliding_window is None:  # otherwise sequences do not grow beyond their first blocks
        assert several.scheduler.totals.num_preemptions > 0
        assert one.scheduler.totals.num_preemptions > 0


def test_log_probabilities_are_the_oracles(engines: tuple[Any, ...]) -> None:
    model, _, several = engines
    request = a_request(0, cache_salt="alone")
    (answer,) = answers(several, [request])
    tokens = [*request.prompt_token_ids, *answer.token_ids]
    expected = oracle.logprobs(model.state_dict(), model.config, tokens)
    for position, told in enumerate(answer.logprobs, len(request.prompt_token_ids) - 1):
        assert abs(told.logprob - expected[position, told.token_id]) <= 1e-4


def test_an_engine_in_a_process_of_its_own_answers_and_ends(tmp_path: Path) -> None:
    """As the tests on several GPUs run it, which never run on a machine without them."""
    save(tmp_path, MIXED)
    settings = EngineSettings(
        model=str(tmp_path / "model"), device="cpu", tensor_parallel_size=2, max_model_len=128, kv_cache_memory=2**20
    )
    asked = make_request(b"a prompt", 5, return_token_ids=True, ignore_eos=True)
    first, second = run_engine(tmp_path, settings, [asked], [asked]).batches
    assert len(first[0].token_ids) == 5 and first[0].token_ids == second[0].token_ids
