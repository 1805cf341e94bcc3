"""What kernels add for a mixed batch against scale · (d ⊙ W x + B (A x)) of the bank's own views, row by row."""

import random
from collections.abc import Sequence

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from stellarbyte.config import ByteModelConfig
from stellarbyte.lora import pinned_copies
from stellarbyte.lora.bank import LoraBank, PackedAdapter
from stellarbyte.model.parts import ATTENTION_INPUT
from stellarbyte.ops.triton.lora import SEGMENT_ROWS, LoraRows, LoraScratch, expand, segments, shrink
from tests.support.cases import SLOW_WITHOUT_GPU, some
from tests.support.models.adapters import random_adapter
from tests.support.models.byte_transformer import make_config

MAX_RANK = 40  # more than a kernel takes at once
needs_card = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device here")


def packed(config: ByteModelConfig, seed: int, dtype: torch.dtype = torch.float32, dora: float = 0.0) -> PackedAdapter:
    """Of another rank in every projection, and none in some."""
    return random_adapter(config, seed, ranks=(1, 4, 7, 16, MAX_RANK), share=0.7, dora=dora).packed(config, dtype)


def make_bank(
    config: ByteModelConfig, device: torch.device, dtype: torch.dtype = torch.float32, dora: tuple[float, ...] = ()
) -> LoraBank:
    """`dora`: the shares of projections with it, for slots 1, 2 ...; otherwise none."""
    bank = LoraBank(config, 3, MAX_RANK, dtype, device)
    for slot, share in zip((1, 2, 3), dora or (0.0, 0.0, 0.0), strict=True):
        bank.fill(slot, packed(config, slot, dtype, share))
    return bank


def lora_rows(slots: Sequence[int], device: torch.device, num_segments: int = 0) -> LoraRows:
    """With segments that are none up to `num_segments`."""
    parts = [part + [0] * (num_segments - len(part)) for part in segments(slots)]
    scales = [0.25 + 0.5 * (row % 5) for row in range(len(slots))]
    scales = [scale if slot else 0.0 for scale, slot in zip(scales, slots, strict=True)]
    return LoraRows(
        *(torch.tensor(part, dtype=torch.int32, device=device) for part in parts), torch.tensor(scales).to(device)
    )


def random_rows(num_rows: int, width: int, like: torch.Tensor, seed: int) -> torch.Tensor:
    return torch.randn(num_rows, width, generator=torch.Generator().manual_seed(seed)).to(like)


def add(
    bank: LoraBank,
    slots: Sequence[int],
    rows: LoraRows,
    scratch: LoraScratch,
    layer: int,
    group: slice,
    *,
    has_factors: bool = False,
    has_bias: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the kernels make of random inputs and outputs, and what it should be, in float64."""
    shapes = bank.projections.shapes[layer][group]
    widths = [out for out, _ in shapes]
    x_TK = random_rows(len(slots), shapes[0][1], bank.numbers_SF, seed=layer)
    product_TN = random_rows(len(slots), sum(widths), bank.numbers_SF, seed=layer + 10)
    bias_N = random_rows(1, sum(widths), bank.numbers_SF, seed=layer + 20)[0] if has_bias else None
    out_TN = product_TN if bias_N is None else product_TN + bias_N
    expected_TN = out_TN.double()
    for row, slot in enumerate(slots):
        ranks = bank.ranks_SLP[slot, layer, group].tolist()
        hidden = (bank.a(slot, layer, group).double() @ x_TK[row].double()).split(ranks)
        added = [h @ bank.b(slot, layer, group.start + i).double() for i, h in enumerate(hidden)]
        for i, product in enumerate(product_TN[row].double().split(widths)):
            if (d := bank.d(slot, layer, group.start + i)) is not None:
                added[i] = added[i] + d.double() * product
        expected_TN[row] += float(rows.scales_T[row]) * torch.cat(added)
    scratch.hidden.fill_(torch.nan)
    shrink(x_TK, scratch, rows, bank, layer, group)
    expand(scratch, out_TN, rows, bank, layer, group, has_factors=has_factors, bias_N=bias_N)
    return out_TN, expected_TN


MIXED = [0] * 2 + [3] + [1] * (SEGMENT_ROWS + 3) + [0] + [3] * 2 + [2] * 5 + [0] * 3


@pytest.mark.parametrize(
    ("sizes", "num_segments"),
    some([
        ({"num_hidden_layers": 2}, 9),
        ({"intermediate_size": 75, "num_hidden_layers": 2}, 0),  # nothing is aligned
        ({"hidden_size": 528, "intermediate_size": 600, "num_hidden_layers": 1}, 0),  # the inputs are split
        ({"hidden_size": 2064, "intermediate_size": 80, "num_hidden_layers": 1}, 0),  # and split further
        ({"hidden_size": 528, "intermediate_size": 80, "num_hidden_layers": 1}, 513),  # too many segments to be split
    ], 1, 2, mark=SLOW_WITHOUT_GPU),
    ids=str,
)  # fmt: skip
def test_every_row_gets_its_own_adapter_at_its_own_scale(
    sizes: dict[str, int], num_segments: int, device: torch.device
) -> None:
    config = make_config(**sizes)
    bank = make_bank(config, device)
    assert (bank.ranks_SLP[1:] == 0).any() and bank.ranks_SLP.max() == MAX_RANK
    rows = lora_rows(MIXED, device, num_segments)
    scratch = LoraScratch.make(len(MIXED), MAX_RANK, device)
    for layer in range(config.num_hidden_layers):
        for group in bank.projections.shared_inputs.values():
            found, expected = add(bank, MIXED, rows, scratch, layer, group)
            torch.testing.assert_close(found.double(), expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("has_bias", some([False, True], 1, mark=SLOW_WITHOUT_GPU))
def test_dora_scales_the_product_without_its_bias_in_rows_that_have_it(has_bias: bool, device: torch.device) -> None:
    config = make_config(intermediate_size=75, num_hidden_layers=1)
    bank = make_bank(config, device, dora=(1.0, 0.0, 0.5))
    assert (bank.d_offsets_SLP[1] >= 0).any() and (bank.d_offsets_SLP[2] < 0).all()
    scratch = LoraScratch.make(len(MIXED), MAX_RANK, device)
    for group in bank.projections.shared_inputs.values():
        rows = lora_rows(MIXED, device, 9)
        found, expected = add(bank, MIXED, rows, scratch, 0, group, has_factors=True, has_bias=has_bias)
        torch.testing.assert_close(found.double(), expected, atol=2e-5, rtol=1e-5)


def test_a_slot_that_had_dora_has_none_when_it_is_filled_again(device: torch.device) -> None:
    config = make_config(num_hidden_layers=1)
    bank = make_bank(config, device, dora=(1.0, 1.0, 0.0))
    assert bank.slots_beyond_plain == {1, 2}
    bank.fill(1, packed(config, seed=9))
    bank.clear(2)
    assert not bank.slots_beyond_plain
    group = bank.projections.shared_inputs[ATTENTION_INPUT]
    rows, scratch = lora_rows(MIXED, device), LoraScratch.make(len(MIXED), MAX_RANK, device)
    found, expected = add(bank, MIXED, rows, scratch, 0, group, has_factors=True)
    torch.testing.assert_close(found.double(), expected, atol=2e-5, rtol=1e-5)


def test_rows_without_an_adapter_keep_their_bits(device: torch.device) -> None:
    bank = make_bank(make_config(), device)
    scratch = LoraScratch.make(len(MIXED), MAX_RANK, device)
    without = torch.tensor([slot == 0 for slot in MIXED], device=device)
    for group in bank.projections.shared_inputs.values():
        found, expected = add(bank, MIXED, lora_rows(MIXED, device), scratch, 0, group)
        assert torch.equal(found[without].double(), expected[without])
    found, expected = add(
        bank, [0] * 3, lora_rows([0] * 3, device), scratch, 0, bank.projections.shared_inputs[ATTENTION_INPUT]
    )
    assert torch.equal(found.double(), expected)


def test_a_slot_that_is_filled_again_or_cleared_counts_from_the_next_launch(device: torch.device) -> None:
    config = make_config()
    bank = make_bank(config, device)
    rows, scratch = lora_rows(MIXED, device), LoraScratch.make(len(MIXED), MAX_RANK, device)
    addresses = [tensor.data_ptr() for tensor in (bank.numbers_SF, *bank.tables)]
    bank.fill(1, packed(config, seed=9))
    bank.clear(3)
    for group in bank.projections.shared_inputs.values():
        found, expected = add(bank, MIXED, rows, scratch, 1, group)
        torch.testing.assert_close(found.double(), expected, atol=2e-5, rtol=1e-5)
    assert [tensor.data_ptr() for tensor in (bank.numbers_SF, *bank.tables)] == addresses


def test_segments_are_short_runs_of_one_slot_and_leave_no_row_out() -> None:
    generator = random.Random(0)
    for _ in range(100):
        slots = [slot for slot in generator.choices(range(3), k=8) for _ in range(generator.randrange(40))]
        covered = [0] * len(slots)
        for start, count, slot in zip(*segments(slots), strict=True):
            assert slot > 0 and 1 <= count <= SEGMENT_ROWS
            assert not any(covered[start : start + count])
            covered[start : start + count] = [slot] * count
        assert covered == slots
    assert segments([0, 0]) == ([], [], [])
    assert len(segments([1] * 64)[0]) == 4


@needs_card
def test_bfloat16(device: torch.device) -> None:
    config = make_config(hidden_size=528, intermediate_size=2064, num_hidden_layers=1)
    bank = make_bank(config, device, torch.bfloat16)
    rows, scratch = lora_rows(MIXED, device, 40), LoraScratch.make(len(MIXED), MAX_RANK, device)
    for group in bank.projections.shared_inputs.values():
        found, expected = add(bank, MIXED, rows, scratch, 0, group)
        torch.testing.assert_close(found.double(), expected, atol=0.02, rtol=0.02)


@needs_card
def test_a_captured_launch_serves_whatever_the_slots_and_segments_hold(device: torch.device) -> None:
    config = make_config()
    bank = make_bank(config, device)
    group = bank.projections.shared_inputs[ATTENTION_INPUT]
    rows, scratch = lora_rows(MIXED, device, len(MIXED)), LoraScratch.make(len(MIXED), MAX_RANK, device)
    shapes = bank.projections.shapes[2][group]
    x_TK = random_rows(len(MIXED), shapes[0][1], bank.numbers_SF, seed=1)
    out_TN = torch.zeros(len(MIXED), sum(out for out, _ in shapes), device=device)

    def program() -> None:
        shrink(x_TK, scratch, rows, bank, 2, group)
        expand(scratch, out_TN, rows, bank, 2, group)

    with torch.cuda.stream(torch.cuda.Stream()):
        program()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            program()
        for seed, slots in ((7, MIXED), (8, list(reversed(MIXED))), (9, [3] * len(MIXED))):
            bank.fill(3, packed(config, seed))
            for there, new in zip(rows[:4], lora_rows(slots, device, len(MIXED))[:4], strict=True):
                there.copy_(new)
            out_TN.zero_()
            graph.replay()
            found = out_TN.clone()
            out_TN.zero_()
            program()
            assert torch.equal(found, out_TN) and found[slots.index(3)].any()


@needs_card
def test_a_copy_waits_for_kernels_that_still_read_the_slot(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And goes through its buffers many times."""
    monkeypatch.setattr(pinned_copies, "_CHUNK_BYTES", 1000)
    config = make_config()
    bank = make_bank(config, device)
    before = bank.numbers_SF[1].clone()
    adapter = packed(config, seed=9)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)  # 0.1 s
        seen = bank.numbers_SF[1].clone()
        fence = bank.fence()
    bank.fill(1, adapter, fence)
    assert stream.query(), "the copy did not wait"
    assert torch.equal(seen, before)
    assert torch.equal(bank.numbers_SF[1, : len(adapter.numbers)].cpu(), adapter.numbers)
    assert torch.equal(bank.tables.ranks_SLP[1].cpu(), torch.from_numpy(adapter.ranks_LP))
