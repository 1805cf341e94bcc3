"""The CPU kernels against the float64 oracle and against plain products."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stellarbyte.backends.cpu_model import CpuModel, fits
from stellarbyte.ops.cpu.layers import rms_norm
from stellarbyte.ops.cpu.linear import ACTIVATIONS, INVARIANT, NO_ACTIVATION, PLAIN, SILU, linear
from stellarbyte.ops.cpu.packing import QuantizedRows, interleave_gated, no_minima, pack, panels_of, unpack
from tests.support.cases import each_value_once
from tests.support.engines.engine import ModelEngine, make_request
from tests.support.models import oracle
from tests.support.models.byte_transformer import EXPERT_VARIANTS, VARIANTS, W, make_config, make_model, random_tokens

NO_ADDEND = np.zeros((0, 0), np.float32)
float32 = partial(CpuModel, quantization="none", num_threads=2)
SERVED = {name: fields for name, fields in (VARIANTS | EXPERT_VARIANTS).items() if fits(make_config(**fields))}
TOLERANCE = {"none": 1e-6, "int8": 0.01, "fp8": 0.05, "int4": 0.15}  # of the largest output, for random weights


@pytest.mark.parametrize(("variant", "sizes"), each_value_once(list(SERVED), [(1, 7), (5, 64), (16, 1)]))
def test_every_kind_of_model_matches_the_oracle(variant: str, sizes: tuple[int, int]) -> None:
    block_size, chunk = sizes
    model = make_model(**SERVED[variant])
    tokens = random_tokens(4 * W + 3)
    expected = oracle.logprobs(model.state_dict(), model.config, tokens)
    engine = ModelEngine(model, backend=float32, block_size=block_size, max_num_batched_tokens=chunk)
    assert (engine.teacher_forced(tokens, 2 * W) - expected[2 * W - 1 :]).abs().max() <= 1e-4


SHAPES = [
    {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 80, "intermediate_size": 77, "vocab_size": 101},
    {"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 64, "tie_word_embeddings": False},
    {"num_attention_heads": 4, "num_key_value_heads": 1, "sliding_window": W},
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("chunk", [1, 3, 64])
def test_heads_and_matrices_of_any_size_match_the_oracle(shape: dict[str, Any], chunk: int) -> None:
    model = make_model(initializer_range=0.1, **shape)
    tokens = random_tokens(4 * W + 3)
    expected = oracle.logprobs(model.state_dict(), model.config, tokens)
    engine = ModelEngine(model, backend=float32, block_size=4, max_num_batched_tokens=chunk)
    assert (engine.teacher_forced(tokens, 2 * W) - expected[2 * W - 1 :]).abs().max() <= 1e-4


def test_a_batch_gets_its_single_run_tokens() -> None:
    model = make_model(**VARIANTS["xpos window sinks"])
    requests = [
        make_request(random_tokens(3 + 5 * i, seed=i), 20 + i, str(i), seed=i, temperature=float(i % 2))
        for i in range(9)
    ]
    alone = [ModelEngine(model, backend=float32).generate([request])[0] for request in requests]
    assert ModelEngine(model, backend=float32, max_num_batched_tokens=16).generate(requests) == alone


@pytest.mark.parametrize("quantization", TOLERANCE)
@pytest.mark.parametrize(("rows", "columns"), [(16, 64), (70, 128), (5, 192)])
@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5, 6, 7, 8, 13, 16, 23, 24, 40, 53])
def test_products_of_every_size(tokens: int, rows: int, columns: int, quantization: str) -> None:
    numbers = np.random.default_rng(tokens)
    x, w, bias = (
        numbers.standard_normal(shape, dtype=np.float32) for shape in ((tokens, columns), (rows, columns), rows)
    )
    out = np.full((tokens, rows), np.nan, np.float32)
    padded_bias = np.pad(bias, (0, -rows % 16))
    linear(x, tuple(pack(w, quantization)), padded_bias, NO_ADDEND, out, NO_ACTIVATION, PLAIN, 2)
    expected = x.astype(np.float64) @ w.T + bias
    assert np.abs(out - expected).max() <= TOLERANCE[quantization] * np.abs(expected).max()


@pytest.mark.parametrize("tokens", range(8, 41))
def test_products_with_bias_and_addend_of_any_number_of_tokens(tokens: int) -> None:
    """With AVX-512, passes over two panels divide them into twelves and eights; of five panels one is alone."""
    numbers = np.random.default_rng(tokens)
    shapes = (tokens, 96), (70, 96), 80, (tokens, 80)
    x, w, bias, addend = (numbers.standard_normal(shape, dtype=np.float32) for shape in shapes)
    out = np.full((tokens, 70), np.nan, np.float32)
    linear(x, tuple(pack(w, "none")), bias, addend, out, NO_ACTIVATION, PLAIN, 2)
    exact = torch.nn.functional.linear(*(torch.from_numpy(array).double() for array in (x, w, bias[:70])))
    np.testing.assert_allclose(out, exact.numpy() + addend[:, :70], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tokens", [13, 17, 21, 25, 37])  # the last pass computes some tokens again
def test_a_product_is_added_to_its_output_once(tokens: int) -> None:
    numbers = np.random.default_rng(tokens)
    shapes = (tokens, 64), (48, 64), (tokens, 48)
    x, w, before = (numbers.standard_normal(shape, dtype=np.float32) for shape in shapes)
    out = before.copy()
    linear(x, tuple(pack(w, "none")), np.zeros(0, np.float32), out, out, NO_ACTIVATION, PLAIN, 2)
    np.testing.assert_allclose(out, before + x.astype(np.float64) @ w.T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tokens", [1, 5, 40])  # from the packed form, and unpacked first
def test_every_code_of_fp8_is_read_exactly(tokens: int) -> None:
    codes = np.array([code for code in range(256) if code & 127 != 127], np.uint8)  # without NaN
    codes = np.resize(codes, (16, 64))
    scales = np.full((16, 1), 2.0**-5, np.float32)
    expected = torch.from_numpy(codes).view(torch.float8_e4m3fn).double().numpy() * 2.0**-5
    for first in range(0, 64, tokens):
        x = np.eye(64, dtype=np.float32)[first : first + tokens]
        out = np.full((len(x), 16), np.nan, np.float32)
        weight = tuple(panels_of(QuantizedRows(codes, scales, no_minima(16))))
        linear(x, weight, np.zeros(0, np.float32), NO_ADDEND, out, NO_ACTIVATION, PLAIN, 2)
        np.testing.assert_array_equal(out, expected.T[first : first + tokens])
    np.testing.assert_array_equal(unpack(panels_of(QuantizedRows(codes, scales, no_minima(16)))), expected)


def test_a_gated_product() -> None:
    numbers = np.random.default_rng(0)
    x, gate, up = (numbers.standard_normal(shape, dtype=np.float32) for shape in ((9, 32), (20, 32), (20, 32)))
    out = np.full((9, 20), np.nan, np.float32)
    linear(x, tuple(pack(interleave_gated(gate, up), "none")), np.zeros(0, np.float32), NO_ADDEND, out, SILU, PLAIN, 2)
    g = torch.from_numpy(x @ gate.T)
    np.testing.assert_allclose(
        out, (torch.nn.functional.silu(g) * torch.from_numpy(x @ up.T)).numpy(), rtol=2e-5, atol=1e-5
    )


@pytest.mark.parametrize(
    ("quantization", "activation"),
    [*((name, NO_ACTIVATION) for name in TOLERANCE), *(("none", activation) for activation in ACTIVATIONS.values())],
)
def test_an_invariant_product_has_the_same_bits_among_any_number_of_tokens(quantization: str, activation: int) -> None:
    numbers = np.random.default_rng(0)
    x, w = (numbers.standard_normal(shape, dtype=np.float32) for shape in ((41, 128), (40, 128)))
    is_gated = activation != NO_ACTIVATION
    weight = tuple(pack(interleave_gated(w[:20], w[20:]) if is_gated else w, quantization))

    def product(rows: slice) -> np.ndarray:
        out = np.full((len(x[rows]), 20 if is_gated else 40), np.nan, np.float32)
        linear(x[rows], weight, np.zeros(0, np.float32), NO_ADDEND, out, activation, INVARIANT, 2)
        return out

    whole = product(slice(None))
    for size in range(1, 42):
        for first in range(0, 41, size):
            np.testing.assert_array_equal(product(slice(first, first + size)), whole[first : first + size])


@pytest.mark.parametrize("activation", ACTIVATIONS.values())
def test_a_number_does_not_depend_on_whether_its_neighbours_are_computed(activation: int) -> None:
    """Of 8 pairs of rows vector code computes a tile, of fewer the code for the rest."""
    numbers = np.random.default_rng(0)
    x, gate, up = (numbers.standard_normal(shape, dtype=np.float32) for shape in ((9, 64), (8, 64), (8, 64)))
    found = {}
    for rows in range(1, 9):
        out = np.full((9, rows), np.nan, np.float32)
        weight = tuple(pack(interleave_gated(gate[:rows], up[:rows]), "none"))
        linear(x, weight, np.zeros(0, np.float32), NO_ADDEND, out, activation, PLAIN, 2)
        found[rows] = out
    for rows, out in found.items():
        np.testing.assert_array_equal(out, found[8][:, :rows])


@pytest.mark.parametrize("width", [1, 15, 64, 65, 127, 576])
def test_a_norm_is_that_of_float64_and_the_same_in_any_number_of_rows(width: int) -> None:
    numbers = np.random.default_rng(width)
    x, weight = (numbers.standard_normal(shape, dtype=np.float32) for shape in ((40, width), width))
    out = np.full_like(x, np.nan)
    rms_norm(x, weight, np.float32(1e-6), out, 2)
    exact = x.astype(np.float64) / np.sqrt((x.astype(np.float64) ** 2).mean(axis=1, keepdims=True) + 1e-6) * weight
    np.testing.assert_allclose(out, exact, rtol=1e-6)
    for rows in (1, 16, 17):
        few = np.full_like(x[:rows], np.nan)
        rms_norm(x[:rows], weight, np.float32(1e-6), few, 2)
        np.testing.assert_array_equal(few, out[:rows])


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_a_quantized_model_is_close_to_its_original(quantization: str) -> None:
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "head_dim": 16}
    model = make_model(initializer_range=0.08, **shape)
    tokens = random_tokens(40)
    expected = oracle.logprobs(model.state_dict(), model.config, tokens)
    engine = ModelEngine(model, backend=partial(CpuModel, quantization=quantization, num_threads=2))
    actual = engine.teacher_forced(tokens, 20).double()
    divergence = (expected[19:].exp() * (expected[19:] - actual)).sum(dim=-1).mean().item()
    assert 0 < divergence < {"int8": 1e-4, "int4": 2e-2}[quantization]


def test_quantization_that_does_not_fit_says_so() -> None:
    with pytest.raises(ValueError, match="int8 needs matrices with a multiple of 64 columns; one has 48"):
        CpuModel(make_model(), make_config(), quantization="int8", num_threads=2)


def test_models_with_other_head_sizes_are_left_to_torch() -> None:
    assert fits(make_config()) and not fits(make_config(head_dim=8))


def test_where_nothing_can_be_kept_the_kernels_are_compiled_for_this_process_only(tmp_path: Path) -> None:
    no_folder = tmp_path / "file"
    no_folder.write_text("")
    program = """
import numpy as np
from stellarbyte.ops.cpu import KEEP_COMPILED
from stellarbyte.ops.cpu.layers import rms_norm
x, out = np.full((1, 16), 2, np.float32), np.zeros((1, 16), np.float32)
rms_norm(x, np.ones(16, np.float32), np.float32(0), out, 1)
print(KEEP_COMPILED, out.mean())
"""
    environment = os.environ | {"STELLARBYTE_CACHE": str(no_folder)}
    environment.pop("NUMBA_CACHE_DIR", None)
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "False 1.0\n"
    assert "every start compiles them" in done.stderr
