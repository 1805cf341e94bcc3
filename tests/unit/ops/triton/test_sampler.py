"""The GPU sampler against `sampling.sample`, its truth, which has tests of its own."""

from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

import triton
import triton.language as tl

from stellarbyte.ops.triton.sampling.noise import gumbel_noise, gumbel_of_bits, row_keys
from stellarbyte.ops.triton.sampling.sampler import CAPACITY, SamplerScratch, SamplingRows, sample
from stellarbyte.sampling.sampler import NO_TOKEN, RowSampling, choice_state
from stellarbyte.sampling.sampler import gumbel_noise as reference_noise
from stellarbyte.sampling.sampler import sample as reference
from tests.support.cases import SLOW_WITHOUT_GPU, each_value_once, some

KINDS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {},
    {"temperature": 0.7, "top_p": 0.9},
    {"top_k": 5},
    {"min_p": 0.1},
    {"temperature": 1.5, "top_k": 40, "top_p": 0.8, "min_p": 0.02},
    {"temperature": 0.0, "top_k": 3, "top_p": 0.5},
    {"temperature": 2.0, "top_p": 0.5, "min_p": 0.05},
    {"temperature": 0.3, "choice": 2},
]


ON_CARD = torch.cuda.is_available()
ROUNDS = 20 if ON_CARD else 1  # the interpreter takes some 0.3 s for a row that truncates


def row(position: int = 0, seed: int = 0, choice: int = 0, **changes: Any) -> RowSampling:
    settings = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0} | changes
    return RowSampling(seed=seed, choice=choice, position=position, **settings)


def on_device(rows: list[RowSampling], device: torch.device) -> SamplingRows:
    """Columns of one int32 tensor, as the server keeps them."""
    fields_RF = torch.zeros(len(rows), 9, dtype=torch.int32)
    floats_RF = fields_RF.view(torch.float32)
    for i, r in enumerate(rows):
        floats_RF[i, 1], floats_RF[i, 3], floats_RF[i, 4] = r.temperature, r.top_p, r.min_p
        fields_RF[i, 2], fields_RF[i, 8] = r.top_k, r.position
        words = bytearray(choice_state(r.seed, r.choice).to_bytes(8, "little"))
        fields_RF[i, 6:8] = torch.frombuffer(words, dtype=torch.int32)
    fields_RF = fields_RF.to(device)
    floats_RF = fields_RF.view(torch.float32)
    return SamplingRows(
        temperature_R=floats_RF[:, 1],
        top_k_R=fields_RF[:, 2],
        top_p_R=floats_RF[:, 3],
        min_p_R=floats_RF[:, 4],
        state_R2=fields_RF[:, 6:8],
        positions_R=fields_RF[:, 8],
    )


def truncates(rows: list[RowSampling]) -> bool:
    return any(r.top_k or r.top_p < 1 or r.min_p > 0 for r in rows)


def drawn(
    logits_RV: torch.Tensor, rows: list[RowSampling], device: torch.device, *, capacity: int = CAPACITY
) -> list[int]:
    """Tokens of our sampler. Scratch is larger than the batch and full of rubbish, as after other batches."""
    scratch = SamplerScratch.make(len(rows) + 1, logits_RV.shape[1], device, capacity=capacity)
    for tensor in vars(scratch).values():
        tensor.fill_(7)
    out_R = torch.full((len(rows),), -1, dtype=torch.int32, device=device)
    logits_RV = logits_RV.to(device)
    before = logits_RV.clone()
    sample(logits_RV, on_device(rows, device), out_R, scratch, truncates=truncates(rows))
    torch.testing.assert_close(logits_RV, before, rtol=0, atol=0, equal_nan=True)
    return out_R.tolist()


def random_logits(num_rows: int, vocabulary: int, sharpness: float = 2.0, seed: int = 0) -> torch.Tensor:
    return sharpness * torch.randn(num_rows, vocabulary, generator=torch.Generator().manual_seed(seed))


@triton.jit
def _noise_kernel(state, position, out, BLOCK: tl.constexpr):
    key, second_key = row_keys(tl.load(state), tl.load(state + 1), tl.load(position))
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, gumbel_noise(i, key, second_key))


# With seed 7 and choice 3 position 66 has a uniform number below 2^-27, position 141 one that rounds to 1.
@pytest.mark.parametrize(
    ("seed", "position"), [(0, 0), (7, 66), (7, 141), (2**63 + 12345, 1000), (2**64 - 1, 2**31 - 1)]
)
def test_noise_is_the_references(seed: int, position: int, device: torch.device) -> None:
    r = row(seed=seed, position=position, choice=3)
    count, block = 1 << 17, 1 << 12
    fields = on_device([r], device)
    noise_V = torch.empty(count, device=device)
    _noise_kernel[(count // block,)](fields.state_R2, fields.positions_R, noise_V, BLOCK=block)
    expected_V = reference_noise([r], count, torch.device("cpu"))[0]
    torch.testing.assert_close(noise_V.cpu(), expected_V, rtol=1e-5, atol=1e-6)  # around 0 there are no relative 1e-5


@triton.jit
def _bits_kernel(bits, out, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, gumbel_of_bits(tl.load(bits + i).to(tl.uint32, bitcast=True)))


def test_noise_of_any_bits_is_exact_to_1e_5(device: torch.device) -> None:
    """Against float64, from the uniform number that float32 makes of the bits, as `sampling.gumbel_noise` does."""
    block = 1 << 16
    around = [0, 2**16, 2**24, 2**25, 2**29, 2**31, 2**32 - 2**29, 2**32 - 2**9, 2**32]  # 2^29 is where u = 1/8
    edges = [x for middle in around for x in range(middle - 3000, middle + 3000) if 0 <= x < 2**32]
    powers = [2**i + j for i in range(32) for j in (-1, 0, 1) if 0 <= 2**i + j]
    generator = torch.Generator().manual_seed(0)
    random = torch.randint(2**32, (2**20,), generator=generator)
    rare = torch.randint(2**32, (2**16,), generator=generator) >> torch.arange(2**16) % 32  # of every magnitude
    bits = torch.cat([torch.tensor(edges + powers), random, rare, 2**32 - 1 - rare])
    bits = torch.cat([bits, torch.zeros(-len(bits) % block, dtype=torch.int64)])
    noise = torch.empty(len(bits), device=device)
    words = torch.where(bits < 2**31, bits, bits - 2**32).int().to(device)  # the same 32 bits
    _bits_kernel[(len(bits) // block,)](words, noise, BLOCK=block)
    uniform = ((bits.float() + 0.5) * 2.0**-32).clamp(max=1 - 2.0**-24).double()
    torch.testing.assert_close(noise.cpu().double(), -torch.log(-torch.log1p(-uniform)), rtol=0, atol=1e-5)


WIDER = [(1000, torch.bfloat16), (5003, torch.float32)]


@pytest.mark.parametrize(
    ("vocabulary", "dtype"),
    some(
        [(1, torch.float32), (97, torch.float32), (5003, torch.bfloat16), *WIDER],
        *range(3), mark=SLOW_WITHOUT_GPU,
    ),
)  # fmt: skip
def test_rows_of_all_kinds_in_one_batch_get_the_references_tokens(
    vocabulary: int, dtype: torch.dtype, device: torch.device
) -> None:
    """Rounded to bfloat16 many logits are equal, also at the edges of top_k and top_p."""
    for round_ in range(ROUNDS):
        logits_RV = random_logits(len(KINDS), vocabulary, seed=round_).to(dtype)
        rows = [row(position=99 * round_ + i, seed=2**63 + i, **kind) for i, kind in enumerate(KINDS)]
        assert drawn(logits_RV, rows, device) == reference(logits_RV.float(), rows).tolist()


@pytest.mark.parametrize("kinds", [KINDS[:2], KINDS[:1], KINDS[8:]])
def test_batches_that_do_not_truncate(kinds: list[dict[str, Any]], device: torch.device) -> None:
    logits_RV = random_logits(len(kinds), 5003)
    for position in range(5):
        rows = [row(position=position, seed=5, **kind) for kind in kinds]
        assert drawn(logits_RV, rows, device) == reference(logits_RV, rows).tolist()


EDGES: list[dict[str, Any]] = [
    {"top_k": 1},
    {"top_k": 5000},
    {"top_k": 999},
    {"top_k": 998, "top_p": 0.999},
    {"top_p": 1e-9},
    {"top_p": 1 - 2.0**-24},
    {"min_p": 1.0},
    {"min_p": 1e-12},
    {"temperature": 1e-6},
]


@pytest.mark.parametrize(
    ("sharpness", "temperature"),
    some([(1e-3, 1.0), (1.0, 50.0), (1.0, 1e-6), (1e4, 1.0), (1e4, 1e-6)], 0, 4, mark=SLOW_WITHOUT_GPU),
)
def test_extreme_limits_temperatures_and_logits(sharpness: float, temperature: float, device: torch.device) -> None:
    logits_RV = random_logits(len(EDGES), 1000, sharpness)
    rows = [row(position=2**31 - 1 - i, seed=i, **{"temperature": temperature} | edge) for i, edge in enumerate(EDGES)]
    assert drawn(logits_RV, rows, device) == reference(logits_RV, rows).tolist()


def test_greedy_and_random_rows_prefer_the_lowest_id_of_equals(device: torch.device) -> None:
    logits_RV = torch.zeros(3, 5003)
    logits_RV[0, [4000, 2500, 5002]] = 3.0
    logits_RV[1, [2047, 2048]] = 3.0
    rows = [row(temperature=0.0)] * 3
    assert drawn(logits_RV, rows, device) == [2500, 2047, 0]


def test_forbidden_tokens_are_never_drawn(device: torch.device) -> None:
    """Whole parts of the vocabulary are forbidden, in every other row all but one token."""
    logits_RV = torch.full((2 * len(KINDS), 5003), float("-inf"))
    logits_RV[0::2, [300, 4100, 5002]] = 1.0
    logits_RV[1::2, 4500] = -3e4
    rows = [row(position=i, seed=11, **KINDS[i // 2]) for i in range(2 * len(KINDS))]
    tokens = drawn(logits_RV, rows, device)
    assert tokens == reference(logits_RV, rows).tolist()
    assert set(tokens[1::2]) == {4500}


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NumPy's, in the interpreter
@pytest.mark.parametrize("place", some([None, 0, 2500, 5002], 0, 2, mark=SLOW_WITHOUT_GPU))
def test_a_row_without_a_finite_largest_logit_gets_no_token_and_the_others_theirs(
    place: int | None, device: torch.device
) -> None:
    """NaN is all of the row, or one logit in the first, a middle or the last part of the vocabulary."""
    rows = [row(position=i, seed=5, **KINDS[i // 2]) for i in range(2 * len(KINDS))]
    logits_RV = random_logits(len(rows), 5003)
    expected = reference(logits_RV, rows).tolist()
    broken = torch.tensor([float("nan"), float("-inf") if place is None else float("inf"), -float("nan")]).repeat(3)
    logits_RV[1::2, slice(None) if place is None else place] = broken[:, None] if place is None else broken
    tokens = drawn(logits_RV, rows, device)
    assert tokens[0::2] == expected[0::2]
    assert tokens == reference(logits_RV, rows).tolist()
    assert tokens[1::2] == [NO_TOKEN] * len(KINDS)


@pytest.mark.parametrize("capacity", some([CAPACITY, 1], 0, mark=SLOW_WITHOUT_GPU), ids=["listed", "in place"])
def test_ties_with_the_last_one_that_stays_stay(capacity: int, device: torch.device) -> None:
    """Probabilities are 0.219, three times 0.157 and, by the next smaller logit of all, twice 0.156."""
    logits_V = torch.tensor([1.25, 1.0, 1.0, 1.0, 1 - 2.0**-8, 1 - 2.0**-8], dtype=torch.bfloat16)
    limits: list[tuple[dict[str, Any], set[int]]] = [
        ({"top_k": 2}, {0, 1, 2, 3}),
        ({"top_p": 0.3}, {0, 1, 2, 3}),
        ({"min_p": 0.715}, {0, 1, 2, 3}),
        ({"top_p": 0.21}, {0}),
        ({"top_k": 4, "top_p": 0.3}, {0}),  # of what top_k leaves the first has 0.32
    ]
    draws = 15
    rows = [row(position=i, temperature=0.75, **limit) for limit, _ in limits for i in range(draws)]
    tokens = drawn(logits_V.repeat(len(rows), 1), rows, device, capacity=capacity)
    for i, (_, stay) in enumerate(limits):
        assert set(tokens[draws * i : draws * (i + 1)]) == stay


@pytest.mark.parametrize(
    ("capacity", "dtype"), each_value_once([1, 300], [torch.float32, torch.bfloat16], mark=SLOW_WITHOUT_GPU)
)
def test_lists_that_overflow_change_no_token(capacity: int, dtype: torch.dtype, device: torch.device) -> None:
    """Every limit leaves some hundred tokens of a flat row, more or fewer than the list holds."""
    limits: list[dict[str, Any]] = [{"top_k": 200}, {"top_p": 0.2}, {"min_p": 0.5}, {"top_k": 999, "top_p": 0.5}, {}]
    logits_RV = random_logits(len(limits), 2500, sharpness=0.5).to(dtype)
    for position in range(ROUNDS):
        rows = [row(position=position, seed=i, **limit) for i, limit in enumerate(limits)]
        assert drawn(logits_RV, rows, device, capacity=capacity) == reference(logits_RV.float(), rows).tolist()


def test_a_row_does_not_depend_on_its_neighbours(device: torch.device) -> None:
    logits_RV = random_logits(len(KINDS), 500)
    rows = [row(position=i, seed=2**40 + i, **kind) for i, kind in enumerate(KINDS)]
    together = drawn(logits_RV, rows, device)
    for i in range(len(rows)):
        assert drawn(logits_RV[i : i + 1], rows[i : i + 1], device) == together[i : i + 1]


def test_draws_follow_the_distribution(device: torch.device) -> None:
    """Chi-squared over positions; its 99.99% quantile is the bound."""
    vocabulary, draws = 8, 20_000 if ON_CARD else 400
    logits_V = random_logits(1, vocabulary, sharpness=1.0)[0]
    rows = [row(position=i, seed=1, temperature=1.5) for i in range(draws)]
    counts = torch.bincount(torch.tensor(drawn(logits_V.repeat(draws, 1), rows, device)), minlength=vocabulary)
    expected = (logits_V / 1.5).softmax(dim=-1) * draws
    assert expected.min() > 5
    assert ((counts - expected) ** 2 / expected).sum().item() < 29.9  # of 7 degrees of freedom
