"""Adapters where serving kernels read them: one row of numbers a slot. Knows no files and no requests.

A slot holds an adapter compactly, by layers; within a layer first every A [r, in], then every scale · Bᵀ [r, out], both
in the order of `PROJECTIONS`. So projections that share an input have their A's next to each other, and one product
can shrink for all of them. `alpha / r` is in B already; what is left to a request is its own scale.
"""

import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from stellarbyte.config import ByteModelConfig
from stellarbyte.lora.pinned_copies import PinnedCopies
from stellarbyte.lora.untouched_memory import large_array, untouched_memory

# S slots, L layers, P projections, F numbers of a slot, r rank

PROJECTIONS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
SHARED_INPUTS = (slice(0, 3), slice(3, 4), slice(4, 6), slice(6, 7))  # projections that read the same activations

Integers = npt.NDArray[np.int64]
Shape = tuple[int, int]  # (out, in)


def projection_shapes(config: ByteModelConfig) -> tuple[Shape, ...]:
    """(out, in) of each of `PROJECTIONS`; the same in every layer."""
    assert config.head_dim is not None and config.num_key_value_heads is not None  # the config fills both in
    hidden, inner = config.hidden_size, config.intermediate_size
    query, key = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    return (
        *((query, hidden), (key, hidden), (key, hidden), (hidden, query)),
        *((inner, hidden), (inner, hidden), (hidden, inner)),
    )


def module_name(layer: int, projection: int) -> str:
    """A projection's name in the model, as adapter files have it."""
    return f"model.layers.{layer}.{PROJECTIONS[projection]}"


def adaptable_modules(config: ByteModelConfig) -> dict[str, Shape]:
    """Every module that an adapter may change when served, with its (out, in)."""
    return {
        module_name(layer, projection): shape
        for layer in range(config.num_hidden_layers)
        for projection, shape in enumerate(projection_shapes(config))
    }


@dataclass(frozen=True, kw_only=True)
class PackedAdapter:
    """An adapter in the form of a slot, in CPU memory."""

    numbers: torch.Tensor  # [n ≤ F], in the bank's dtype
    ranks_LP: Integers  # 0: the adapter leaves that projection alone

    @property
    def num_bytes(self) -> int:
        return self.numbers.nbytes

    def is_finite(self) -> bool:
        return is_finite(self.numbers)


def is_finite(numbers: torch.Tensor) -> bool:
    """Whether there is no NaN and no infinity. The sum takes no copy; one that overflowed says nothing yet."""
    return bool(numbers.sum().isfinite()) or bool(numbers.isfinite().all())


def pack_adapter(
    weights: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
    scales: Mapping[str, float],
    config: ByteModelConfig,
    dtype: torch.dtype,
) -> PackedAdapter:
    """Bring an adapter into the form of a slot.

    Args:
        weights: module name → (A [r, in], B [out, r]); names and shapes are those of `adaptable_modules`.
        scales: module name → alpha / r of that module.
    """
    shapes = projection_shapes(config)
    ranks_LP = np.zeros((config.num_hidden_layers, len(PROJECTIONS)), dtype=np.int64)
    for layer, projection in np.ndindex(*ranks_LP.shape):
        if (name := module_name(layer, projection)) in weights:
            ranks_LP[layer, projection] = len(weights[name][0])
    a_LP, b_LP, total = _offsets(ranks_LP, shapes)
    numbers = large_array(total, dtype)
    bits = _bits(numbers)
    for layer, projection in np.argwhere(ranks_LP).tolist():
        name, (out, width) = module_name(layer, projection), shapes[projection]
        a, b = weights[name]
        rank, a_start, b_start = len(a), a_LP[layer, projection], b_LP[layer, projection]
        bits[a_start : a_start + rank * width].reshape(rank, width)[:] = _bits(a if a.dtype == dtype else a.to(dtype))
        bits[b_start : b_start + rank * out].reshape(rank, out)[:] = _bits(_scaled(b, scales[name], dtype)).T
    return PackedAdapter(numbers=numbers, ranks_LP=ranks_LP)


def _scaled(matrix: torch.Tensor, scale: float, dtype: torch.dtype) -> torch.Tensor:
    """Rounded once, from a product in float32."""
    if matrix.dtype == dtype:
        return matrix if scale == 1 else matrix * scale
    return (matrix.float() * scale).to(dtype)


def _bits(numbers: torch.Tensor) -> npt.NDArray[np.generic]:
    """A view without a number format. Numpy has no bfloat16, but transposes twice as fast as torch does, and unlike
    torch it takes views without giving the GIL away, for which several reading threads would then wait."""
    return numbers.view({2: torch.int16, 4: torch.int32}[numbers.element_size()]).numpy()


def _part(numbers: torch.Tensor, offset: int, rank: int, width: int) -> torch.Tensor:
    return numbers[offset : offset + rank * width].view(rank, width)


def _offsets(ranks_LP: Integers, shapes: tuple[Shape, ...]) -> tuple[Integers, Integers, int]:
    """Where each A and each Bᵀ begins, and where the last one ends."""
    sizes_L2P: Integers = np.stack([ranks_LP * [width for _, width in shapes], ranks_LP * [n for n, _ in shapes]], 1)
    ends = np.cumsum(sizes_L2P, dtype=np.int64).reshape(sizes_L2P.shape)
    starts = ends - sizes_L2P
    return starts[:, 0].copy(), starts[:, 1].copy(), int(ends[-1, -1, -1])


class BankTables(NamedTuple):
    """Where kernels find an adapter's parts: int64 tensors on the bank's device, at fixed addresses.

    Offsets count numbers from the start of the slot's row; where the rank is 0 they say nothing.
    """

    ranks_SLP: torch.Tensor
    a_offsets_SLP: torch.Tensor
    b_offsets_SLP: torch.Tensor


class LoraBank:
    """The adapters that a step can use. Slot 0 is the null adapter: it has rank 0 everywhere.

    A slot may be filled or cleared by any thread while steps run, as long as no running step uses it; one is filled at
    a time. On a CUDA device the thread that launches steps does so ahead: it takes a `fence` when the last step that
    uses a slot is launched, and `fill` waits for that; and it calls `clear` itself, on the steps' stream.

    Args:
        num_slots: beside slot 0.
        max_rank: most that any projection of an adapter may have.
    """

    def __init__(
        self,
        config: ByteModelConfig,
        num_slots: int = 0,
        max_rank: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.config = config
        self.num_slots = num_slots
        self.max_rank = max_rank
        self.dtype = dtype
        self.shapes = projection_shapes(config)
        shape = (num_slots + 1, config.num_hidden_layers, len(PROJECTIONS))
        self.ranks_SLP, self.a_offsets_SLP, self.b_offsets_SLP = (np.zeros(shape, dtype=np.int64) for _ in range(3))
        host_tables = map(torch.from_numpy, (self.ranks_SLP, self.a_offsets_SLP, self.b_offsets_SLP))
        self.tables = self._host_tables = BankTables(*host_tables)
        full = 1 + config.num_hidden_layers * max_rank * sum(out + width for out, width in self.shapes)
        bytes_per_slot = -(-full * dtype.itemsize // mmap.PAGESIZE) * mmap.PAGESIZE
        count = (num_slots + 1) * bytes_per_slot // dtype.itemsize
        self._memory: mmap.mmap | None = None
        self._copies: PinnedCopies | None = None
        if torch.device(device).type == "cpu":
            self._memory = untouched_memory((num_slots + 1) * bytes_per_slot)
            numbers = torch.frombuffer(self._memory, dtype=dtype, count=count)
        else:
            numbers = torch.zeros(count, dtype=dtype, device=device)
            self.tables = BankTables(*(table.to(device) for table in self._host_tables))
            self._copies = PinnedCopies(numbers.device) if num_slots else None
        self._bytes_per_slot = bytes_per_slot
        self.numbers_SF = numbers.view(num_slots + 1, -1)

    def fence(self) -> torch.cuda.Event | None:
        """What `fill` is to wait for on the device: everything that the calling thread's current stream has by now."""
        return None if self._copies is None else torch.cuda.current_stream(self.numbers_SF.device).record_event()

    def fill(self, slot: int, adapter: PackedAdapter, fence: torch.cuda.Event | None = None) -> None:
        """Put an adapter into a slot, which is overwritten; when this returns, it is there.

        Args:
            fence: a CUDA device touches the slot after this only; None: after what this thread's stream has by now.
        """
        assert 1 <= slot <= self.num_slots
        if self._copies is None:
            self.clear(slot)
            self.numbers_SF[slot, : len(adapter.numbers)].copy_(adapter.numbers)
        self.a_offsets_SLP[slot], self.b_offsets_SLP[slot], _ = _offsets(adapter.ranks_LP, self.shapes)
        self.ranks_SLP[slot] = adapter.ranks_LP
        if self._copies is not None:
            numbers = (adapter.numbers, self.numbers_SF[slot, : len(adapter.numbers)])
            tables = [(host[slot], there[slot]) for host, there in zip(self._host_tables, self.tables, strict=True)]
            self._copies.run([numbers, *tables], after=self.fence() if fence is None else fence)

    def clear(self, slot: int) -> None:
        """Make a slot's adapter the null adapter; on a CPU its memory goes back to the system."""
        assert 1 <= slot <= self.num_slots
        self.ranks_SLP[slot] = 0
        if self._copies is not None:
            self.tables.ranks_SLP[slot].zero_()
        if self._memory is not None and hasattr(mmap, "MADV_DONTNEED"):
            self._memory.madvise(mmap.MADV_DONTNEED, slot * self._bytes_per_slot, self._bytes_per_slot)

    def a(self, slot: int, layer: int, projections: slice) -> torch.Tensor:
        """[Σ r, in]: the A's of projections that share an input, one below the other."""
        first = projections.start
        rank = int(self.ranks_SLP[slot, layer, projections].sum())
        return _part(self.numbers_SF[slot], int(self.a_offsets_SLP[slot, layer, first]), rank, self.shapes[first][1])

    def b(self, slot: int, layer: int, projection: int) -> torch.Tensor:
        """[r, out]: alpha / r · Bᵀ of one projection."""
        rank = int(self.ranks_SLP[slot, layer, projection])
        start = int(self.b_offsets_SLP[slot, layer, projection])
        return _part(self.numbers_SF[slot], start, rank, self.shapes[projection][0])
