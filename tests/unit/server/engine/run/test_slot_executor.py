"""The GPU engine, by Triton's interpreter where there is no card, against the CPU engine: equal answers, nothing left.

The interpreter takes milliseconds for every program of a kernel: models, batches and answers are tiny.
"""

import random
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from stellarbyte import ByteTransformer
from stellarbyte.backends.gpu import slots, steps
from stellarbyte.backends.torch_model import TorchModel
from stellarbyte_server.api.structured.grammars import json_grammar
from stellarbyte_server.engine.run.runner import PlanRunner
from stellarbyte_server.engine.run.slot_step import SlotStep
from stellarbyte_server.protocol.messages import Delta, merged
from stellarbyte_server.protocol.request import GenerationRequest
from tests.support.answers import assert_same
from tests.support.cases import SLOW_WITHOUT_GPU, each_value_once, some
from tests.support.engines.engine import ModelEngine, generated, make_request
from tests.support.engines.engine_core import VOCABULARY as BYTES
from tests.support.engines.engine_core import drain, model_core
from tests.support.engines.faulty_runner import FaultyRunner
from tests.support.engines.recorded_plans import RecordingExecutor, replay
from tests.support.gpu.gpu_engine import GpuEngine, own_stream
from tests.support.models import oracle
from tests.support.models.adapters import random_adapter
from tests.support.models.byte_transformer import make_model
from tests.support.schemas import SCHEMAS

VOCABULARY = 50
OLMO2 = {"branch_norms": "after", "qk_norm": True, "qk_norm_per_head": False}
WINDOW = {"sliding_window": 7, "sink_tokens": 2}


@pytest.fixture(autouse=True)
def small_card(device: torch.device, monkeypatch: pytest.MonkeyPatch):
    """A stream for each test. On a card of one multiprocessor four programs share a row, or have one of four each."""
    monkeypatch.setattr(steps, "num_multiprocessors_of", lambda _: 1)
    with own_stream(device):
        yield


def tiny_model(vocab_size: int = VOCABULARY, **overrides: Any) -> ByteTransformer:
    shape = {"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    return make_model(vocab_size=vocab_size, intermediate_size=32, **(shape | overrides))


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(VOCABULARY), k=length)


def mixed_requests(**fields: Any) -> list[GenerationRequest]:
    """Greedy and random ones with every truncation, of prompts that take one step and more."""
    kinds: list[dict[str, Any]] = [
        {},
        {"temperature": 0.9},
        {"temperature": 1.2, "top_k": 5},
        {"temperature": 1.2, "top_p": 0.7},
        {"temperature": 1.2, "min_p": 0.1, "top_k": 20},
    ]
    return [
        make_request(prompt_of(3 + 4 * i, seed=i), 3 + i % 3, str(i), seed=i, **kind, **fields)
        for i, kind in enumerate(kinds)
    ]


@pytest.mark.parametrize("shape", some([{}, WINDOW], 1, mark=SLOW_WITHOUT_GPU), ids=["full", "window"])
def test_requests_that_come_and_go_get_the_tokens_of_the_cpu_engine(device: torch.device, shape: dict) -> None:
    """Prompts in chunks, one cut off while it answers, one before it ran, and one that begins like another."""
    model, requests = tiny_model(**shape), mixed_requests()
    repeated = make_request(list(requests[4].prompt_token_ids), 2, "repeated", temperature=1.0, seed=9)
    expected = ModelEngine(model).generate([*requests, repeated])
    engine = GpuEngine(model, device, max_num_batched_tokens=13, max_num_seqs=4)
    sequences = [engine.add(request) for request in requests]
    cut_off = engine.add(make_request(prompt_of(6, seed=7), 50, "cut off"))
    while cut_off.num_generated < 2:
        engine.step()
    waiting = engine.add(make_request(prompt_of(6, seed=8), 50, "waiting"))
    engine.abort(cut_off)
    engine.abort(waiting)
    while not sequences[4].is_over:
        engine.step()
    sequences.append(engine.add(repeated))
    engine.drain()
    assert [generated(sequence) for sequence in sequences] == expected
    assert sequences[-1].num_cached > 0
    engine.check_nothing_is_left()


def test_sequences_that_are_preempted_go_on_with_the_same_tokens(device: torch.device) -> None:
    model = tiny_model()
    requests = [make_request(prompt_of(6, seed=i), 5, str(i), seed=i, temperature=0.8 * (i % 2)) for i in range(3)]
    expected = ModelEngine(model).generate(requests)
    engine = GpuEngine(model, device, num_blocks=6, max_num_seqs=3)
    assert engine.generate(requests) == expected
    assert engine.scheduler.totals.num_preemptions > 0
    engine.check_nothing_is_left()


@pytest.mark.parametrize(
    "options", some([{}, OLMO2], 1, mark=SLOW_WITHOUT_GPU), ids=["plain", "norms over all heads and after branches"]
)
def test_each_row_of_a_batch_has_its_own_adapter_and_scale(device: torch.device, options: dict) -> None:
    """Two sequences share an adapter, with different scales; one has none. They join and leave at different steps."""
    model = tiny_model(**options)
    adapters = {f"a{i}": random_adapter(model.config, seed=i, share=0.8) for i in range(2)}
    wishes = [("a0", 1.0), (None, 1.0), ("a1", 0.5), ("a0", 2.0)]
    requests = [
        make_request(prompt_of(3 + 3 * i, seed=i), 2 + i, str(i), seed=i, adapter=name, adapter_scale=scale)
        for i, (name, scale) in enumerate(wishes)
    ]
    expected = ModelEngine(model, adapters=adapters).generate(requests)
    plain = [make_request(list(r.prompt_token_ids), r.sampling.max_tokens, r.request_id) for r in requests]
    assert expected != ModelEngine(model).generate(plain)
    engine = GpuEngine(model, device, adapters=adapters, max_num_batched_tokens=10, max_num_seqs=4)
    assert engine.generate(requests) == expected
    engine.check_nothing_is_left()


WISHES: list[dict[str, Any]] = [
    {"logprobs": 2, "prompt_logprobs": 1},
    {"temperature": 1.0, "repetition_penalty": 1.4, "presence_penalty": 0.5, "frequency_penalty": 0.5, "logprobs": 0},
    {"logit_bias": ((5, 3.0), (6, -100.0)), "min_tokens": 3, "stop_token_ids": tuple(range(200))},
    {"grammar": json_grammar(SCHEMAS[1]), "temperature": 1.0},
    {"max_tokens": 0, "pooling": "mean"},
    {"max_tokens": 0, "pooling": "last"},
    {"temperature": 0.9, "top_p": 0.9},
    {},
]


def test_what_the_host_has_a_say_in_is_as_on_the_cpu_and_the_rows_beside_it_too(device: torch.device) -> None:
    model = tiny_model(BYTES)
    requests = [
        make_request(
            prompt_of(2 + i, seed=i), request_id=str(i), seed=i, return_token_ids=True,
            **{"max_tokens": 4} | wish,
        )
        for i, wish in enumerate(WISHES)
    ]  # fmt: skip
    answers = []
    cpu = model_core(model, TorchModel, max_num_batched_tokens=24)
    gpu = GpuEngine(model, device, max_num_batched_tokens=24, max_num_seqs=8)
    for core in (cpu, gpu.core()):
        said = drain(core, *requests, limit_s=60)
        while core.has_work:
            core.step()
        answers.append([merged([item for item in items if isinstance(item, Delta)]) for items in said.values()])
    for expected, found in zip(*answers, strict=True):
        assert_same(found, expected)
    gpu.check_nothing_is_left()


def test_a_step_with_the_batch_of_the_one_before_uploads_nothing(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether it is greedy or random: only new sequences, another batch and new blocks are told to the card."""
    uploads: list[int] = []
    copy = slots.Upload.copy

    def counted(self: slots.Upload, *arguments: Any) -> torch.Tensor:
        uploads.append(len(arguments[0]))
        return copy(self, *arguments)

    monkeypatch.setattr(slots.Upload, "copy", counted)
    engine = GpuEngine(tiny_model(), device, block_size=8, max_num_seqs=2)
    for i, max_tokens in enumerate((7, 9)):
        engine.add(make_request(prompt_of(5, seed=i), max_tokens, str(i), temperature=0.7 * i))
    counts = []
    while engine.has_work:
        uploads.clear()
        engine.step()
        counts.append(len(uploads))
    # Prompts: slots and tokens. Then rows; two steps; two blocks, for position 8; two steps; a row less; two steps.
    assert counts == [2, 1, 0, 0, 1, 0, 0, 1, 0, 0]


@pytest.mark.parametrize("moment", some(["start", "finish"], 1, mark=SLOW_WITHOUT_GPU))
def test_a_step_that_fails_is_computed_again_without_the_request_at_fault(device: torch.device, moment: str) -> None:
    """It was launched, and the one before was not read yet: neither the host nor the card knows how far it got."""
    model = tiny_model(BYTES)
    kinds: list[dict[str, Any]] = [{}, {"temperature": 0.9}, {"temperature": 1.1, "top_k": 5, "logprobs": 0}]
    requests = [
        make_request(prompt_of(3 + 4 * i, seed=i), 5, str(i), seed=i, return_token_ids=True, **kind)
        for i, kind in enumerate(kinds)
    ]
    engine = GpuEngine(model, device, max_num_batched_tokens=13, max_num_seqs=4)
    core = engine.core()
    core.runner = FaultyRunner(core.runner, {"bad": 2}, moment)
    said = drain(core, make_request(prompt_of(5, seed=5), 9, "bad"), *requests)
    assert said.pop("bad")[-1].finish_reason == "error"
    expected = drain(model_core(model, TorchModel), *requests)
    assert [tokens_of(said[r.request_id]) for r in requests] == [tokens_of(expected[r.request_id]) for r in requests]
    engine.check_nothing_is_left()


def tokens_of(items: list[Any]) -> tuple[int, ...]:
    return merged([item for item in items if isinstance(item, Delta)]).token_ids


def test_a_run_is_the_same_by_messages_and_from_a_file(device: torch.device, tmp_path: Path) -> None:
    model = tiny_model(BYTES)
    kinds: list[dict[str, Any]] = [WISHES[0], WISHES[1], WISHES[3], {"temperature": 0.9, "top_p": 0.9}]
    requests = [
        make_request(prompt_of(2 + 3 * i, seed=i), 3, str(i), seed=i, return_token_ids=True, **kind)
        for i, kind in enumerate(kinds)
    ]
    expected = drain(model_core(model, TorchModel), *requests)
    engine = GpuEngine(model, device, max_num_batched_tokens=13, max_num_seqs=4)
    recorder = RecordingExecutor(engine.executor)
    engine.runner = PlanRunner(recorder)
    core = engine.core()
    said = drain(core, *requests)
    while core.has_work:
        core.step()
    for name, items in expected.items():
        ours, theirs = (merged([item for item in of if isinstance(item, Delta)]) for of in (said[name], items))
        assert_same(ours, theirs)
    recorder.save(tmp_path / "plans")
    fresh = GpuEngine(model, device, max_num_batched_tokens=13, max_num_seqs=4)
    assert replay(tmp_path / "plans", fresh.executor) == core.stats().num_steps_total


PENALTIES = {"temperature": 1.0, "frequency_penalty": 0.9, "presence_penalty": 0.5}


@pytest.mark.parametrize(
    ("shape", "kind"), each_value_once([{}, WINDOW], [{}, PENALTIES], mark=SLOW_WITHOUT_GPU), ids=str
)
def test_a_rewind_leaves_no_trace(device: torch.device, shape: dict, kind: dict[str, Any]) -> None:
    """Of tokens that were forced, or with penalties sampled; back over the border of a block."""
    model, request = tiny_model(**shape), make_request(prompt_of(6), 7, seed=2, **kind)
    expected = ModelEngine(model).generate([request])
    engine = GpuEngine(model, device, max_num_seqs=2)
    sequence = engine.add(request)

    @torch.inference_mode()
    def astray(step: SlotStep) -> None:
        for part in step.parts:
            if sequence.num_tokens > 8:
                forced_R = (part.computed.tokens_R + 1) % VOCABULARY
                engine.steps.replace_tokens(part.computed, [0], forced_R)

    while sequence.num_generated < 5:
        engine.step(astray)
    engine.read()
    engine.scheduler.rewind(sequence, sequence.num_generated - 2)
    engine.drain()
    assert [generated(sequence)] == expected
    engine.check_nothing_is_left()


def test_slots_of_sequences_that_ended_are_used_again(device: torch.device) -> None:
    model = tiny_model()
    requests = [make_request(prompt_of(2 + i, seed=i), 1 + i % 2, str(i), seed=i, temperature=0.5) for i in range(5)]
    expected = ModelEngine(model).generate(requests)
    engine = GpuEngine(model, device, max_num_seqs=2)
    assert engine.generate(requests) == expected
    engine.check_nothing_is_left()


@pytest.mark.parametrize("shape", [WINDOW, {"num_hidden_layers": 2, "qk_norm": True, "use_xpos": False}], ids=str)
def test_steps_that_decode_give_the_oracles_distributions(device: torch.device, shape: dict) -> None:
    model, tokens = tiny_model(**shape), prompt_of(20)
    engine = GpuEngine(model, device, max_num_batched_tokens=10, max_num_seqs=2)
    found = engine.teacher_forced(tokens, 18)
    expected = oracle.logprobs(model.state_dict(), model.config, tokens)[17:]
    assert (found - expected).abs().max() <= 1e-4
    engine.check_nothing_is_left()
