"""The GPU engine on the card against the float64 oracle, transformers and the CPU engine.

Where tokens are compared, equal means: identical up to the first place where the reference itself is within 1e-3 of
choosing the other token (matrix products change in their last bits with the batch's shape). Such places are printed,
and more than 1 in 2,000 tokens is a failure.
"""

import copy
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():  # before Triton is imported: the unit tests want its interpreter then
    pytest.skip("torch finds no CUDA device here", allow_module_level=True)
pytest.importorskip("triton", reason="Triton is not installed")

from transformers import AutoModelForCausalLM

from stellarbyte import ByteTransformer
from stellarbyte.backends.torch_model import TorchModel
from stellarbyte.checkpoint.convert import convert
from stellarbyte.checkpoint.native import load_model
from stellarbyte.sampling.sampler import RowSampling, sample
from stellarbyte_server.api.structured.grammars import json_grammar
from stellarbyte_server.engine.run.slot_step import SlotStep
from stellarbyte_server.engine.state.sequence import Chunk
from stellarbyte_server.protocol.messages import Delta, merged
from stellarbyte_server.protocol.request import GenerationRequest
from tests.support.engines.engine import ModelEngine, generated, make_request
from tests.support.engines.engine_core import VOCABULARY as BYTES
from tests.support.engines.engine_core import drain, model_core
from tests.support.gpu.gpu_engine import GpuEngine, own_stream
from tests.support.models import oracle
from tests.support.models.adapters import RandomAdapter, random_adapter
from tests.support.models.byte_transformer import make_model, random_tokens
from tests.support.models.hugging_face import tiny_llama, tiny_mistral, tiny_qwen3
from tests.support.schemas import SCHEMAS

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda")
NEAR_TIE = 1e-3
NO_ADAPTERS: Mapping[str, RandomAdapter] = MappingProxyType({})
WINDOW = {"sliding_window": 12, "sink_tokens": 2}
QWEN3 = {"qk_norm": True, "attention_bias": True, "use_xpos": False}
DEEPNORM = {"deepnorm": True, "parallel_residual": True, "layer_scale_init": 0.5}

WISHES: list[dict[str, Any]] = [
    {"logprobs": 3, "prompt_logprobs": 2},
    {"logprobs": 0, "repetition_penalty": 1.5, "presence_penalty": 0.5, "frequency_penalty": 0.5},
    {"logit_bias": ((5, 3.0), (6, -100.0)), "min_tokens": 4, "stop_token_ids": (7,)},
    {"grammar": json_grammar(SCHEMAS[0])},
    {"grammar": json_grammar(SCHEMAS[2]), "repetition_penalty": 1.2, "logprobs": 1},
    {"max_tokens": 0, "pooling": "mean"},
    {"max_tokens": 0, "pooling": "last"},
    {"max_tokens": 0, "prompt_logprobs": 0},
]


@pytest.fixture(autouse=True)
def stream():
    """A stream for each test, and one thread for what the CPU computes: more take longer over so small matrices."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with own_stream(DEVICE):
        yield
    torch.set_num_threads(num_threads)


def gpu_engine(model: ByteTransformer, **options: Any) -> GpuEngine:
    """Blocks and steps of the same sizes in all tests: few kernels are to be compiled."""
    return GpuEngine(
        model,
        DEVICE,
        **{"block_size": 16, "num_blocks": 400, "max_num_seqs": 40, "max_num_batched_tokens": 48} | options,
    )


def some_requests(count: int, max_tokens: int = 24, longest: int = 80) -> list[GenerationRequest]:
    """Greedy and random ones in turn, some truncated, of prompts and answers of different lengths."""
    kinds: list[dict[str, Any]] = [
        {},
        {"temperature": 0.9},
        {},
        {"temperature": 1.1, "top_k": 9},
        {"temperature": 1.1, "top_p": 0.8},
        {"temperature": 1.1, "min_p": 0.05},
    ]
    return [
        make_request(random_tokens(5 + 4 * i % longest, seed=i), max_tokens + i % 7, str(i), seed=i, **kinds[i % 6])
        for i in range(count)
    ]


def cpu_tokens(
    model: ByteTransformer, requests: list[GenerationRequest], adapters: Mapping[str, RandomAdapter] = NO_ADAPTERS
) -> list[list[int]]:
    return ModelEngine(model, adapters=adapters, num_blocks=4000, max_model_len=30_000).generate(requests)


def assert_equal_tokens(
    model: ByteTransformer,
    requests: list[GenerationRequest],
    found: Sequence[Sequence[int]],
    adapters: Mapping[str, RandomAdapter] = NO_ADAPTERS,
    expected: Sequence[Sequence[int]] | None = None,
) -> None:
    """The tokens are those of the CPU engine, in the sense above; shorter answers (aborted ones) are its beginnings."""
    expected = cpu_tokens(model, requests, adapters) if expected is None else expected
    num_near_ties = 0
    for request, ours, theirs in zip(requests, found, expected, strict=True):
        place = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), None)
        if place is None:
            continue
        before = [*request.prompt_token_ids, *theirs[:place]]
        assert is_near_tie(model, request, before, theirs[place], ours[place], adapters), (
            f"request {request.request_id}: token {place} is {ours[place]}, not {theirs[place]}, and it is no near-tie"
        )
        num_near_ties += 1
    report_near_ties(num_near_ties, sum(map(len, found)))


def is_near_tie(
    model: ByteTransformer,
    request: GenerationRequest,
    before: list[int],
    theirs: int,
    ours: int,
    adapters: Mapping[str, RandomAdapter],
) -> bool:
    """Whether the CPU engine takes our token when the distance of the two is moved by NEAR_TIE towards it."""
    engine = ModelEngine(model, adapters=adapters, num_blocks=4000, max_model_len=30_000)
    logits_1V = engine.teacher_forced(
        before, len(before), adapter=request.adapter, adapter_scale=request.adapter_scale
    ).clone()
    logits_1V[0, ours] += NEAR_TIE / 2
    logits_1V[0, theirs] -= NEAR_TIE / 2
    sampling = request.sampling
    row = RowSampling(
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        seed=sampling.seed,
        choice=sampling.choice,
        position=len(before),
    )
    return int(sample(logits_1V, [row])[0]) == ours


def report_near_ties(num_near_ties: int, num_tokens: int) -> None:
    print(f"{num_near_ties} near-ties among {num_tokens} tokens")  # noqa: T201
    assert num_near_ties <= max(1, num_tokens // 2000)


@pytest.mark.parametrize("shape", [{}, WINDOW, QWEN3, DEEPNORM], ids=str)
def test_logprobs_equal_the_oracles(shape: dict[str, Any]) -> None:
    """In float32, a token at a time by the graphs that decode, and as a prompt in chunks of 13."""
    model, tokens = make_model(**shape), random_tokens(51)
    expected = oracle.logprobs(model.state_dict(), model.config, tokens)[19:]
    engine = gpu_engine(model)
    assert (engine.teacher_forced(tokens, 20) - expected).abs().max() <= 1e-4
    engine.check_nothing_is_left()
    core = gpu_engine(model, max_num_batched_tokens=13).core()
    said = drain(core, make_request(tokens, 0, prompt_logprobs=0))["r"]
    found = merged([item for item in said if isinstance(item, Delta)]).prompt_logprobs
    every_V = oracle.logprobs(model.state_dict(), model.config, tokens)
    wanted = [every_V[i, token].item() for i, token in enumerate(tokens[1:])]
    assert [entry.logprob for entry in found] == pytest.approx(wanted, abs=1e-4)


@torch.no_grad()
def test_bfloat16_is_as_near_the_oracle_as_torch_is() -> None:
    """The oracle has the unrounded weights, so rounding them counts, too; plain torch operators say what is usual."""
    model, tokens = make_model(), random_tokens(51)
    expected = oracle.logprobs(model.state_dict(), model.config, tokens)[19:]
    rounded = copy.deepcopy(model).to(DEVICE, torch.bfloat16)(torch.tensor([tokens], device=DEVICE)).logits[0, 19:]
    usual = (rounded.double().log_softmax(dim=-1).cpu() - expected).abs()
    found = (gpu_engine(model, dtype=torch.bfloat16).teacher_forced(tokens, 20) - expected).abs()
    for name, difference in (("torch", usual), ("here", found)):
        print(f"bfloat16 {name}: |Δ logprob| {difference.max():.3f} at most, {difference.mean():.4f} on average")  # noqa: T201
    assert found.max() <= 2 * usual.max() and found.mean() <= 1.5 * usual.mean()


@pytest.mark.parametrize("save", [tiny_llama, tiny_qwen3, tiny_mistral], ids=lambda save: save.__name__)
def test_greedy_tokens_equal_those_of_transformers(save: Any, tmp_path: Path) -> None:
    """20 prompts of 64 tokens each: every one is the likeliest by transformers' own forward pass on the same text."""
    source = save(tmp_path / "source", head_dim=16, max_position_embeddings=256)
    model = load_model(convert(source, tmp_path / "converted"))
    requests = [make_request(random_tokens(1 + 3 * i, seed=i), 64, str(i)) for i in range(20)]
    answers = gpu_engine(model).generate(requests)
    theirs = AutoModelForCausalLM.from_pretrained(source, attn_implementation="eager").eval()
    num_near_ties = 0
    for request, answer in zip(requests, answers, strict=True):
        prompt = list(request.prompt_token_ids)
        with torch.inference_mode():
            logits_TV = theirs(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].double()
        gaps_T = logits_TV.amax(dim=-1) - logits_TV[torch.arange(64), torch.tensor(answer)]
        assert len(answer) == 64 and gaps_T.max() <= NEAR_TIE, f"prompt {request.request_id}, token {gaps_T.argmax()}"
        num_near_ties += int((gaps_T > 0).sum())
    report_near_ties(num_near_ties, 20 * 64)


@pytest.mark.parametrize("shape", [{}, WINDOW], ids=str)
def test_a_mixed_batch_gets_the_tokens_of_the_cpu_engine_also_from_the_prefix_cache(shape: dict[str, Any]) -> None:
    model, requests = make_model(**shape), some_requests(20)
    engine = gpu_engine(model)
    expected = cpu_tokens(model, requests)
    for turn in range(2):
        assert_equal_tokens(model, requests, engine.generate(requests), expected=expected)
        assert (engine.scheduler.totals.prefix_hits > 0) == (turn == 1)
        engine.check_nothing_is_left()


def test_each_row_has_its_own_adapter_and_scale() -> None:
    model = make_model()
    adapters = {f"a{i}": random_adapter(model.config, seed=i, share=0.8) for i in range(4)}
    names = [None, *adapters]
    requests = [
        make_request(
            random_tokens(5 + 3 * i, seed=i), 20, str(i), seed=i, temperature=0.8 * (i % 2),
            adapter=names[i % 5], adapter_scale=(1.0, 0.5, 2.0)[i % 3],
        )
        for i in range(23)
    ]  # fmt: skip
    engine = gpu_engine(model, adapters=adapters)
    assert_equal_tokens(model, requests, engine.generate(requests), adapters)
    engine.check_nothing_is_left()


def test_what_the_host_has_a_say_in_is_as_on_the_cpu_and_the_rows_beside_it_too() -> None:
    model = make_model(vocab_size=BYTES)
    wishes: list[dict[str, Any]] = [*WISHES, {}, {"temperature": 0.9, "top_p": 0.9}]
    requests = [
        make_request(random_tokens(9 + i, seed=i), request_id=str(i), seed=i, return_token_ids=True, **wish)
        for i, wish in enumerate(wishes)
    ]
    engine = gpu_engine(model)
    answers = []
    for core in (model_core(model, TorchModel, num_blocks=200), engine.core()):
        said = drain(core, *requests, limit_s=100)  # the first use of the kernels compiles them
        while core.has_work:
            core.step()
        answers.append([merged([item for item in items if isinstance(item, Delta)]) for items in said.values()])
    for expected, found in zip(*answers, strict=True):
        for name in ("text", "token_ids", "finish_reason", "num_tokens"):
            assert getattr(found, name) == getattr(expected, name)
        for name in ("logprobs", "prompt_logprobs"):
            ours, theirs = getattr(found, name), getattr(expected, name)
            assert [entry.token_id for entry in ours] == [entry.token_id for entry in theirs]
            assert [entry.logprob for entry in ours] == pytest.approx([entry.logprob for entry in theirs], abs=1e-4)
        vectors = [np.frombuffer(delta.embedding or b"", np.float32) for delta in (found, expected)]
        np.testing.assert_allclose(*vectors, atol=1e-4)
    engine.check_nothing_is_left()


def test_a_stream_over_many_windows_stays_exact_in_the_same_few_blocks() -> None:
    """20,000 tokens on a window of 64. Its begin is the CPU engine's; its end is the oracle's, which has no cache."""
    model = make_model(sliding_window=64, sink_tokens=4)
    prompt, length = random_tokens(20), 20_000
    request = make_request(prompt, length, temperature=1.0, seed=3)
    engine = gpu_engine(model, num_blocks=10, max_model_len=30_000, max_num_seqs=1)
    sequence = engine.add(request)
    newest, most_blocks = NewestLogits(), 0
    while engine.has_work:
        engine.step(newest)
        most_blocks = max(most_blocks, engine.scheduler.pool.num_used)
    answer = generated(sequence)
    assert len(answer) == length
    assert most_blocks <= engine.scheduler.layout.steady_blocks and engine.scheduler.totals.num_preemptions == 0
    first = make_request(prompt, 2000, temperature=1.0, seed=3)
    assert_equal_tokens(model, [first], [answer[:2000]])
    tokens = prompt + answer
    expected_V = oracle.banded_logprobs(model.state_dict(), model.config, tokens[:-1], [len(tokens) - 2])[0]
    difference = (newest.logits_V.double().log_softmax(dim=-1).cpu() - expected_V).abs().max()
    print(f"|Δ logprob| after {len(tokens) - 1} tokens: {difference:.1e}")  # noqa: T201
    assert difference <= 1e-4
    engine.check_nothing_is_left()


class NewestLogits:
    """Keeps those of the newest step of one sequence, which the next step overwrites."""

    def __init__(self) -> None:
        self.logits_V = torch.empty(0)

    def __call__(self, step: SlotStep) -> None:
        for part in step.parts:
            if part.rows:
                self.logits_V = part.computed.logits_RV[0].clone()


def test_aborts_at_any_time_leave_nothing_behind_and_change_nobody_elses_tokens() -> None:
    """Up to 32 sequences, half of them dropped: waiting, among their prompts or answering, with a step in flight."""
    model, requests = make_model(**WINDOW), some_requests(48, longest=20)
    numbers = random.Random(5)
    engine = gpu_engine(model, max_num_seqs=32)
    waiting = list(requests)
    sequences, doomed = [], {}
    num_steps = 0
    while waiting or engine.has_work:
        for request in waiting[:3]:
            sequences.append(engine.add(request))
            if numbers.random() < 0.5:
                doomed[sequences[-1]] = num_steps + numbers.randrange(30)
        del waiting[:3]
        engine.step()
        for sequence, at in doomed.items():
            if at == num_steps:
                engine.abort(sequence)
        num_steps += 1
    found = [generated(sequence) for sequence in sequences]
    num_whole = sum(len(ours) == r.sampling.max_tokens for r, ours in zip(requests, found, strict=True))
    assert 48 - len(doomed) <= num_whole < 48
    assert_equal_tokens(model, requests, found)
    engine.check_nothing_is_left()


def test_a_pool_that_is_too_small_changes_no_tokens() -> None:
    model, requests = make_model(), some_requests(20, max_tokens=40)
    engine = gpu_engine(model, num_blocks=24)
    assert_equal_tokens(model, requests, engine.generate(requests))
    assert engine.scheduler.totals.num_preemptions > 0
    engine.check_nothing_is_left()


def test_graphs_of_every_size_serve_batches_that_change_at_every_step() -> None:
    """1, 2 ... 40 rows and back, one more or less with each step. Rows that only fill up a graph must harm nobody."""
    model = make_model()
    requests = [
        make_request(
            random_tokens(3 + i % 5, seed=i),
            81 - 2 * i,
            str(i),
            seed=i,
            temperature=0.9 * (i % 2),
            top_k=i % 4 // 3 * 7,
        )
        for i in range(40)
    ]
    engine = gpu_engine(model)
    sequences, num_rows = [], set()
    while len(sequences) < 40 or engine.has_work:
        if len(sequences) < 40:
            sequences.append(engine.add(requests[len(sequences)]))
        num_rows.add(sum(decodes(chunk) for chunk in engine.step()))
    assert num_rows >= set(range(1, 41))
    assert_equal_tokens(model, requests, [generated(sequence) for sequence in sequences])
    engine.check_nothing_is_left()


def decodes(chunk: Chunk) -> bool:
    return chunk.start >= chunk.sequence.num_prompt
