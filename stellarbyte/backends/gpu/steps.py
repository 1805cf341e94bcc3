"""Steps of a model over GPU-resident slots: decoding as graphs, and prompts."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from stellarbyte.backends.gpu.adapters import Adapters, SideStream
from stellarbyte.backends.gpu.attention import PagedAttention
from stellarbyte.backends.gpu.graphs import Graphs
from stellarbyte.backends.gpu.model import TritonModel
from stellarbyte.backends.gpu.prompts import (
    MAX_PADDED_SAMPLES,
    MAX_PADDED_TOKENS,
    MAX_VERIFIED_TOKENS,
    Prompts,
    PromptShape,
    PromptTensors,
    shape_of,
    verified_shape,
)
from stellarbyte.backends.gpu.replaced import add_embeddings
from stellarbyte.backends.gpu.slots import (
    NUM_FIELDS,
    POSITION,
    TOKEN,
    SlotMemory,
    Upload,
    begin_decode,
    gather_fields,
    sampling_rows,
    store_tokens,
)
from stellarbyte.cache.paged_kv import PagedKVCache
from stellarbyte.ops.triton.attention import DecodeScratch, num_multiprocessors_of
from stellarbyte.ops.triton.lora import PROMPT_SEGMENT_ROWS, SEGMENT_ROWS, LoraRows, LoraScratch
from stellarbyte.ops.triton.paged import PagedRows
from stellarbyte.ops.triton.sampling.sampler import SamplerScratch, sample

# B rows of a decoding batch, T tokens of prompts, X tiles, R rows that sample, F fields, V vocabulary, C hidden size

_ROW_COUNTS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256)


class Decoding(NamedTuple):
    """Key of a program that decodes a batch."""

    rows: int  # one of `Steps.row_counts`
    segments: int  # of rows with adapters, a power of two or all rows; 0: no adapters
    truncates: bool  # any row has top_k, top_p or min_p
    beyond_plain: bool = False  # any row's adapter has DoRA, a head or an embedding


class Prefill(NamedTuple):
    """Key of a program that computes prompts."""

    shape: PromptShape
    truncates: bool
    beyond_plain: bool = False  # as in `Decoding`
    verifies: bool = False  # each token is sampled after, and attends as in steps that decode


@dataclass(frozen=True, kw_only=True)
class Computed:
    """Results of a part of a step, on the device, valid until the next step."""

    logits_RV: torch.Tensor  # of the rows that sample, before any adjustment
    tokens_R: torch.Tensor  # int32, sampled from them
    slots_R: torch.Tensor
    hidden_TC: torch.Tensor | None = None  # of all prompt tokens, if not run as a graph


class Steps:
    """Runs steps. Engine thread only, on one stream other than the default one.

    Args:
        cache: with one more block than sequences may use; padding rows write to the last one.
        max_rows: largest number of sequences in a decoding step, and number of slots.
        max_tokens: largest number of prompt tokens in a step.
        table_entries: length of a block table (see `paged.PagedRows`).
        max_drafted: largest number of tokens of drafts in a step; 0: there are no drafts.
    """

    def __init__(
        self,
        model: TritonModel,
        cache: PagedKVCache,
        *,
        max_rows: int,
        max_tokens: int,
        table_entries: int,
        max_drafted: int = 0,
    ) -> None:
        self.model = model
        self.cache = cache
        self.max_tokens = max_tokens
        self.max_drafted = max_drafted
        device, dtype = model.device, model.embedding_VC.dtype
        config = model.config
        furthest = max(window or config.max_position_embeddings for window in config.windows)
        num_multiprocessors = num_multiprocessors_of(device)
        max_attending = max(max_rows, MAX_VERIFIED_TOKENS) if max_drafted else max_rows
        self._attention = PagedAttention(
            model=model,
            cache=cache,
            rotations=model.rotations(furthest + config.sink_tokens + 2 * cache.block_size),
            scratch=DecodeScratch.make(max_attending, model.heads, num_multiprocessors, device),
            num_multiprocessors=num_multiprocessors,
        )
        self.row_counts = [count for count in _ROW_COUNTS if count < max_rows] + [max_rows]
        self.memory = SlotMemory(max_rows, max_rows, table_entries, device)
        self.memory.tables_SE.fill_(cache.keys_LBSKD.shape[1] - 1)
        self._graphs = Graphs(device)
        self._upload = Upload(device)
        vocab_size = config.vocab_size
        self._x_BC = torch.empty(max_rows, config.hidden_size, dtype=dtype, device=device)
        self._positions_B = torch.zeros(max_rows, dtype=torch.int32, device=device)
        self._fields_BF = torch.zeros(max_rows, NUM_FIELDS, dtype=torch.int32, device=device)
        self._logits_BV = torch.empty(max_rows, vocab_size, dtype=dtype, device=device)
        self._tokens_B = torch.zeros(max_rows, dtype=torch.int32, device=device)
        max_samples = max(max_rows, MAX_PADDED_SAMPLES)  # of prompts
        if max_drafted:
            max_samples = max(max_rows + max_drafted, MAX_VERIFIED_TOKENS)
        self._prompt_fields_RF = torch.zeros(max_samples, NUM_FIELDS, dtype=torch.int32, device=device)
        self._prompt_tokens_R = torch.zeros(max_samples, dtype=torch.int32, device=device)
        most_parts = (
            max_tokens // PROMPT_SEGMENT_ROWS + max_tokens + 128
        )  # tiles or segments of sequences of any lengths
        most_numbers = 4 * max(max_tokens, MAX_PADDED_TOKENS) + 4 * max_samples + 5 * most_parts + 64
        self._prompt_numbers = torch.zeros(most_numbers, dtype=torch.int32, device=device)
        self._sampler_scratch = SamplerScratch.make(max_samples, vocab_size, device)
        self._expert_scratch = model.make_expert_scratch(max(max_rows, max_tokens, MAX_PADDED_TOKENS))
        self._lora_scratch = self._side_stream = None
        self._segment_rows = PROMPT_SEGMENT_ROWS if model.is_invariant else SEGMENT_ROWS  # of rows that decode
        if model.bank.num_slots:
            most_rows, max_rank = max(max_rows, max_tokens, MAX_PADDED_TOKENS), model.bank.max_rank
            if model.is_invariant:  # adapters are added in place, as to prompts
                self._lora_scratch = LoraScratch.make(most_rows, max_rank, device, max_splits=1)
            else:
                self._lora_scratch = LoraScratch.make(most_rows, max_rank, device)
                self._side_stream = SideStream(model.bank, max_rows)

    @property
    def position(self) -> int:
        """Grows with every program and every collective. Ranks between steps that have launched the same of them have
        the same number."""
        ranks = self.model.ranks
        return self._graphs.num_runs + (0 if ranks is None else ranks.num_calls)

    # Sequences that decode

    def decode(self, num_rows: int, *, num_segments: int, truncates: bool, beyond_plain: bool = False) -> Computed:
        """Compute the next token of the memory's first `num_rows` rows.

        Args:
            num_segments: of rows with adapters, in the memory; 0: no adapters.
            truncates: any row has top_k, top_p or min_p.
            beyond_plain: any row's adapter has DoRA, a head or an embedding.
        """
        count = next(count for count in self.row_counts if count >= num_rows)
        segments = min(1 << (num_segments - 1).bit_length(), count) if num_segments else 0
        key = Decoding(count, segments, truncates, beyond_plain)
        self._graphs.run(key, lambda: self._decode(*key))
        return Computed(
            logits_RV=self._logits_BV[:num_rows],
            tokens_R=self._tokens_B[:num_rows],
            slots_R=self.memory.rows_B[:num_rows],
        )

    def _decode(self, count: int, segments: int, truncates: bool, beyond_plain: bool = False) -> None:
        memory, model = self.memory, self.model
        x_BC, positions_B = self._x_BC[:count], self._positions_B[:count]
        fields_BF, logits_BV, tokens_B = self._fields_BF[:count], self._logits_BV[:count], self._tokens_B[:count]
        first_token = 0 if model.ranks is None else model.ranks.vocabulary.start
        begin_decode(memory, model.embedding_VC, positions_B, fields_BF, x_BC, model.embedding_multiplier, first_token)
        if model.ranks is not None:
            x_BC = model.ranks.all_reduce(x_BC)
        rows = PagedRows(positions_B, memory.rows_B[:count], memory.tables_SE)
        lora = None
        if segments:
            lora = LoraRows(
                memory.segment_starts_B[:segments],
                memory.segment_counts_B[:segments],
                memory.segment_slots_B[:segments],
                memory.scales_B[:count],
                self._segment_rows,
            )
            if beyond_plain:
                add_embeddings(x_BC, fields_BF[:, TOKEN], lora, model.bank, model.embedding_multiplier)
        hidden_BC = model.forward(
            x_BC,
            self._attention.of_any(rows) if model.is_invariant else self._attention.of_newest(rows),
            self._adapters(lora, self._side_stream, beyond_plain),
            self._expert_scratch,
        )
        model.head(hidden_BC, out=logits_BV, adapters=lora if beyond_plain else None)
        sample(logits_BV, sampling_rows(fields_BF), tokens_B, self._sampler_scratch, truncates=truncates)
        store_tokens(memory, memory.rows_B[:count], tokens_B)

    def replace_tokens(self, computed: Computed, rows: list[int], tokens_R: torch.Tensor) -> None:
        """Replace sampled tokens in rows of a part of the running step."""
        index_R = torch.tensor(rows, device=tokens_R.device)
        computed.tokens_R[index_R] = tokens_R.int()
        store_tokens(self.memory, computed.slots_R[index_R], tokens_R.int())

    def _adapters(self, rows: LoraRows | None, side_stream: SideStream | None, beyond_plain: bool) -> Adapters | None:
        if rows is None:
            return None
        assert self._lora_scratch is not None
        return Adapters(self.model.bank, rows, self._lora_scratch, side_stream, has_factors=beyond_plain)

    # Prompts

    def prefill(
        self, prompts: Prompts, *, truncates: bool, wants_hidden: bool = False, beyond_plain: bool = False
    ) -> Computed:
        """Compute tokens that the host knows; sample the next tokens of the rows that need them, and store these in
        their slots. A slot with several such rows has any of these tokens then (see `settle`).

        Args:
            truncates: any row that samples has top_k, top_p or min_p.
            wants_hidden: include the hidden states in the result.
            beyond_plain: any sequence's adapter has DoRA, a head or an embedding.
        """
        num_tokens, num_samples = len(prompts.token_ids), len(prompts.sample_rows)
        assert num_samples <= len(self._prompt_tokens_R), "drafts have more tokens than `max_drafted`"
        verifies = bool(self.max_drafted) and num_tokens == num_samples <= MAX_VERIFIED_TOKENS
        captured = not wants_hidden and num_tokens <= MAX_PADDED_TOKENS and num_samples <= MAX_PADDED_SAMPLES
        shape = verified_shape(prompts) if verifies else shape_of(prompts, padded=captured)
        key = Prefill(shape, truncates, beyond_plain, verifies)
        inputs = shape.unpack(self._upload.copy(shape.pack(prompts), self._prompt_numbers))

        def program() -> tuple[torch.Tensor, torch.Tensor]:
            return self._prefill(inputs, truncates, beyond_plain, verifies)

        if captured or (verifies and not wants_hidden):
            hidden_TC, logits_RV = self._graphs.run(key, program, will_recur=False)
        else:
            hidden_TC, logits_RV = program()
        return Computed(
            logits_RV=logits_RV[:num_samples],
            tokens_R=self._prompt_tokens_R[:num_samples],
            slots_R=inputs.sample_slots_R[:num_samples],
            hidden_TC=hidden_TC if wants_hidden else None,
        )

    def _prefill(
        self, inputs: PromptTensors, truncates: bool, beyond_plain: bool, verifies: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        model, memory = self.model, self.memory
        rows = PagedRows(inputs.positions_T, inputs.slots_T, memory.tables_SE)
        if model.is_invariant:
            attend = self._attention.of_any(rows)
        elif verifies:
            attend = self._attention.of_few(rows)
        else:
            attend = self._attention.of_prompts(rows, inputs.tile_starts_X, inputs.tile_counts_X)
        x_TC, sample_adapters = model.embed(inputs.token_ids_T), None
        if beyond_plain:
            assert inputs.adapters is not None
            add_embeddings(x_TC, inputs.token_ids_T, inputs.adapters, model.bank, model.embedding_multiplier)
            sample_adapters = inputs.sample_adapters(self._segment_rows)
        hidden_TC = model.forward(
            x_TC, attend, self._adapters(inputs.adapters, None, beyond_plain), self._expert_scratch
        )
        num_samples = len(inputs.sample_rows_R)
        logits_RV = model.head(hidden_TC[inputs.sample_rows_R], adapters=sample_adapters)
        if num_samples:
            fields_RF, tokens_R = self._prompt_fields_RF[:num_samples], self._prompt_tokens_R[:num_samples]
            gather_fields(memory, inputs.sample_slots_R, inputs.sample_positions_R, fields_RF)
            sample(logits_RV, sampling_rows(fields_RF), tokens_R, self._sampler_scratch, truncates=truncates)
            store_tokens(memory, inputs.sample_slots_R, tokens_R)
        return hidden_TC, logits_RV

    def settle(self, slots: list[int], positions: list[int], tokens: list[int]) -> None:
        """Set the newest tokens of slots, and their positions."""
        memory = self.memory
        indices = [memory.field_at(slot, field) for field in (POSITION, TOKEN) for slot in slots]
        memory.update(indices, positions + tokens)

    # Preparation

    def rehearse(self) -> None:
        """Run the largest steps once, on slot 0, so that their memory can be measured."""
        prompts = Prompts()
        prompts.add([0] * self.max_tokens, 0, 0, num_samples=1, bank_slot=0, scale=1.0)
        self.prefill(prompts, truncates=False, wants_hidden=True)
        self.decode(self.row_counts[-1], num_segments=0, truncates=False)

    def run_program(self, key: Decoding | Prefill) -> None:
        """Run a program on the memory's current contents, to compile its kernels and those around it in a step."""
        self.memory.update([self.memory.field_at(0, POSITION)], [0])
        self._program(key)()

    def note_compiled(self, key: Decoding | Prefill) -> None:
        """Note that this program ran in `Steps` of the same model and sizes. On any thread."""
        self._graphs.note_compiled(key)

    def capture(self, key: Decoding | Prefill) -> None:
        """Capture a program noted as compiled, without running it."""
        self._graphs.capture(key, self._program(key))

    def _program(self, key: Decoding | Prefill) -> Callable[[], object]:
        if isinstance(key, Decoding):
            return lambda: self._decode(*key)
        inputs = key.shape.unpack(self._prompt_numbers)
        return lambda: self._prefill(inputs, *key[1:])
