"""Drafts on the card: the answers are those without, and no kernel is compiled once all is prepared.

Where tokens are compared, equal means: identical up to the first place where the two logits are within 1e-3 of each
other (matrix products change in their last bits with the number of rows). More than 1 such place in 500 tokens is a
failure.
"""

import random
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():  # before Triton is imported: the unit tests want its interpreter then
    pytest.skip("torch finds no CUDA device here", allow_module_level=True)
triton = pytest.importorskip("triton", reason="Triton is not installed")

from stellarbyte import ByteTransformer
from stellarbyte.backends.gpu.preparation import Preparation
from stellarbyte_server.engine.drafts.drafts import Drafts
from stellarbyte_server.engine.run.runner import PlanRunner
from stellarbyte_server.engine.run.slot_executor import SlotExecutor
from stellarbyte_server.protocol.messages import Delta
from stellarbyte_server.protocol.request import GenerationRequest
from tests.support.engines.drafting import Guesses, answers_of, compute_masks_here, random_request
from tests.support.engines.engine import make_request
from tests.support.engines.engine_core import VOCABULARY
from tests.support.gpu.gpu_engine import GpuEngine, gpu_drafting_core, own_stream
from tests.support.models.byte_transformer import make_model

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda")
NEAR_TIE = 1e-3
SHAPES: tuple[dict[str, Any], ...] = (
    {},
    {"sliding_window": 12, "sink_tokens": 2},
    {"qk_norm": True, "attention_bias": True, "use_xpos": False},
)


@pytest.fixture(autouse=True)
def stream():
    with own_stream(DEVICE):
        yield


def num_near_ties(
    requests: list[GenerationRequest], found: dict[str, Delta], expected: dict[str, Delta], model: ByteTransformer
) -> int:
    """Answers that part at a near-tie; any other difference fails. Only greedy ones without adjustments may part."""
    count = 0
    for request in requests:
        ours, theirs = (of[request.request_id].token_ids for of in (found, expected))
        place = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), None)
        if place is None:
            assert ours == theirs and found[request.request_id].text == expected[request.request_id].text
            continue
        assert request.adapter is None and not request.sampling.temperature, f"request {request.request_id} differs"
        before = torch.tensor([[*request.prompt_token_ids, *theirs[:place]]])
        with torch.no_grad():
            logits_V = model(before).logits[0, -1]
        assert (logits_V[ours[place]] - logits_V[theirs[place]]).abs() <= NEAR_TIE
        count += 1
    return count


@pytest.mark.parametrize("run", range(30))
def test_random_requests_get_the_same_answers(run: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Adapters, seeds, penalties, log-probabilities, grammars and windows, in float32; guesses right and wrong."""
    compute_masks_here(monkeypatch)
    chance, model = random.Random(run), make_model(vocab_size=VOCABULARY, **SHAPES[run % len(SHAPES)])
    options: dict[str, Any] = {
        "num_blocks": chance.choice([40, 200]),
        "max_num_seqs": chance.choice([2, 5, 16]),
        "max_num_batched_tokens": 48,
    }
    requests = [random_request(chance, str(number)) for number in range(12)]
    arrivals = {request.request_id: number * chance.choice([0, 2, 4]) for number, request in enumerate(requests)}
    expected = answers_of(gpu_drafting_core(model, None, DEVICE, **options), requests, arrivals, {})
    coming = {name: list(delta.token_ids) for name, delta in expected.items()}
    for drafts in (Guesses(coming, chance, runs_ahead=True), Drafts(runs_ahead=True)):
        found = answers_of(gpu_drafting_core(model, drafts, DEVICE, **options), requests, arrivals, {})
        num_tokens = sum(len(delta.token_ids) for delta in expected.values())
        assert num_near_ties(requests, found, expected, model) <= max(1, num_tokens // 500)
        assert drafts.totals.num_accepted_tokens > 0 or type(drafts) is Drafts


def test_drafts_compile_nothing_once_all_is_prepared(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []
    monkeypatch.setattr(
        triton.knobs.runtime, "jit_post_compile_hook", lambda **what: compiled.append(what["repr"]), raising=False
    )
    shape = {"hidden_size": 176, "head_dim": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = make_model(vocab_size=VOCABULARY, intermediate_size=240, **shape)  # new to the process
    drafts = Guesses({str(i): [5] * 40 for i in range(8)}, random.Random(0), runs_ahead=True)
    core = gpu_drafting_core(
        model, drafts, DEVICE, num_blocks=700, block_size=16, max_num_seqs=16, max_num_batched_tokens=2100
    )
    assert isinstance(core.runner, PlanRunner) and isinstance(core.runner.executor, SlotExecutor)
    steps = core.runner.executor._steps
    Preparation(steps, GpuEngine.rehearsal_of(steps)).run_all()
    assert compiled
    compiled.clear()
    requests = [
        make_request([1, 2, 3 + i], 40, str(i), seed=i, temperature=0.8 * (i % 2), adapter="a" if i % 4 == 3 else None)
        for i in range(8)
    ]
    answers_of(core, requests, {request.request_id: 0 for request in requests}, {})
    assert drafts.totals.num_drafts > 0 and compiled == []
