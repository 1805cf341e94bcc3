"""Models with experts on the GPU engine against the float64 oracle; on a CPU by Triton's interpreter."""

import copy

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from stellarbyte.backends.gpu.model import TritonModel
from stellarbyte.model.transformer import ByteTransformer
from stellarbyte.ops.triton.weights import Weight, dequantized, quantize
from tests.support.cases import SLOW_WITHOUT_GPU, some
from tests.support.engines.engine import ModelEngine
from tests.support.gpu.gpu_engine import GpuEngine, own_stream
from tests.support.models import oracle
from tests.support.models.adapters import random_adapter
from tests.support.models.byte_transformer import EXPERT_VARIANTS, EXPERTS, make_model, random_tokens

REFUSED = {"experts by share": "router_top_p"}
SERVED = {name: fields for name, fields in EXPERT_VARIANTS.items() if name not in REFUSED}
SHOWN = list(SERVED).index("experts, shared with a gate, some layers dense")
FIRST, LENGTH = 11, 14  # the prompt is one step, then each token


@pytest.mark.parametrize("variant", some(list(SERVED), SHOWN, mark=SLOW_WITHOUT_GPU))
def test_logprobs_equal_the_oracles(variant: str, device: torch.device) -> None:
    model, tokens = make_model(**SERVED[variant]), random_tokens(LENGTH)
    expected = oracle.logprobs(model.state_dict(), model.config, tokens)[FIRST - 1 :]
    with own_stream(device):
        engine = GpuEngine(model, device, num_blocks=20, max_num_seqs=2)
        assert (engine.teacher_forced(tokens, FIRST) - expected).abs().max() <= 1e-4


@torch.no_grad()
def rounded_to_8_bits(model: ByteTransformer, quantization: str) -> ByteTransformer:
    """A copy whose weights are those that int8 or fp8 stores: of all products but the routers' and the shared experts'
    gates, with a scale for each output; of the head always int8."""
    rounded = copy.deepcopy(model)
    for name, parameter in rounded.named_parameters():
        if parameter.dim() == 1 or "embed_tokens" in name or "mlp.gate." in name or "shared_expert_gate" in name:
            continue
        matrices = parameter if parameter.dim() == 3 else parameter[None]
        for matrix in matrices:
            stored = quantize(Weight(matrix_NK=matrix), "int8" if name == "lm_head.weight" else quantization)
            matrix.copy_(dequantized(stored, torch.float32))
    return rounded


@pytest.mark.slow_without_gpu
@pytest.mark.parametrize("quantization", ["none", "int8", "fp8"])
@pytest.mark.parametrize("shared_size", [0, 40])
def test_prompts_adapters_and_quantization_equal_the_torch_backend(
    shared_size: int, quantization: str, device: torch.device
) -> None:
    """A prompt of many rows in one step and then each token, alone and with an adapter of attention and dense MLPs."""
    if quantization == "fp8" and device.type == "cpu":
        pytest.skip("Triton's interpreter has no arithmetic for fp8 numbers")
    fields = {"shared_expert_intermediate_size": shared_size, "shared_expert_gate": shared_size > 0}
    model, tokens = make_model(**EXPERTS, **fields, moe_layers=[0, 2]), random_tokens(42)
    adapters = {"a": random_adapter(model.config, seed=1)}
    reference = ModelEngine(
        model if quantization == "none" else rounded_to_8_bits(model, quantization), adapters=adapters
    )
    with own_stream(device):
        engine = GpuEngine(model, device, adapters=adapters, quantization=quantization, num_blocks=20, max_num_seqs=2)
        for name in (None, "a"):
            expected = reference.teacher_forced(tokens, 40, adapter=name)
            assert (engine.teacher_forced(tokens, 40, adapter=name) - expected).abs().max() <= 1e-4


@pytest.mark.parametrize("variant", REFUSED)
def test_what_the_kernels_do_not_support_is_refused_by_name(variant: str) -> None:
    model = make_model(**EXPERT_VARIANTS[variant])
    with pytest.raises(ValueError, match=f"the GPU kernels do not support .*{REFUSED[variant]}"):
        TritonModel(model, model.config)


@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_a_pool_is_packed_once_and_its_weights_are_held_once(quantization: str) -> None:
    model = make_model(**EXPERT_VARIANTS["experts of pools, one shared"])
    layers = TritonModel(model, model.config, quantization=quantization).layers
    first, second, third = (layer.experts for layer in layers)
    assert first is not None and second is not None and third is not None
    assert third.experts is first.experts and second.experts is not first.experts
    assert third.router.weight_EC is not first.router.weight_EC
    own = model.model.layers[0].mlp.experts.down_proj
    if quantization == "none":
        assert own.data_ptr() == first.experts.down.matrix_ENK.data_ptr()
    else:
        assert own.numel() == 0 and first.experts.down.matrix_ENK.dtype == torch.int8
