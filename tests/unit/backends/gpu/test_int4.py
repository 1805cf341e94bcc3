"""`quantization="int4"` on the GPU engine against the torch backend with the numbers that codes stand for; on a CPU by
Triton's interpreter."""

import copy

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from stellarbyte.backends.gpu.model import TritonModel
from stellarbyte.compress.quantization.grid import Grid
from stellarbyte.model.transformer import ByteTransformer
from stellarbyte.ops.triton.weights import Weight, dequantized, quantize
from tests.support.engines.engine import ModelEngine
from tests.support.gpu.gpu_engine import GpuEngine, own_stream
from tests.support.models.adapters import random_adapter
from tests.support.models.byte_transformer import make_model, random_tokens

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "mlp_bias": True}
GRID = Grid(kind="int4", zero_points="real")


@torch.no_grad()
def rounded(model: ByteTransformer) -> ByteTransformer:
    """A copy with the nearest numbers of int4, and of int8 in the head."""
    found = copy.deepcopy(model)
    for name, module in found.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            module.weight.copy_(GRID.round(module.weight, GRID.fit(module.weight)))
    head = found.lm_head.weight
    found.lm_head.weight = torch.nn.Parameter(dequantized(quantize(Weight(matrix_NK=head), "int8"), torch.float32))
    return found


@pytest.mark.slow_without_gpu
def test_prompts_streams_and_adapters_equal_the_torch_backend(device: torch.device) -> None:
    """A prompt of many rows in one step and then each token; alone, with an adapter, and between other sequences."""
    model, tokens = make_model(**SIZES), random_tokens(42)
    adapters = {"a": random_adapter(model.config, seed=1)}
    reference = ModelEngine(rounded(model), adapters=adapters)
    with own_stream(device):
        engine = GpuEngine(model, device, adapters=adapters, quantization="int4", num_blocks=20, max_num_seqs=4)
        for name in (None, "a"):
            expected = reference.teacher_forced(tokens, 40, adapter=name)
            assert (engine.teacher_forced(tokens, 40, adapter=name) - expected).abs().max() <= 1e-4


def test_matrices_of_other_than_whole_groups_are_refused_by_name() -> None:
    model = make_model(hidden_size=64, intermediate_size=80, num_hidden_layers=1)
    with pytest.raises(
        ValueError, match=r"layers\.0\.mlp\.down_proj\.weight has 80 inputs; int4 needs a multiple of 32"
    ):
        TritonModel(model, model.config, quantization="int4")
