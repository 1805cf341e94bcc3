"""Activated adapters (aLoRA) in every executor, against PEFT's own logits; and what they share in the prefix cache."""

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaForCausalLM

from stellarbyte import ByteTransformer
from stellarbyte.checkpoint.convert import convert
from stellarbyte.checkpoint.native import load_model
from stellarbyte.lora import load_adapter, read_adapter
from stellarbyte.lora.adapted_model import adaptable_layers
from stellarbyte.lora.layers import weight_shape
from stellarbyte_server.engine.drafts.drafts import Drafts
from stellarbyte_server.engine.events.form import BlockStored, CacheKind
from stellarbyte_server.engine.state.cache_log import CacheLog
from stellarbyte_server.protocol.adapter_reference import AdapterReference
from stellarbyte_server.protocol.messages import Delta
from stellarbyte_server.protocol.request import GenerationRequest
from tests.support.cases import SLOW_WITHOUT_GPU
from tests.support.engines.drafting import Guesses, drafting_core
from tests.support.engines.engine import BACKENDS, Backend, ModelEngine, generated, make_request
from tests.support.engines.engine_core import VOCABULARY as DRAFTED_VOCABULARY
from tests.support.engines.engine_core import drain
from tests.support.gpu.gpu_engine import GpuEngine, own_stream
from tests.support.models.adapters import RandomAdapter
from tests.support.models.byte_transformer import make_model
from tests.support.models.hugging_face import tiny_llama

INVOCATION = (9, 7)
VOCABULARY = 60
Engine = ModelEngine | GpuEngine


@dataclass
class Activated:
    """A Llama with an activated adapter, in PEFT and here."""

    peft: PeftModel
    folder: Path  # of the adapter
    model: ByteTransformer
    adapter: RandomAdapter

    def add_to(self, engine: Engine) -> Engine:
        """The adapter as "activated", beside the same weights as "plain" and another adapter as "other"."""
        engine.versions["activated"].invocation = INVOCATION
        engine.versions["other"].invocation = (5,)
        return engine

    @property
    def adapters(self) -> dict[str, RandomAdapter]:
        return dict.fromkeys(("activated", "plain", "other"), self.adapter)

    @torch.no_grad()
    def logprobs(self, tokens: list[int], start: int | None) -> torch.Tensor:
        """[T, V] by PEFT, with the adapter from position `start` on; None: nowhere."""
        offsets = [None if start is None else len(tokens) - start]
        logits_BTV = self.peft(torch.tensor([tokens]), alora_offsets=offsets).logits
        return logits_BTV[0].double().log_softmax(dim=-1)


@pytest.fixture(scope="module")
def activated(tmp_path_factory: pytest.TempPathFactory) -> Activated:
    folder = tmp_path_factory.mktemp("activated")
    llama = tiny_llama(
        folder / "llama", vocab_size=VOCABULARY, hidden_size=32, num_attention_heads=2, num_key_value_heads=1,
        num_hidden_layers=2, head_dim=16, with_tokenizer=False,
    )  # fmt: skip
    torch.manual_seed(0)
    config = LoraConfig(
        task_type="CAUSAL_LM", r=4, target_modules="all-linear", alora_invocation_tokens=list(INVOCATION)
    )
    peft = get_peft_model(LlamaForCausalLM.from_pretrained(llama), config).eval()
    for name, parameter in peft.named_parameters():
        if ".lora_B." in name:
            parameter.data.normal_(std=0.3)
    peft.save_pretrained(folder / "adapter")
    model = load_model(convert(llama, folder / "ours"))
    files = folder / "adapter" / "adapter_config.json", folder / "adapter" / "adapter_model.safetensors"
    shapes = {name: weight_shape(layer) for name, layer in adaptable_layers(model).items()}
    read = read_adapter(*files, shapes, max_rank=8)
    assert read.config.alora_invocation_tokens == INVOCATION
    adapter = RandomAdapter(read.weights, {name: read.scale_of(name) for name in read.weights}, {})
    return Activated(peft, folder / "adapter", model, adapter)


def text(*parts: int | list[int], seed: int = 0) -> list[int]:
    """Tokens other than the invocation's, as many as numbers say, and lists as they are."""
    chance, tokens = random.Random(seed), list[int]()
    for part in parts:
        tokens += part if isinstance(part, list) else [chance.randrange(10, VOCABULARY) for _ in range(part)]
    return tokens


CALL = list(INVOCATION)
PROMPTS = {
    "absent": (text(14), None),
    "once": (text(6, CALL, 6), 6),
    "twice": (text(2, CALL, 5, CALL, 3), 9),
    "at the start": (text(CALL, 12), 0),
    "at the end": (text(12, CALL), 12),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", PROMPTS)
def test_logits_are_pefts_at_every_token(activated: Activated, backend: Backend, case: str) -> None:
    """In chunks of 5 tokens; what is generated repeats the invocation, which changes nothing."""
    prompt, start = PROMPTS[case]
    tokens = prompt + text(2, CALL, 4, seed=1)
    engine = activated.add_to(
        ModelEngine(activated.model, backend=backend, adapters=activated.adapters, max_num_batched_tokens=5)
    )
    expected = activated.logprobs(tokens, start)[len(prompt) - 1 :]
    for _ in range(2):  # the second time with a warm cache
        found = engine.teacher_forced(tokens, len(prompt), adapter="activated")
        assert (found - expected).abs().max() <= 1e-4
    plain = engine.teacher_forced(tokens, len(prompt), adapter="plain")
    assert (plain - activated.logprobs(tokens, 0)[len(prompt) - 1 :]).abs().max() <= 1e-4
    if start != 0:
        assert (plain - expected).abs().max() > 0.01


@pytest.mark.parametrize("case", [pytest.param(case, marks=SLOW_WITHOUT_GPU) for case in PROMPTS])
def test_logits_are_pefts_on_the_gpu(activated: Activated, device: torch.device, case: str) -> None:
    prompt, start = PROMPTS[case]
    tokens = prompt + text(2, seed=1)
    with own_stream(device):
        engine = activated.add_to(
            GpuEngine(activated.model, device, adapters=activated.adapters, max_num_batched_tokens=12)
        )
        found = engine.teacher_forced(tokens, len(prompt), adapter="activated")
    assert (found - activated.logprobs(tokens, start)[len(prompt) - 1 :]).abs().max() <= 1e-4


def is_greedy_by_peft(activated: Activated, request: GenerationRequest, tokens: list[int]) -> bool:
    """Whether each token is PEFT's likeliest one, or as good as that."""
    prompt = list(request.prompt_token_ids)
    name = None if request.adapter is None else str(request.adapter)
    starts = {tuple(given): start for given, start in PROMPTS.values()}
    start = {None: None, "plain": 0}.get(name, starts.get(tuple(prompt)))
    logprobs_TV = activated.logprobs(prompt + tokens, start)[len(prompt) - 1 : -1]
    chosen_T = logprobs_TV.gather(1, torch.tensor(tokens)[:, None])[:, 0]
    return bool((logprobs_TV.max(dim=1).values - chosen_T).max() <= 1e-3)


def mixed_requests(num_tokens: int) -> list[GenerationRequest]:
    """Every prompt for the activated adapter, the same weights as a plain one, and the model alone."""
    names = ("activated", "plain", None)
    return [
        make_request(prompt, num_tokens, f"{case} {name}", adapter=name)
        for case, (prompt, _) in PROMPTS.items()
        for name in names
    ]


@pytest.mark.parametrize("backend", BACKENDS)
def test_mixed_batches_chunks_and_preemptions_change_no_answer(activated: Activated, backend: Backend) -> None:
    engine = activated.add_to(
        ModelEngine(
            activated.model, backend=backend, adapters=activated.adapters, max_num_batched_tokens=11, num_blocks=16
        )
    )
    requests = mixed_requests(14)
    answers = engine.generate(requests)
    assert engine.scheduler.totals.num_preemptions > 0
    for request, tokens in zip(requests, answers, strict=True):
        assert is_greedy_by_peft(activated, request, tokens), request.request_id
    assert len({tuple(tokens) for tokens in answers}) > len(PROMPTS)


def test_a_mixed_batch_on_the_gpu(activated: Activated, device: torch.device) -> None:
    wanted = ("once activated", "once plain", "absent activated")
    requests = [request for request in mixed_requests(2) if request.request_id in wanted]
    with own_stream(device):
        engine = activated.add_to(
            GpuEngine(activated.model, device, adapters=activated.adapters, max_num_batched_tokens=32)
        )
        answers = engine.generate(requests)
        engine.check_nothing_is_left()
    for request, tokens in zip(requests, answers, strict=True):
        assert is_greedy_by_peft(activated, request, tokens), request.request_id


def cached(engine: Engine, prompt: list[int], adapter: str | None, **fields: Any) -> int:
    """Tokens of a prompt that are in the cache; it is computed, and answered with one token."""
    sequence = engine.add(make_request(prompt, 1, adapter=adapter, **fields))
    while engine.scheduler.has_work:
        engine.step()
    assert len(generated(sequence)) == 1
    return sequence.num_cached


def test_blocks_before_the_invocation_are_the_models(activated: Activated) -> None:
    """Blocks of 4 tokens; the invocation begins in the fourth one."""
    prompt = text(14, CALL, 9)

    def fresh() -> Engine:
        return activated.add_to(ModelEngine(activated.model, adapters=activated.adapters))

    engine = fresh()
    assert [cached(engine, prompt, name) for name in (None, "activated", "activated", None)] == [0, 12, 24, 24]
    engine = fresh()
    assert [cached(engine, prompt, name) for name in ("activated", None, "plain")] == [0, 12, 0]
    engine = fresh()
    assert [cached(engine, prompt, name) for name in ("other", None, "activated")] == [0, 24, 12]  # never invoked
    assert cached(engine, prompt, "activated", adapter_scale=0.5) == 12
    assert cached(engine, prompt, "activated", cache_salt="x") == 0
    assert cached(engine, prompt, None, cache_salt="x") == 12


def test_equal_tokens_with_another_invocation_are_other_blocks(activated: Activated) -> None:
    """An answer that repeats the invocation, then a prompt that holds it: there the adapter begins later, in one case
    in the same block."""
    for gap in (0, 7):
        first = text(5, CALL)
        second = first + text(gap, CALL, 6)
        engine = activated.add_to(ModelEngine(activated.model, adapters=activated.adapters))
        engine.teacher_forced(second, len(first), adapter="activated")
        assert cached(engine, second, "activated") == 4
        found = engine.teacher_forced([*second, 3], len(second), adapter="activated")
        expected = activated.logprobs([*second, 3], len(first) + gap)[len(second) - 1 :]
        assert (found - expected).abs().max() <= 1e-4


@pytest.mark.parametrize("backend", BACKENDS)
def test_windows_and_sinks(activated: Activated, backend: Backend) -> None:
    config = type(activated.model.config).from_dict(
        activated.model.config.to_dict() | {"sliding_window": 7, "sink_tokens": 2}
    )
    model = ByteTransformer(config).eval()
    model.load_state_dict(activated.model.state_dict())
    engine = activated.add_to(
        ModelEngine(model, backend=backend, adapters=activated.adapters, max_num_batched_tokens=5)
    )
    prompt = text(13, CALL, 9)
    tokens = prompt + text(12, seed=1)
    found = engine.teacher_forced(tokens, len(prompt), adapter="activated")
    load_adapter(model, activated.folder)
    with torch.no_grad():
        expected = model(torch.tensor([tokens])).logits[0].log_softmax(dim=-1)[len(prompt) - 1 :]
    assert (found - expected).abs().max() <= 1e-4


def test_events_name_the_adapter_from_its_invocation_on(activated: Activated) -> None:
    """As vLLM's extra keys: nothing for blocks of the model alone, and all that the others depend on."""
    engine = activated.add_to(ModelEngine(activated.model, adapters=activated.adapters))
    engine.scheduler.pool.log = log = CacheLog()
    prompt = text(6, CALL, 5)
    cached(engine, prompt, "activated", adapter_scale=0.5)
    first, second = CacheKind(medium="CPU", window=None).events(log.take())
    assert isinstance(first, BlockStored) and isinstance(second, BlockStored)
    assert (first.lora_name, first.token_ids, first.extra_keys) == (None, prompt[:4], [None])
    assert (second.lora_name, second.token_ids) == ("activated", prompt[4:12])
    assert second.extra_keys == [("activated", "activated", 0.5, 6)] * 2
    assert second.parent_block_hash == first.block_hashes[0]
    cached(engine, prompt, None)
    (rest,) = CacheKind(medium="CPU", window=None).events(log.take())
    assert isinstance(rest, BlockStored)
    assert (rest.lora_name, rest.token_ids, rest.extra_keys) == (None, prompt[4:12], [None, None])


def test_drafts_change_no_answer() -> None:
    """Prompts in chunks, answers that repeat the invocation, and guesses of which some are right."""
    model = make_model(vocab_size=DRAFTED_VOCABULARY)
    requests = [
        make_request(
            text(5, CALL * (number % 3 > 0), 9, seed=number) * 2, 20, str(number), adapter="a", return_token_ids=True,
            ignore_eos=True,
        )
        for number in range(6)
    ]  # fmt: skip

    def answers(drafts: Drafts | None) -> dict[str, list[int]]:
        core = drafting_core(model, drafts, max_num_batched_tokens=16, num_blocks=200)
        core.adapters.bind(AdapterReference.parse("a")).invocation = INVOCATION
        said = drain(core, *requests, limit_s=600)
        return {name: [token for delta in deltas if isinstance(delta, Delta) for token in delta.token_ids]
                for name, deltas in said.items()}  # fmt: skip

    expected = answers(None)
    drafts = Guesses(expected, random.Random(0))
    assert answers(drafts) == expected
    assert drafts.totals.num_accepted_tokens > 0
    assert len({tuple(tokens) for tokens in expected.values()}) == len(requests)
