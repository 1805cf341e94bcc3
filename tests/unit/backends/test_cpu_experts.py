"""Models with experts on the CPU kernels: quantized, with adapters, in batches; what is packed, and what is not."""

import copy
from functools import partial

import pytest
import torch

from stellarbyte.backends.cpu_model import CpuModel, fits
from stellarbyte.model.transformer import ByteTransformer
from stellarbyte.ops.cpu.packing import pack, unpack
from tests.support.cases import SLOW
from tests.support.engines.engine import ModelEngine, make_request
from tests.support.models import oracle
from tests.support.models.adapters import random_adapter
from tests.support.models.byte_transformer import EXPERT_VARIANTS, EXPERTS, W, make_config, make_model, random_tokens

SIZES = {"hidden_size": 64, "intermediate_size": 128, "moe_intermediate_size": 64, "initializer_range": 0.1}
MIXED = EXPERTS | SIZES | {"moe_layers": [0, 2], "sliding_window": W, "sink_tokens": 4}
SHARED = {"shared_expert_intermediate_size": 64, "shared_expert_gate": True}
float32 = partial(CpuModel, quantization="none", num_threads=2)


@torch.no_grad()
def as_stored(model: ByteTransformer, quantization: str) -> ByteTransformer:
    """A copy with the numbers that the CPU stores: all matrices are rounded but the embedding, the routers and the
    gates of shared experts, and of the head none to 4 bits."""
    rounded = copy.deepcopy(model)
    for name, parameter in rounded.named_parameters():
        if parameter.dim() == 1 or "embed_tokens" in name or "mlp.gate." in name or "shared_expert_gate" in name:
            continue
        kind = "int8" if quantization == "int4" and name == "lm_head.weight" else quantization
        for matrix in parameter if parameter.dim() == 3 else parameter[None]:
            matrix.copy_(torch.from_numpy(unpack(pack(matrix.numpy(), kind))[: len(matrix)]))
    return rounded


@pytest.mark.parametrize(
    ("shared", "quantization"),
    [
        pytest.param({}, "none", id="alone"),
        pytest.param(SHARED, "int4", id="shared, int4"),
        pytest.param(SHARED, "none", id="shared", marks=SLOW),
        pytest.param({}, "int4", id="int4", marks=SLOW),
        pytest.param({}, "int8", id="int8", marks=SLOW),
        pytest.param(SHARED, "int8", id="shared, int8", marks=SLOW),
    ],
)
def test_chunks_adapters_and_quantization_equal_the_torch_backend(shared: dict[str, object], quantization: str) -> None:
    """A prompt in chunks and then each token, past several windows, alone and with an adapter of attention and of the
    dense MLP."""
    model, tokens = make_model(**MIXED, **shared), random_tokens(4 * W)
    adapters = {"a": random_adapter(model.config, seed=1)}
    reference = ModelEngine(as_stored(model, quantization), adapters=adapters)
    backend = partial(CpuModel, quantization=quantization, num_threads=2)
    engine = ModelEngine(model, backend=backend, adapters=adapters, max_num_batched_tokens=17)
    for name in (None, "a"):
        expected = reference.teacher_forced(tokens, 3 * W, adapter=name)
        tolerance = 1e-4 if quantization == "none" else 5e-4  # activations of 16 bits
        assert (engine.teacher_forced(tokens, 3 * W, adapter=name) - expected).abs().max() <= tolerance


@pytest.mark.parametrize("quantization", [pytest.param("int8", marks=SLOW), "int4"])
def test_a_quantized_model_is_close_to_its_original(quantization: str) -> None:
    model, tokens = make_model(**MIXED, **SHARED), random_tokens(40)
    expected = oracle.logprobs(model.state_dict(), model.config, tokens)
    engine = ModelEngine(model, backend=partial(CpuModel, quantization=quantization, num_threads=2))
    actual = engine.teacher_forced(tokens, 20).double()
    divergence = (expected[19:].exp() * (expected[19:] - actual)).sum(dim=-1).mean().item()
    assert 0 < divergence < {"int8": 1e-3, "int4": 5e-2}[quantization]


def test_a_batch_gets_its_single_run_tokens() -> None:
    model = make_model(**EXPERT_VARIANTS["experts, shared with a gate, some layers dense"])
    requests = [
        make_request(random_tokens(3 + 5 * i, seed=i), 12 + i, str(i), seed=i, temperature=float(i % 2))
        for i in range(9)
    ]
    alone = [ModelEngine(model, backend=float32).generate([request])[0] for request in requests]
    assert ModelEngine(model, backend=float32, max_num_batched_tokens=16).generate(requests) == alone


def test_layers_of_a_pool_share_its_experts_and_layers_hold_only_what_they_have() -> None:
    model = make_model(**EXPERTS, moe_layers=[0, 2], expert_pools=[3, 3], shared_expert_intermediate_size=16)
    layers = float32(model, model.config).layers
    experts = layers.experts
    assert experts is not None
    assert experts.pools_L.tolist() == [0, -1, 0] and experts.places_L.tolist() == [0, -1, 1]
    assert [len(part.weights) for part in (experts.gate_up, experts.down)] == [6 * 3, 6 * 3]  # panels of one pool
    assert len(experts.routers.weights_MPCR) == len(experts.shared_down.weights) == 2
    assert layers.gate_up.places_L.tolist() == layers.down.places_L.tolist() == [-1, 0, -1]
    assert len(layers.gate_up.weights) == len(layers.down.weights) == 1


def test_a_model_of_experts_alone_holds_no_dense_mlp() -> None:
    model = make_model(**EXPERTS)
    layers = float32(model, model.config).layers
    assert layers.gate_up.weights.size == layers.down.weights.size == 0


def test_the_weights_of_modules_are_those_of_the_model() -> None:
    model = make_model(**EXPERTS, moe_layers=[0, 2], shared_expert_intermediate_size=21)
    served = float32(model, model.config)
    names = ["mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj", "mlp.shared_expert.down_proj"]
    names = [f"model.layers.2.{name}" for name in (*names, "self_attn.v_proj")]
    for name in (*names, "model.layers.1.mlp.up_proj", "model.layers.1.mlp.down_proj"):
        assert torch.equal(served.weight(name), model.get_parameter(f"{name}.weight")), name


@pytest.mark.parametrize("variant", EXPERT_VARIANTS)
def test_choices_by_a_share_and_clamped_experts_are_left_to_torch(variant: str) -> None:
    config = make_config(**EXPERT_VARIANTS[variant])
    assert fits(config) == (config.router_top_p is None and config.swiglu_limit is None)
    assert not fits(make_config(**EXPERT_VARIANTS[variant], head_dim=8))


def test_quantization_that_does_not_fit_the_experts_says_so() -> None:
    model = make_model(**EXPERTS | SIZES | {"moe_intermediate_size": 96})
    with pytest.raises(ValueError, match="int8 needs matrices with a multiple of 64 columns; one has 96"):
        CpuModel(model, model.config, quantization="int8", num_threads=2)
