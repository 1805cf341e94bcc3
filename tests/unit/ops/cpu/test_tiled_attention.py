"""Attention of many queries at a time against the torch reference, over a cache full of NaN elsewhere."""

from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from stellarbyte.backends.cpu_model import batch_arrays
from stellarbyte.ops.cpu.attention import BatchArrays, Rotations, paged_attention, write_kv
from stellarbyte.ops.cpu.panels.tiles import may_use_tiles
from stellarbyte.ops.cpu.query_tiles import FLOATS, SPLIT
from stellarbyte.ops.cpu.tiled_attention import MIN_QUERIES, MIN_WINDOW, can_tile, tiled_attention
from tests.support.attention_steps import Case, Step, make_step

needs_unit = pytest.mark.skipif(not may_use_tiles(), reason="needs an x86 processor with AMX that Linux lets us use")
FORMS = pytest.mark.parametrize(
    "form", [pytest.param(SPLIT, id="split", marks=needs_unit), pytest.param(FLOATS, id="floats")]
)

SHAPE: dict[str, Any] = {"block_size": 16, "head_dim": 32}
# Sequences with too few queries, with a tile's last rows empty, from the middle of a block, with blocks behind them.
CASES = [
    Case(spans=[(0, 32), (5, 3), (0, 70), (100, 41)], **SHAPE),
    Case(spans=[(37, 48), (3, 1), (0, 33)], xpos=False, num_heads=6, num_kv_heads=2, block_size=32, head_dim=64),
    Case(spans=[(0, 50), (40, 64)], num_kv_heads=1, qk_norm=True, block_size=16, head_dim=96),
    Case(spans=[(0, 40), (2, 70), (777, 33)], window=40, sinks=4, **SHAPE),
    Case(spans=[(0, 40), (90, 70)], window=70, softmax_sink=True, xpos=False, block_size=48, head_dim=64),
    Case(spans=[(0, 100), (31, 8), (1_000_000, 35)], window=1, sinks=20, **SHAPE),
    Case(spans=[(0, 120), (20, 100), (0, 40)], window=10, sinks=52, **SHAPE),
    Case(spans=[(9, 64)], sinks=33, num_kv_heads=4, softmax_sink=True, **SHAPE),
]


def farthest(case: Case, batch: BatchArrays) -> int:
    """The largest distance between a query and the base of a block that it sees, or a window's end, for sinks."""
    distances = []
    for n, count in enumerate(batch.num_blocks_N):
        last = batch.positions_T[batch.starts_N[n + 1] - 1]
        bases = batch.block_bases_NM[n, batch.num_sink_blocks_N[n] : count]
        capped = last if case.window is None else min(last, case.window + case.sinks)
        distances += [capped, *(last - bases)]
    return int(max(distances))


def attention_of(step: Step, form: np.ndarray | None) -> np.ndarray:
    """By tiles of a form, or token by token."""
    case, heads = step.case, step.heads
    batch = batch_arrays(step.batch)
    rows = farthest(case, batch) + 1 + case.block_size  # as many as `CpuModel` has; then NaN
    tables = step.rotation.cache.tables(rows, CPU)
    cos, sin = (torch.cat((t[:rows], torch.full_like(t[:999], torch.nan)))[:rows].numpy() for t in tables)
    decay, log_decay = np.ones_like(cos), step.rotation.log_decay(CPU)
    if log_decay is not None:
        decay = torch.exp(torch.arange(len(cos) + 999)[:, None] * log_decay.detach())
        decay[len(cos) :] = torch.nan
        decay = decay[: len(cos)].numpy()
    gain = step.rotation.query_gain
    rotations = Rotations(cos, sin, decay, np.zeros(0, np.float32) if gain is None else gain.detach().numpy())
    shape = (heads.num_heads, heads.num_kv_heads, heads.head_dim)
    nothing = np.zeros(0, np.float32)
    norms = (nothing, nothing) if step.norms is None else tuple(norm.weight.detach().numpy() for norm in step.norms)
    qkv, keys, values = (x.clone().numpy() for x in (step.qkv_TN, step.keys_BSKD, step.values_BSKD))
    write_kv(qkv, shape, *norms, np.float32(step.config.rms_norm_eps), batch, rotations, keys, values, 2)
    out = np.full((len(qkv), heads.num_heads * heads.head_dim), np.nan, np.float32)
    window, scale = case.window or 0, np.float32(step.rotation.score_scale)
    sink = nothing if step.softmax_sink_H is None else step.softmax_sink_H.numpy()
    most = len(qkv) if form is None else MIN_QUERIES - 1
    paged_attention(
        qkv, shape, batch, rotations, keys, values, window, case.sinks, scale, np.float32(0), sink, most, out, 2
    )
    if form is not None:
        counts = np.diff(step.batch.query_starts)
        assert np.isnan(out).all(axis=1).sum() == counts[counts >= MIN_QUERIES].sum(), "left out"
        is_done = tiled_attention(
            form, qkv, shape, batch, rotations, keys, values, window, case.sinks, scale, sink, out, 2
        )  # fmt: skip
        assert is_done, "not computed"
    return out


CPU = torch.device("cpu")


@FORMS
@pytest.mark.parametrize("case", CASES, ids=str)
def test_queries_see_what_they_should(case: Case, form: np.ndarray) -> None:
    step = make_step(case, CPU)
    with torch.no_grad():
        expected = step.expected()[0].numpy()
    plain, tiled = (attention_of(step, chosen) for chosen in (None, form))
    is_split = form.dtype == np.uint32
    np.testing.assert_allclose(plain, expected, rtol=1e-5, atol=2e-5)
    np.testing.assert_allclose(tiled, expected, rtol=1e-4 if is_split else 1e-5, atol=2e-4 if is_split else 2e-5)
    assert np.abs(tiled - expected).mean() < 2e-5


@FORMS
def test_a_sequence_with_a_value_that_is_not_finite_is_left_to_the_other_kernel(form: np.ndarray) -> None:
    """Its products would reach tokens that do not see it: 0 · NaN is NaN."""
    step = make_step(Case(spans=[(0, 48)], **SHAPE), CPU)
    for number in (torch.nan, torch.inf):
        step.qkv_TN[20, -1] = number
        with pytest.raises(AssertionError, match="not computed"):
            attention_of(step, form)


@FORMS
def test_keys_that_xpos_takes_out_of_range_are_left_to_the_other_kernel(
    form: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All keys of a step get one base; the factor of those far behind it would leave the range of float32."""
    step = make_step(Case(spans=[(0, 48)], **SHAPE), CPU)
    decays = step.rotation.log_decay(CPU)
    assert decays is not None
    monkeypatch.setattr(type(step.rotation), "log_decay", lambda *_: decays * 500)
    with pytest.raises(AssertionError, match="not computed"):
        attention_of(step, form)


def test_what_is_not_computed_in_tiles() -> None:
    assert can_tile(16, 64, 0, 0.0) and can_tile(32, 96, MIN_WINDOW, 0.0)
    assert not can_tile(8, 64, 0, 0.0) and not can_tile(16, 80, 0, 0.0)
    assert not can_tile(16, 64, MIN_WINDOW - 1, 0.0) and not can_tile(16, 64, 0, 30.0)
