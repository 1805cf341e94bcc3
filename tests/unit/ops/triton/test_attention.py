"""Paged attention of prompts and of newest tokens against the torch backend, over a cache full of NaN elsewhere."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from stellarbyte.ops.triton.attention import (
    DecodeScratch,
    num_multiprocessors_of,
    num_splits_for,
)
from stellarbyte.ops.triton.lora import Addend
from stellarbyte.ops.triton.paged import HeadShape
from tests.support.attention_steps import MAX_SPLITS, MULTIPROCESSORS, Case, make_step
from tests.support.cases import SLOW_WITHOUT_GPU, some


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=2e-5)


# 70 tokens are more than one tile; W = 10 and s = 4 or 5 are reached and passed, rings turn round many times.
PROMPTS = [
    Case(spans=[(0, 1), (0, 9), (3, 70), (17, 5)]),
    Case(spans=[(0, 70), (9, 3), (31, 8), (64, 4)], block_size=16, xpos=False, num_kv_heads=4),
    Case(spans=[(0, 30), (7, 70), (60, 9), (1003, 2)], window=10),
    Case(spans=[(0, 30), (2, 70), (12, 3), (13, 4), (777, 33)], window=10, sinks=4),
    Case(spans=[(0, 6), (3, 9), (1_000_000, 7)], window=10, sinks=5, qk_norm=True),
    Case(spans=[(0, 20), (2, 2), (40, 3)], sinks=5, num_kv_heads=1, qk_norm=True, xpos=False),
    Case(spans=[(0, 30), (40, 3)], window=1, sinks=4),
    Case(spans=[(0, 3), (90, 70)], window=70, sinks=4, block_size=64, head_dim=80),
    Case(spans=[(150, 3), (0, 70)], window=90, sinks=70, block_size=100, head_dim=24),
    Case(spans=[(20, 3), (0, 5)], window=7, sinks=3, block_size=1, num_heads=6, num_kv_heads=2),
    Case(spans=[(0, 30), (2, 70), (777, 33)], window=10, sinks=4, softcap=1.5),
    Case(spans=[(0, 30), (2, 70), (777, 33)], window=10, softmax_sink=True, xpos=False),
    Case(spans=[(0, 9), (40, 3)], sinks=4, num_heads=6, num_kv_heads=2, softmax_sink=True, softcap=1.5),
]


@pytest.mark.parametrize("case", some(PROMPTS, 0, 3, 4, 8, 12, mark=SLOW_WITHOUT_GPU), ids=str)
def test_prompts_see_what_they_should(case: Case, device: torch.device) -> None:
    step = make_step(case, device)
    expected_TA, expected_keys, expected_values = step.expected()
    close(step.prefill(), expected_TA)
    close(step.keys_BSKD.nan_to_num(), expected_keys)
    close(step.values_BSKD.nan_to_num(), expected_values)


def newest(positions: list[int], **shape: Any) -> Case:
    return Case(spans=[(position, 1) for position in positions], **shape)


DECODES = [
    newest([0, 1, 3, 4, 7, 8, 37]),
    newest([0, 15, 16, 63, 64, 70], block_size=16, xpos=False, num_kv_heads=4, qk_norm=True),
    newest([0, 3, 9, 10, 11, 12, 1003, 1_000_000], window=10),
    newest([0, 2, 3, 4, 12, 13, 14, 15, 500, 1_000_001], window=10, sinks=4, qk_norm=True),
    newest([0, 3, 4, 5, 30, 31], window=10, sinks=5, num_kv_heads=1),
    newest([0, 4, 5, 20, 70], sinks=5, xpos=False),
    newest([0, 3, 5, 30], window=1, sinks=4),
    newest([0, 63, 64, 150], window=70, sinks=4, block_size=64, head_dim=80),
    newest([50, 63, 64, 69, 70, 133, 134, 170, 400], window=90, sinks=70, block_size=100, head_dim=24),
    newest([0, 20], window=7, sinks=3, block_size=1, num_heads=6, num_kv_heads=2),
    newest([0, 2, 3, 12, 15, 500], window=10, sinks=4, softcap=1.5),
    newest([0, 3, 12, 500], window=10, softmax_sink=True, xpos=False),
    newest([0, 7, 70], sinks=4, num_heads=6, num_kv_heads=2, softmax_sink=True, softcap=1.5),
]


@pytest.mark.parametrize("num_splits", some([1, MAX_SPLITS], 1, mark=SLOW_WITHOUT_GPU))
@pytest.mark.parametrize("case", some(DECODES, 1, 3, 8, 9, 12, mark=SLOW_WITHOUT_GPU), ids=str)
def test_newest_tokens_see_what_they_should(case: Case, num_splits: int, device: torch.device) -> None:
    step = make_step(case, device)
    expected_TA, expected_keys, expected_values = step.expected()
    close(step.decode(num_splits), expected_TA)
    close(step.keys_BSKD.nan_to_num(), expected_keys)
    close(step.values_BSKD.nan_to_num(), expected_values)


def test_shares_of_any_number_make_one_answer_and_leave_the_scratch_as_it_was(device: torch.device) -> None:
    step = make_step(newest([0, 5, 17, 40], sinks=5, xpos=False, num_kv_heads=1), device)
    scratch = DecodeScratch.make(4, step.heads, MULTIPROCESSORS, device)
    expected_TA = step.decode(1, scratch)
    for num_splits in (2, MAX_SPLITS, 2):  # one after the other through the same scratch
        close(step.decode(num_splits, scratch), expected_TA)
        assert not scratch.counters_TK.any()


@pytest.mark.parametrize("case", [DECODES[2], DECODES[4]], ids=str)
def test_what_adapters_add_to_q_k_and_v_is_added_in_their_rows_only(case: Case, device: torch.device) -> None:
    plain, adapted = make_step(case, device), make_step(case, device)
    scales_T = torch.tensor([0.0, 2.0] * len(plain.qkv_TN), device=device)[: len(plain.qkv_TN)]
    delta_TN = torch.randn(plain.qkv_TN.shape).to(device)
    plain.qkv_TN += delta_TN * (scales_T != 0)[:, None]
    delta_TN = delta_TN.where(scales_T[:, None] != 0, torch.nan)
    close(adapted.decode(2, addend=Addend(delta_TN, scales_T)), plain.decode(2))
    close(adapted.keys_BSKD.nan_to_num(), plain.keys_BSKD.nan_to_num())
    close(adapted.values_BSKD.nan_to_num(), plain.values_BSKD.nan_to_num())


@pytest.mark.parametrize("case", [DECODES[2], DECODES[4]], ids=str)
def test_a_token_gets_the_same_answer_as_prompt_and_as_newest(case: Case, device: torch.device) -> None:
    decoded, prefilled = make_step(case, device), make_step(case, device)
    close(decoded.decode(2), prefilled.prefill())
    torch.testing.assert_close(decoded.keys_BSKD, prefilled.keys_BSKD, rtol=0, atol=1e-6, equal_nan=True)
    assert torch.equal(decoded.values_BSKD.nan_to_num(), prefilled.values_BSKD.nan_to_num())


@pytest.mark.parametrize(
    "case",
    [
        newest([0, 9, 31, 500], window=20, sinks=4, qk_norm=True),
        newest([63, 64, 200], window=130, block_size=64, head_dim=128, num_heads=8),
    ],
    ids=str,
)
def test_bfloat16_is_as_good_as_its_rounding(case: Case, device: torch.device) -> None:
    if device.type == "cpu":
        pytest.skip("Triton's interpreter multiplies the bits of bfloat16 numbers as integers")
    exact = make_step(case, device)
    rounded = make_step(case, device, torch.bfloat16)
    exact.qkv_TN.copy_(rounded.qkv_TN)
    exact.keys_BSKD.copy_(rounded.keys_BSKD)
    exact.values_BSKD.copy_(rounded.values_BSKD)
    if exact.norms is not None and rounded.norms is not None:
        for norm, its_rounded in zip(exact.norms, rounded.norms, strict=True):
            norm.weight.data.copy_(its_rounded.weight)
    expected_TA, *_ = exact.expected()
    for out_TA in (rounded.decode(1), rounded.decode(4), rounded.prefill()):
        assert out_TA.dtype == torch.bfloat16
        torch.testing.assert_close(out_TA.float(), expected_TA, rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    "case", [PROMPTS[4], PROMPTS[7], newest([0, 9, 31, 500], window=20, sinks=4, qk_norm=True)], ids=str
)
def test_keys_and_values_in_fp8(case: Case, device: torch.device) -> None:
    """Against the torch backend, which computes in float32 on a cache in fp8."""
    if device.type == "cpu":
        pytest.skip("Triton's interpreter has no arithmetic for fp8 numbers")
    fp8 = torch.float8_e4m3fn
    exact, rounded = make_step(case, device, cache_dtype=fp8), make_step(case, device, torch.bfloat16, fp8)
    rounded.qkv_TN[0, case.num_heads * case.head_dim :] *= 10_000  # beyond fp8's range
    exact.qkv_TN.copy_(rounded.qkv_TN)
    if exact.norms is not None and rounded.norms is not None:
        for norm, its_rounded in zip(exact.norms, rounded.norms, strict=True):
            norm.weight.data.copy_(its_rounded.weight)
    expected_TA, *expected_cache = exact.expected()
    is_newest = all(count == 1 for _, count in case.spans)
    for out_TA in (rounded.decode(1), rounded.decode(4), rounded.prefill()) if is_newest else (rounded.prefill(),):
        torch.testing.assert_close(out_TA.float(), expected_TA, rtol=0.05, atol=0.05)
    for found, expected in zip((rounded.keys_BSKD, rounded.values_BSKD), expected_cache, strict=True):
        torch.testing.assert_close(found.float().nan_to_num(), expected.float(), rtol=2**-3, atol=2**-8)


def test_shares_fill_the_card_but_no_more() -> None:
    for num_rows in range(1, 257):
        for num_kv_heads in (1, 2, 4, 8, 32):
            num_splits = num_splits_for(num_rows, num_kv_heads, MULTIPROCESSORS)
            assert num_splits in (1, 2, 4, 8, 16, 32)
            num_programs = num_rows * num_kv_heads * num_splits
            assert num_splits == 32 or num_programs >= 2 * MULTIPROCESSORS
            assert num_splits == 1 or num_programs <= 6 * MULTIPROCESSORS


def test_the_card_is_asked_for_its_multiprocessors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(multi_processor_count=78))
    assert num_multiprocessors_of(torch.device("cuda")) == 78
    assert num_multiprocessors_of(torch.device("cpu")) == 1


def test_the_scratch_has_room_for_every_batch_it_was_made_for() -> None:
    heads = HeadShape(num_heads=32, num_kv_heads=8, head_dim=128)
    scratch = DecodeScratch.make(256, heads, MULTIPROCESSORS, torch.device("cpu"))
    for num_rows in range(1, 257):
        num_splits = num_splits_for(num_rows, heads.num_kv_heads, MULTIPROCESSORS)
        assert num_rows * heads.num_kv_heads * num_splits <= len(scratch.sums_CGD)
    assert scratch.sums_CGD.nbytes < 8 * 2**20  # not of every row times every split
