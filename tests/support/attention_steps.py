"""One step of paged attention: inputs for the Triton kernels and what the torch backend answers."""

import itertools
from dataclasses import dataclass, field

import torch

from stellarbyte.cache.paged_kv import PagedKVCache
from stellarbyte.config import ByteModelConfig
from stellarbyte.forward_batch import ForwardBatch
from stellarbyte.model.norm import ByteRMSNorm
from stellarbyte.ops import reference
from stellarbyte.ops.triton.attention import (
    TILE_ROWS,
    DecodeScratch,
    decode_attention,
    prefill_attention,
    write_kv,
)
from stellarbyte.ops.triton.lora import Addend
from stellarbyte.ops.triton.paged import HeadShape, PagedRows, Rotations
from stellarbyte.xpos import Rotation, XPosRotaryEmbedding
from tests.support.models.byte_transformer import make_config

# T tokens, H query heads, K kv heads, D head dim, N packed row or sequences, A = H · D, B blocks, S block size
# E entries of a table, X tiles

MAX_SPLITS = 8
MULTIPROCESSORS = 132  # of an H100


@dataclass(kw_only=True)
class Case:
    """Sequences of which the tokens first..first + count - 1 are computed; all that they see before is in the cache."""

    spans: list[tuple[int, int]]  # first position and number of tokens of each sequence
    block_size: int = 4
    window: int | None = None
    sinks: int = 0
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 16
    xpos: bool = True
    qk_norm: bool = False
    softcap: float | None = None
    softmax_sink: bool = False

    def __str__(self) -> str:
        default = Case(spans=[])
        parts = [f"{name}={value}" for name, value in vars(self).items() if value != getattr(default, name)]
        return " ".join(parts).replace("spans=", "")


@dataclass(kw_only=True)
class Step:
    """A case in both backends' words. Both caches hold the same, but the reference's has 0 where there is no key."""

    case: Case
    batch: ForwardBatch
    config: ByteModelConfig
    rotation: Rotation
    norms: tuple[ByteRMSNorm, ByteRMSNorm] | None
    softmax_sink_H: torch.Tensor | None
    qkv_TN: torch.Tensor
    keys_BSKD: torch.Tensor
    values_BSKD: torch.Tensor
    rows: PagedRows
    rotations: Rotations
    heads: HeadShape = field(init=False)

    def __post_init__(self) -> None:
        self.heads = HeadShape(self.case.num_heads, self.case.num_kv_heads, self.case.head_dim)

    def expected(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The reference's output [T, A], keys and values."""
        heads, case = self.heads, self.case
        sizes = [heads.num_heads, heads.num_kv_heads, heads.num_kv_heads]
        q_THD, k_TKD, v_TKD = self.qkv_TN.unflatten(1, (-1, case.head_dim)).split(sizes, dim=1)
        if self.norms is not None:
            q_THD, k_TKD = self.norms[0](q_THD), self.norms[1](k_TKD)
        k_TKD = self.rotation.rotate_keys(k_TKD, self.batch.offsets_T, case.block_size)
        keys, values = (x.float().nan_to_num().to(x.dtype) for x in (self.keys_BSKD, self.values_BSKD))
        reference.write_kv(keys, values, self.batch.slots_T, k_TKD, v_TKD)
        out_THD = reference.paged_attention(
            q_THD.contiguous(), keys, values, self.batch, self.rotation, window=case.window, sink_tokens=case.sinks,
            softcap=case.softcap, softmax_sink_H=self.softmax_sink_H,
        )  # fmt: skip
        return out_THD.flatten(1), keys, values

    def prefill(self) -> torch.Tensor:
        ends = self.batch.query_starts
        tiles = [
            (first, min(TILE_ROWS, stop - first))
            for start, stop in itertools.pairwise(ends)
            for first in range(start, stop, TILE_ROWS)
        ]
        tiles.insert(1, (0, 0))  # none
        starts_X, counts_X = torch.tensor(tiles, dtype=torch.int32, device=self.qkv_TN.device).T.contiguous()
        q_norm_D, k_norm_D = self._norm_weights()
        write_kv(
            self.qkv_TN, self.keys_BSKD, self.values_BSKD, self.rows, self.rotations, self.heads,
            sink_tokens=self.case.sinks, k_norm_D=k_norm_D, norm_eps=self.config.rms_norm_eps,
        )  # fmt: skip
        out_TA = self.empty_output()
        prefill_attention(
            self.qkv_TN, out_TA, self.keys_BSKD, self.values_BSKD, self.rows, starts_X, counts_X, self.rotations,
            self.heads, window=self.case.window, sink_tokens=self.case.sinks, score_scale=self.rotation.score_scale,
            softcap=self.case.softcap, softmax_sink_H=self.softmax_sink_H, q_norm_D=q_norm_D,
            norm_eps=self.config.rms_norm_eps,
        )  # fmt: skip
        return out_TA

    def decode(
        self, num_splits: int, scratch: DecodeScratch | None = None, addend: Addend | None = None
    ) -> torch.Tensor:
        if scratch is None:
            scratch = DecodeScratch.make(len(self.qkv_TN), self.heads, MULTIPROCESSORS, self.qkv_TN.device)
        q_norm_D, k_norm_D = self._norm_weights()
        out_TA = self.empty_output()
        decode_attention(
            self.qkv_TN, out_TA, self.keys_BSKD, self.values_BSKD, self.rows, scratch, self.rotations, self.heads,
            window=self.case.window, sink_tokens=self.case.sinks, score_scale=self.rotation.score_scale,
            softcap=self.case.softcap, softmax_sink_H=self.softmax_sink_H, q_norm_D=q_norm_D, k_norm_D=k_norm_D,
            norm_eps=self.config.rms_norm_eps, num_splits=num_splits, addend=addend,
        )  # fmt: skip
        return out_TA

    def empty_output(self) -> torch.Tensor:
        return self.qkv_TN.new_full((len(self.qkv_TN), self.heads.num_heads * self.heads.head_dim), torch.nan)

    def _norm_weights(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        return (None, None) if self.norms is None else (self.norms[0].weight, self.norms[1].weight)


@torch.no_grad()
def make_step(
    case: Case, device: torch.device, dtype: torch.dtype = torch.float32, cache_dtype: torch.dtype | None = None
) -> Step:
    torch.manual_seed(0)
    config = make_config(
        num_attention_heads=case.num_heads, num_key_value_heads=case.num_kv_heads, head_dim=case.head_dim,
        sliding_window=case.window, sink_tokens=case.sinks, use_xpos=case.xpos, qk_norm=case.qk_norm,
        num_hidden_layers=1,
    )  # fmt: skip
    rotation = XPosRotaryEmbedding(config).of_layer(0, config.context_length)
    tables = [_live_blocks(case, first, first + count - 1) for first, count in case.spans]
    reach = max(TILE_ROWS - 1, *(_reach(case, table, *span) for table, span in zip(tables, case.spans, strict=True)))

    # Blocks in any order; the last one is nobody's and stays NaN, as every slot whose token nobody has seen.
    num_blocks = sum(len(table) for table in tables) + 1
    ids = iter(torch.randperm(num_blocks - 1).tolist())
    tables_of_ids = [[(next(ids), base, is_sink) for base, is_sink in table] for table in tables]
    cache = PagedKVCache(config, num_blocks, case.block_size, dtype if cache_dtype is None else cache_dtype, device)
    keys_BSKD, values_BSKD = cache.keys_LBSKD[0], cache.values_LBSKD[0]
    for numbers_BSKD in (keys_BSKD, values_BSKD):
        numbers_BSKD.copy_(torch.full(numbers_BSKD.shape, torch.nan))
    slot_of = [
        {
            base + offset: block * case.block_size + offset
            for block, base, is_sink in table
            for offset in range(case.block_size)
            if not is_sink or base + offset < case.sinks
        }
        for table in tables_of_ids
    ]
    for (first, _), slots in zip(case.spans, slot_of, strict=True):
        for position in (position for position in slots if position < first):
            k_1KD, v_1KD = torch.randn(2, 1, case.num_kv_heads, case.head_dim)
            offset = torch.tensor([slots[position] % case.block_size])
            k_1KD = rotation.rotate_keys(k_1KD, offset, case.block_size).to(device)
            reference.write_kv(
                keys_BSKD, values_BSKD, torch.tensor([slots[position]], device=device), k_1KD, v_1KD.to(device)
            )

    tokens = [(i, m) for i, (first, count) in enumerate(case.spans) for m in range(first, first + count)]
    slots_T = torch.tensor([slot_of[i][m] for i, m in tokens], device=device)
    positions_T = torch.tensor([m for _, m in tokens], device=device)
    width = max(len(table) for table in tables)
    block_tables_NM, block_bases_NM = torch.zeros(2, len(tables), width, dtype=torch.int64)
    for i, table in enumerate(tables_of_ids):
        for j, (block, base, _) in enumerate(table):
            block_tables_NM[i, j], block_bases_NM[i, j] = block, base
    starts = [0]
    for _, count in case.spans:
        starts.append(starts[-1] + count)
    batch = ForwardBatch(
        token_ids_T=torch.zeros_like(positions_T),
        positions_T=positions_T,
        slots_T=slots_T,
        offsets_T=slots_T % case.block_size,
        query_starts=tuple(starts),
        block_tables_NM=block_tables_NM.to(device),
        block_bases_NM=block_bases_NM.to(device),
        num_blocks=tuple(len(table) for table in tables),
        num_sink_blocks=tuple(sum(is_sink for _, is_sink in table) for table in tables),
        reach=reach,
        logits_rows=positions_T[:0],
    )
    norms = None
    if case.qk_norm:
        q_norm, k_norm = (ByteRMSNorm(case.head_dim, config.rms_norm_eps, zero_centered=False) for _ in "qk")
        norms = q_norm, k_norm
        for norm in norms:
            norm.to(device, dtype).weight.uniform_(0.5, 1.5)
    sink_H = torch.linspace(-1, 6, case.num_heads)  # from less than a key to most of the softmax
    width_N = (case.num_heads + 2 * case.num_kv_heads) * case.head_dim
    return Step(
        case=case,
        batch=batch,
        config=config,
        rotation=rotation,
        norms=norms,
        softmax_sink_H=sink_H.to(device, dtype) if case.softmax_sink else None,
        qkv_TN=torch.randn(len(positions_T), width_N).to(device, dtype),
        keys_BSKD=keys_BSKD,
        values_BSKD=values_BSKD,
        rows=PagedRows(
            positions_T.int(),
            torch.tensor([i for i, _ in tokens], dtype=torch.int32, device=device),
            _rings(case, tables_of_ids, unused=num_blocks - 1).to(device),
        ),
        rotations=_rotations(rotation, reach, device),
    )


def _live_blocks(case: Case, first: int, last: int) -> list[tuple[int, bool]]:
    """(base, is a sink block) of the blocks that queries first..last see or write, as the scheduler orders them."""
    size, sinks = case.block_size, case.sinks
    table = [(base, True) for base in range(0, min(sinks, last + 1), size)]
    oldest = 0 if case.window is None else max(0, first - case.window + 1 - sinks) // size
    return table + [(base, False) for base in range(sinks + oldest * size, last + 1, size)]


def _reach(case: Case, table: list[tuple[int, bool]], first: int, count: int) -> int:
    last = first + count - 1
    capped = last if case.window is None else min(last, case.window + case.sinks - 1)
    return max(capped if is_sink else max(last - base, abs(first - base)) for base, is_sink in table)


def _rings(case: Case, tables: list[list[tuple[int, int, bool]]], unused: int) -> torch.Tensor:
    """Tables [N, E] as `PagedRows` wants them, in a wider tensor; entries of no block name one that holds NaN."""
    num_sink_blocks = -(-case.sinks // case.block_size)
    ring = max(1, *(sum(not is_sink for *_, is_sink in table) for table in tables))
    entries = num_sink_blocks + ring
    tables_NE = torch.full((len(tables), entries + 3), unused, dtype=torch.int32)
    for i, table in enumerate(tables):
        for block, base, is_sink in table:
            number = base // case.block_size if is_sink else (base - case.sinks) // case.block_size % ring
            tables_NE[i, number + (0 if is_sink else num_sink_blocks)] = block
    return tables_NE[:, :entries]


def _rotations(rotation: Rotation, reach: int, device: torch.device) -> Rotations:
    """Tables as long as they must be; whoever reads past them reads NaN."""
    cos_OD, sin_OD = (
        torch.cat([table[: reach + 1], torch.full_like(table[:64], torch.nan)])[: reach + 1]
        for table in rotation.cache.tables(reach + 1, device)
    )
    gain_D = None if rotation.query_gain is None else rotation.query_gain.to(device)
    return Rotations(cos_OD, sin_OD, rotation.log_decay(device), gain_D)
