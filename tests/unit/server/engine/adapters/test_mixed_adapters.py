"""Rows of many adapters in one batch against the same requests alone on merged float32 weights."""

from functools import partial

import numpy as np
import pytest
import torch

from stellarbyte import ByteTransformer
from stellarbyte.backends.cpu_model import CpuModel
from stellarbyte.lora.bank import EMBEDDING, HEAD, LoraBank, pack_adapter
from stellarbyte.ops.cpu.linear import NO_ACTIVATION, PLAIN, linear
from stellarbyte.ops.cpu.packing import pack
from stellarbyte.sampling.sampler import RowSampling
from stellarbyte_server.protocol.request import GenerationRequest
from tests.support.cases import each_value_once
from tests.support.engines.engine import BACKENDS, Backend, ModelEngine, generated, make_request, sampling_by
from tests.support.models import oracle
from tests.support.models.adapters import merged, random_adapter
from tests.support.models.byte_transformer import EXPERTS, VARIANTS, make_config, make_model, random_tokens

MODELS = {
    "gated parts of 8": {},
    "biases, odd sizes": {"attention_bias": True, "mlp_bias": True, "intermediate_size": 77, "vocab_size": 101},
    "parallel": VARIANTS["parallel"],
    "deepnorm": VARIANTS["deepnorm"],
    "window, sinks, XPos": VARIANTS["xpos window sinks"],
    "norms after": VARIANTS["norms after"],
    "norms before and after": VARIANTS["norms before and after"],
    "factors": VARIANTS["rotation of a part, not in all layers"] | {"logits_softcap": 3.0},
}


@pytest.mark.parametrize(("shape", "backend"), each_value_once(list(MODELS), BACKENDS))
def test_every_token_of_an_adapted_request_matches_the_oracle(shape: str, backend: Backend) -> None:
    model = make_model(**MODELS[shape])
    adapter = random_adapter(model.config, seed=1, share=0.7)
    tokens = random_tokens(60)
    for scale in (1.0, 0.25, 3.0):
        expected = oracle.logprobs(merged(model, adapter, scale).state_dict(), model.config, tokens)
        engine = ModelEngine(model, backend=backend, adapters={"a": adapter}, max_num_batched_tokens=7)
        found = engine.teacher_forced(tokens, 20, adapter="a", adapter_scale=scale)
        assert (found - expected[19:]).abs().max() <= 1e-4


@pytest.mark.parametrize("backend", BACKENDS)
def test_adapters_of_attention_are_exact_beside_experts(backend: Backend) -> None:
    model = make_model(**EXPERTS, moe_layers=[0, 2], shared_expert_intermediate_size=16)
    adapter = random_adapter(model.config, seed=1)
    adapted = {module.split(".", 3)[3] for module in adapter.weights}
    assert {"self_attn.q_proj", "mlp.up_proj"} <= adapted and not any("expert" in module for module in adapted)
    assert not any(module.startswith("model.layers.2.mlp") for module in adapter.weights)
    tokens = random_tokens(40)
    expected = oracle.logprobs(merged(model, adapter, 0.7).state_dict(), model.config, tokens)
    engine = ModelEngine(model, backend=backend, adapters={"a": adapter}, max_num_batched_tokens=7)
    found = engine.teacher_forced(tokens, 20, adapter="a", adapter_scale=0.7)
    assert (found - expected[19:]).abs().max() <= 1e-4


@pytest.mark.parametrize(("seed", "backend"), each_value_once(range(3), BACKENDS))
def test_a_mixed_batch_equals_each_request_alone_on_merged_weights(backend: Backend, seed: int) -> None:
    """Greedy and seeded, 4 adapters and the base, ranks and scales of all sizes, chunked prefill, prefix cache on.

    Tokens are those of the merged model, and log-probabilities within 1e-4 of the float64 oracle's on its weights.
    """
    model = make_model(seed)
    adapters = {f"a{i}": random_adapter(model.config, seed=10 * seed + i, share=0.8) for i in range(4)}
    names = [None, *adapters]
    requests = [
        make_request(
            random_tokens(5 + 3 * i, seed=i // 3),  # some share a prompt, with other adapters or scales
            12,
            str(i),
            seed=i,
            temperature=0.8 * (i % 2),
            adapter=names[i % 5],
            adapter_scale=(1.0, 0.5, 2.0)[i % 3],
        )
        for i in range(15)
    ]
    engine = ModelEngine(model, backend=backend, adapters=adapters, max_num_batched_tokens=13, num_blocks=200)
    together, logprobs = generate_with_logprobs(engine, requests)
    assert engine.generate(requests) == together  # now with a warm cache
    assert engine.scheduler.totals.prefix_hits > 0
    for request, tokens, found in zip(requests, together, logprobs, strict=True):
        alone = (
            model if request.adapter is None else merged(model, adapters[request.adapter.name], request.adapter_scale)
        )
        prompt = list(request.prompt_token_ids)
        expected = oracle.logprobs(alone.state_dict(), model.config, prompt + tokens)
        assert (found - expected[len(prompt) - 1 : -1]).abs().max() <= 1e-4
        plain = make_request(list(request.prompt_token_ids), 12, seed=request.sampling.seed,
                             temperature=request.sampling.temperature)  # fmt: skip
        assert ModelEngine(alone, backend=backend).generate([plain]) == [tokens]


@pytest.mark.parametrize(
    ("shape", "backend"), each_value_once(["biases, odd sizes", "parallel", "norms after", "factors"], BACKENDS)
)
def test_dora_replaced_heads_and_plain_adapters_in_one_batch_match_the_oracle(backend: Backend, shape: str) -> None:
    model = make_model(**MODELS[shape])
    adapters = {
        name: random_adapter(model.config, seed, share=0.8, dora=dora, replaced=replaced)
        for seed, (name, dora, replaced) in enumerate(
            [("dora", 1.0, (HEAD,)), ("some", 0.5, (HEAD, EMBEDDING)), ("plain", 0.0, ())]
        )
    }
    assert 0 < len(adapters["some"].factors) < len(adapters["some"].weights)
    tokens = random_tokens(60)
    engine = ModelEngine(model, backend=backend, adapters=adapters, max_num_batched_tokens=13, num_blocks=200)
    names = ["dora", None, "some", "plain", "dora"]
    requests = [
        make_request(
            random_tokens(9 + i, seed=i), 8, str(i), seed=i, adapter=name, adapter_scale=0.5 if i == 4 else 1.0
        )
        for i, name in enumerate(names)
    ]
    together, logprobs = generate_with_logprobs(engine, requests)
    for request, generated_tokens, found in zip(requests, together, logprobs, strict=True):
        name, scale = request.adapter and request.adapter.name, request.adapter_scale
        alone = model if name is None else merged(model, adapters[name], scale)
        prompt = list(request.prompt_token_ids)
        expected = oracle.logprobs(alone.state_dict(), model.config, prompt + generated_tokens)
        assert (found - expected[len(prompt) - 1 : -1]).abs().max() <= 1e-4
    expected = oracle.logprobs(merged(model, adapters["dora"], 0.25).state_dict(), model.config, tokens)
    forced = engine.teacher_forced(tokens, 20, adapter="dora", adapter_scale=0.25)
    assert (forced - expected[19:]).abs().max() <= 1e-4


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_mix_of_adapters_beside_its_parts_equals_both_merged(backend: Backend) -> None:
    """With a scale of each and one of the request, which multiplies the whole mix."""
    model = make_model()
    parts = {
        f"a{i}": random_adapter(
            model.config, seed=i, ranks=(1, 3, 5), share=0.7, dora=(0.0, 0.6, 0.6)[i], replaced=(HEAD, EMBEDDING)[:i]
        )
        for i in range(3)
    }
    scales = {"a0": 0.5, "a1": 2.0, "a2": 1.0}
    packed = [(adapter.packed(model.config), scales[name]) for name, adapter in parts.items()]
    engine = ModelEngine(model, backend=backend, adapters=parts, num_mixes=1, max_num_batched_tokens=7)
    engine.add_mix("a0+a1+a2", packed)
    tokens = random_tokens(60)
    for scale in (1.0, 0.5):
        weights = {name: tensor.double() for name, tensor in model.state_dict().items()}
        for name, adapter in parts.items():  # what each adds to the base's weights
            for key, tensor in merged(model, adapter, scales[name] * scale).state_dict().items():
                weights[key] = weights[key] + (tensor.double() - model.state_dict()[key].double())
        expected = oracle.logprobs({key: tensor.float() for key, tensor in weights.items()}, model.config, tokens)
        together = [
            make_request(tokens[:20], 4, str(i), seed=i, adapter=name, adapter_scale=scale)
            for i, name in enumerate(["a0", "a0+a1+a2", None, "a2"])
        ]
        engine.generate(together)
        found = engine.teacher_forced(tokens, 20, adapter="a0+a1+a2", adapter_scale=scale)
        assert (found - expected[19:]).abs().max() <= 1e-4


def generate_with_logprobs(
    engine: ModelEngine, requests: list[GenerationRequest]
) -> tuple[list[list[int]], list[torch.Tensor]]:
    """The tokens of requests that run together, no two with one seed, and of each the log-probabilities that its tokens
    were drawn from."""
    sequences = [engine.add(request) for request in requests]
    rows: dict[int, list[torch.Tensor]] = {request.sampling.seed: [] for request in requests}
    sample = engine.executor.model.sample

    def note(logits_RV: torch.Tensor, sampling: list[RowSampling]) -> list[int]:
        for row, logits_V in zip(sampling, logits_RV, strict=True):
            rows[row.seed].append(logits_V.log_softmax(dim=-1))
        return sample(logits_RV, sampling)

    with sampling_by(engine.executor, note):
        while engine.scheduler.has_work:
            engine.step()
    return [generated(sequence) for sequence in sequences], [torch.stack(rows[r.sampling.seed]) for r in requests]


@pytest.mark.parametrize(("quantization", "dora"), each_value_once(["int8", "int4"], [0.0, 1.0]))
def test_what_adapters_add_to_quantized_weights_is_not_quantized(quantization: str, dora: float) -> None:
    """The same tokens as on float32 weights that were rounded as the quantization rounds, then merged."""
    model = make_model(hidden_size=64, intermediate_size=128)
    adapter = random_adapter(model.config, seed=3, dora=dora)
    rounded = ByteTransformer(model.config).eval()
    rounded.load_state_dict(model.state_dict())
    with torch.no_grad():
        for name, module in rounded.named_modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.copy_(as_multiplied(module.weight, "int8" if name == "lm_head" else quantization))
    engine = ModelEngine(
        model, backend=partial(CpuModel, quantization=quantization, num_threads=2), adapters={"a": adapter}
    )
    expected = ModelEngine(merged(rounded, adapter)).teacher_forced(random_tokens(40), 20)
    found = engine.teacher_forced(random_tokens(40), 20, adapter="a")
    assert (found - expected).abs().max() <= 3e-3  # activations of 16 bits
    served = engine.executor.model
    for name in (*adapter.weights, HEAD, EMBEDDING):  # what DoRA's norms and replaced heads are computed from
        torch.testing.assert_close(served.weight(name), rounded.get_submodule(name).weight, rtol=0, atol=1e-5)


def as_multiplied(weight: torch.Tensor, quantization: str) -> torch.Tensor:
    """The weight that the kernel multiplies by once it was packed: its product with the identity."""
    rows, columns = weight.shape
    out = np.zeros((columns, rows), np.float32)
    nothing, no_addend = np.zeros(0, np.float32), np.zeros((0, 0), np.float32)
    packed = pack(weight.detach().numpy(), quantization)
    linear(np.eye(columns, dtype=np.float32), tuple(packed), nothing, no_addend, out, NO_ACTIVATION, PLAIN, 2)
    return torch.from_numpy(out.T.copy())


def test_content_is_never_shared_across_adapters_or_scales() -> None:
    model = make_model()
    adapters = {name: random_adapter(model.config, seed=i) for i, name in enumerate("ab")}
    engine = ModelEngine(model, adapters=adapters, num_blocks=200)
    prompt = random_tokens(40)
    hits = []
    for adapter, scale in ((None, 1.0), ("a", 1.0), ("b", 1.0), ("a", 0.5), ("a", 1.0), (None, 1.0)):
        before = engine.scheduler.totals.prefix_hits
        engine.generate([make_request(prompt, 2, adapter=adapter, adapter_scale=scale)])
        hits.append(engine.scheduler.totals.prefix_hits - before > 0)
    assert hits == [False, False, False, False, True, True]


def test_a_cleared_slot_adds_nothing_and_gives_its_memory_back() -> None:
    config = make_config()
    bank = LoraBank(config, 2, 16)
    first, second = (random_adapter(config, seed=i) for i in range(2))
    for slot, adapter in enumerate((first, second), 1):
        bank.fill(slot, pack_adapter(adapter.weights, adapter.scales, config, torch.float32))
    bank.clear(1)
    assert bank.ranks_SLP[1].sum() == 0 and bank.ranks_SLP[2].sum() > 0
    assert not bank.numbers_SF[1].any() and bank.numbers_SF[2].any()
