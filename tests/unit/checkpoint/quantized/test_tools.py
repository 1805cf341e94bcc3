"""Matrices that the tools themselves packed are read as those tools dequantize them.

written_by_tools.safetensors holds random matrices [32, 64] (nf4d: [33, 512]) as AutoAWQ 0.2.9 (awq), auto-round 0.16.1
in GPTQ's layouts (gptq…), bitsandbytes 0.50.2 (nf4, nf4d, fp4, int8) and compressed-tensors 0.20.1 (ct…) wrote
them, and as NAME.number the last rows of what the same tool made of them again, in float32.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from stellarbyte.checkpoint.quantized.formats import read_quantized
from stellarbyte.checkpoint.safetensors_file import read_header
from tests.support.models.quantized import compressed

FILE = Path(__file__).parent / "written_by_tools.safetensors"
INT = {"type": "int", "symmetric": True}
BITSANDBYTES = {"quant_method": "bitsandbytes"}
CONFIGS: dict[str, dict[str, Any]] = {
    "awq": {"quant_method": "awq", "bits": 4, "version": "gemm"},
    "gptq4": {"quant_method": "gptq", "bits": 4},
    "gptq3": {"quant_method": "gptq", "bits": 3, "checkpoint_format": "gptq"},
    "gptq_v2_2": {"quant_method": "gptq", "bits": 2, "checkpoint_format": "gptq_v2"},
    "gptq_v2_8": {"quant_method": "gptq", "bits": 8, "checkpoint_format": "gptq_v2"},
    "nf4": BITSANDBYTES,
    "nf4d": BITSANDBYTES,
    "fp4": BITSANDBYTES,
    "int8": BITSANDBYTES,
    "ct4": compressed("pack-quantized", num_bits=4, **INT),
    "ct4a": compressed("pack-quantized", num_bits=4, type="int", symmetric=False),
    "ct3": compressed("pack-quantized", num_bits=3, **INT),
    "ct8": compressed("int-quantized", num_bits=8, **INT),
    "ctf8": compressed("float-quantized", num_bits=8, type="float", block_structure=[16, 32]),
}


def test_every_matrix_of_the_file_is_tested() -> None:
    assert {name.partition(".")[0] for name in load_file(FILE)} == CONFIGS.keys()


@pytest.mark.parametrize("tool", CONFIGS)
def test_matrices_are_those_of_the_tool(tool: str) -> None:
    headers = {name: info for name, info in read_header(FILE).items() if name.startswith(f"{tool}.")}
    number = load_file(FILE)[f"{tool}.number"]
    source = read_quantized(FILE.parent, CONFIGS[tool], headers)
    assert source.matrices.keys() == {f"{tool}.weight"}
    assert source.plain.keys() == {f"{tool}.number"}  # all else belongs to the matrix
    matrix = source.matrices[f"{tool}.weight"]
    found = matrix.dequantized()
    assert found.shape == matrix.shape and found.dtype == torch.float32
    # LLM.int8 is dequantized to float16 by its tool, and scales of float32 are rounded once by both.
    tolerance = 1e-3 if tool == "int8" else 3e-7
    torch.testing.assert_close(found[-len(number) :], number, rtol=tolerance, atol=1e-6 if tool == "int8" else 1e-9)
