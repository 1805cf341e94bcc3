"""The messages between HTTP processes and the engine process, as msgpack.

An HTTP process sends a `Command`, the engine answers with an `Event`. Both are tagged unions, so one decoder reads
each direction. Messages are plain data and cannot run code.
"""

import msgspec

from stellarbyte_server.protocol.adapter_versions import (
    AdapterLocated,
    AdapterProbe,
    LocateAdapter,
    RestoreAdapters,
    SetVersions,
    StoredAdapter,
)
from stellarbyte_server.protocol.histogram import Buckets
from stellarbyte_server.protocol.offload_stats import OffloadStats
from stellarbyte_server.protocol.request import GenerationRequest, adapter_loading

FAILED = "The engine failed while it worked on this request."
HEARTBEAT_INTERVAL_S = 1.0  # each side sends a message at least this often


class KeyLimits(msgspec.Struct, frozen=True, kw_only=True):
    """Limits of one API key's requests, over all HTTP processes. None: no limit."""

    key_name: str
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None  # of prompts and answers
    concurrent_streams: int | None = None  # groups of requests that run or wait


class Submit(msgspec.Struct, frozen=True, tag=True):
    """Queue requests, all or none; the answer to each is `Rejected`, or `Accepted` when it runs, then its deltas.

    Times are seconds of the machine's monotonic clock, which all processes share.
    """

    requests: tuple[GenerationRequest, ...]
    limits: KeyLimits | None = None
    continues: bool = False  # part of a group that was admitted before, exempt from limits
    is_reserved: bool = False  # a `ReserveKey` has counted them
    num_later_tokens: int = 0  # of prompts of the same group that will be submitted later
    arrived_s: float | None = None  # arrival of the client's request; None: when the engine reads the message
    sent_s: float | None = None


class Abort(msgspec.Struct, frozen=True, tag=True):
    """Abort a request and free its resources; unknown ids are ignored (it may just have ended)."""

    request_id: str


class Heartbeat(msgspec.Struct, frozen=True, tag=True):
    """An HTTP process is alive. Without one for a while the engine aborts that process's requests."""

    peer_id: bytes  # the identity of its socket; heartbeats use another one, in a separate thread


class HttpObservations(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """An HTTP process's observations since its last message; the engine adds them to its totals."""

    first_token_s: Buckets
    stream_lag_s: Buckets
    rejected: dict[str, int]  # by reason


class ReadTotals(msgspec.Struct, frozen=True, tag=True):
    """Answered by `EngineTotals` to all HTTP processes, so that counters never appear to decrease between processes.

    `TotalsRead` with its number follows.
    """

    number: int


class LoadAdapter(msgspec.Struct, frozen=True, tag=True):
    """Read and check a version of a name; answered by `AdapterLoaded` or `CallFailed`.

    It is for NAME@HASH only, until `SetVersions` makes it current or gives it a share.
    """

    call_id: str
    name: str
    files: StoredAdapter
    in_place: bool  # it may replace the adapter of that name, if any
    pinned: bool = False  # it will keep a slot
    probe: bool = False  # refuse it unless it changes a logit and all logits are finite


class Settle(msgspec.Struct, frozen=True, tag=True):
    """Answered by `Settled` when earlier unloads of this sender have changed what their names mean."""

    call_id: str


class UnloadAdapter(msgspec.Struct, frozen=True, tag=True):
    """Unload an adapter; answered by `AdapterUnloaded`, after its running requests have ended, or by `CallFailed`."""

    call_id: str
    name: str


class ListAdapters(msgspec.Struct, frozen=True, tag=True):
    """Answered by `AdapterList`."""

    call_id: str


class ChargeKey(msgspec.Struct, frozen=True, tag=True):
    """Count a request that does not reach the engine against its key's requests per minute.

    Answered by `KeyCharged`, or by `CallFailed` if the limit is reached.
    """

    call_id: str
    limits: KeyLimits


class ReserveKey(msgspec.Struct, frozen=True, tag=True):
    """Count requests of any engine against their key's limits; answered by `KeyCharged`, or `CallFailed` at a limit."""

    call_id: str
    group_id: str  # of the requests, until `ReleaseKey`
    limits: KeyLimits
    num_tokens: int  # of their prompts


class ReleaseKey(msgspec.Struct, frozen=True, tag=True):
    """The requests of a `ReserveKey` have ended."""

    group_id: str
    was_refused: bool  # before any of them ran, so that they do not count


class NoteKeyTokens(msgspec.Struct, frozen=True, tag=True):
    """Tokens that a key has used at other engines, which count towards its tokens per minute; < 0: given back."""

    limits: KeyLimits
    num_tokens: int


AdapterChange = LoadAdapter | SetVersions | RestoreAdapters | UnloadAdapter
Call = AdapterChange | LocateAdapter | Settle | ListAdapters
KeyCommand = ChargeKey | ReserveKey | ReleaseKey | NoteKeyTokens
Command = Submit | Abort | Heartbeat | HttpObservations | ReadTotals | KeyCommand | Call


class Accepted(msgspec.Struct, frozen=True, tag=True):
    """The request runs: its answer can start."""

    request_id: str
    adapter_hash: str = ""  # of the version it uses; "": none
    started_s: float = 0.0  # start of its first step by the machine's monotonic clock, set by the engine process


class Rejected(msgspec.Struct, frozen=True, tag=True):
    """The request will not run; `message` is one sentence for the user. Sent immediately or from the queue."""

    request_id: str
    message: str
    code: str | None
    param: str | None = None
    retry_after_s: int | None = None  # time until a retry, if known


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True):
    """Log-probability of a token before temperature, penalties and truncation, and those of the likeliest tokens."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()  # token id, logarithm; the likeliest first
    rank: int = 0  # of a prompt's token: its place among all by likelihood, from 1 on


class Delta(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One step's addition to one answer. Consecutive deltas may be merged: see `merged`."""

    request_id: str
    text: str
    num_tokens: int
    reasoning: str = ""  # text before the answer's
    recipients: tuple[tuple[int, str], ...] = ()  # of the answer's text from that character on; "": the user
    num_reasoning_tokens: int = 0  # tokens, of this delta or earlier ones, that proved to be reasoning with this delta
    token_ids: tuple[int, ...] = ()  # if requested
    logprobs: tuple[TokenLogprob, ...] = ()  # of the answer's tokens, if requested
    offsets: tuple[int, ...] = ()  # with logprobs: characters of the answer before each token
    prompt_logprobs: tuple[TokenLogprob, ...] = ()  # of the prompt from its second token on, in the first delta
    embedding: bytes | None = None  # float32, of a request with pooling
    finish_reason: str | None = None  # "stop", "length" or "error"; the last delta of a request has one
    stop_reason: str | int | None = None  # with "stop": the request's stop string, or stop token, that was met
    error: str | None = None  # one sentence, with finish_reason "error"
    code: str | None = None  # with error: as in `RequestRejected`
    param: str | None = None
    cached_tokens: int = 0  # in the last delta: prompt tokens that were in the cache
    adapted_tokens: int | None = None  # in the last delta, with an activated adapter: prompt tokens that have it
    evicted_tokens: int = 0  # in the last delta: evicted tokens
    num_preemptions: int = 0  # in the last delta
    num_predicted: int = 0  # in the last delta: tokens of the request's prediction in the answer


def merged(deltas: list[Delta]) -> Delta:
    """Consecutive deltas of one request as one delta."""
    if len(deltas) == 1:
        return deltas[0]
    return msgspec.structs.replace(
        deltas[-1],
        text="".join([delta.text for delta in deltas]),
        num_tokens=sum([delta.num_tokens for delta in deltas]),
        reasoning="".join([delta.reasoning for delta in deltas]),
        recipients=tuple(change for delta in deltas for change in delta.recipients),
        num_reasoning_tokens=sum([delta.num_reasoning_tokens for delta in deltas]),
        token_ids=tuple(token_id for delta in deltas for token_id in delta.token_ids),
        logprobs=tuple(logprob for delta in deltas for logprob in delta.logprobs),
        offsets=tuple(offset for delta in deltas for offset in delta.offsets),
        prompt_logprobs=deltas[0].prompt_logprobs,
    )


class EngineStats(msgspec.Struct, frozen=True, kw_only=True):
    """The engine's state after a step; totals count from the engine's start."""

    num_running: int
    num_waiting: int
    kv_cache_usage: float  # share of blocks in use, 0..1
    num_blocks_used: int
    prompt_tokens_total: int
    generation_tokens_total: int
    num_preemptions_total: int
    num_steps_total: int
    num_blocked: int = 0  # waiting requests whose adapters or blocks are being loaded
    prefix_cache_queries_total: int = 0  # prompt tokens looked up
    prefix_cache_hits_total: int = 0  # of these, found
    evicted_tokens_total: int = 0
    step_tokens_total: int = 0  # tokens computed in steps, including prompts
    drafts_total: int = 0  # drafts verified
    draft_tokens_total: int = 0  # their tokens
    accepted_tokens_total: int = 0  # of these, accepted
    accepted_by_place: tuple[int, ...] = (0,)  # how many drafts had their first, second, ... token accepted
    kv_event_batches_total: int = 0  # of --kv-events, including dropped ones
    kv_event_batches_dropped_total: int = 0
    offload: OffloadStats = OffloadStats()


class EngineTotals(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Totals of requests and steps since the engine's start, over all HTTP processes."""

    stats: EngineStats
    finished: dict[str, int]  # requests by finish reason
    aborted: dict[str, int]  # by reason
    rejected: dict[str, int]  # HTTP requests by reason
    first_token_s: Buckets
    stream_lag_s: Buckets
    between_tokens_s: Buckets
    request_s: Buckets
    queue_s: Buckets
    inference_s: Buckets  # of finished requests, from the first step to the last token, like the next
    prefill_s: Buckets  # to the first token
    decode_s: Buckets  # from the first token
    max_tokens: Buckets
    num_choices: Buckets  # of prompts
    num_preemptions: Buckets
    prompt_tokens: Buckets  # of finished requests, like the next
    generation_tokens: Buckets
    step_tokens: Buckets
    step_s: Buckets


class TotalsRead(msgspec.Struct, frozen=True, tag=True):
    """The `EngineTotals` before it include all that the HTTP process sent before its `ReadTotals` of this number."""

    number: int


class AdapterCard(msgspec.Struct, frozen=True, kw_only=True):
    """The current state of one version of an adapter."""

    name: str
    is_current: bool  # new requests for the name get this version
    state: str  # loading, ready, draining or failed
    tier: str  # slot, cpu or disk: the fastest memory that holds it
    content_hash: str  # "": not read yet
    root: str  # its path inside the allowed folder
    rank: int
    num_bytes: int
    num_running: int
    num_waiting: int
    num_requests: int  # since loading
    num_tokens: int  # generated by them
    error: str  # one sentence, when failed
    share: float | None = None  # of the callers, while the name's requests are split
    num_version_requests: int = 0  # of this version only, like the next
    num_version_tokens: int = 0
    pinned: bool = False  # it keeps its slot
    invocation: tuple[int, ...] = ()  # tokens of a prompt from which on it acts; (): on all


class AdapterLoaded(msgspec.Struct, frozen=True, tag=True):
    call_id: str
    card: AdapterCard
    matched: tuple[str, ...]  # modules it changes
    unmatched: tuple[str, ...]  # targets in its config without weights
    probe: AdapterProbe | None = None  # None: not probed
    is_used: bool = True  # False: the name had this content, and its files stay in use


class AdapterUnloaded(msgspec.Struct, frozen=True, tag=True):
    call_id: str
    num_bytes: int  # freed


class AdapterList(msgspec.Struct, frozen=True, tag=True):
    call_id: str
    cards: tuple[AdapterCard, ...]
    load_seconds: Buckets
    num_slots: int
    num_in_slots: int = 0  # adapters, and mixes of them, of any version
    num_in_memory: int = 0  # the same in CPU memory, whether in a slot or not


class Settled(msgspec.Struct, frozen=True, tag=True):
    """A call without another result has been executed."""

    call_id: str


class KeyCharged(msgspec.Struct, frozen=True, tag=True):
    call_id: str


class CallFailed(msgspec.Struct, frozen=True, tag=True):
    """A call failed without effect; `message` is one sentence for the user."""

    call_id: str
    message: str
    code: str | None = None
    param: str | None = None
    retry_after_s: int | None = None


def adapter_is_loading(call_id: str, name: str) -> CallFailed:
    """The answer to a call about an adapter that another call is loading."""
    refusal = adapter_loading(name)
    return CallFailed(call_id, str(refusal), code=refusal.code, param=refusal.param)


class AdapterResidency(msgspec.Struct, frozen=True, tag=True):
    """The adapters that the engine holds, by name; sent to each HTTP process when they have changed."""

    slots: tuple[str, ...] = ()  # in slots of the device
    memory: tuple[str, ...] = ()  # in CPU memory, or being read


class StepOutput(msgspec.Struct, frozen=True, tag=True):
    """The results of one step for one HTTP process."""

    deltas: tuple[Delta, ...]
    stats: EngineStats
    ended_s: float  # end of the step by the machine's monotonic clock


class EngineInfo(msgspec.Struct, frozen=True, kw_only=True):
    """The loaded model and its limits; sent once, when the engine is ready."""

    model_path: str
    max_model_len: int
    vocab_size: int
    hidden_size: int
    num_blocks: int
    block_size: int
    max_num_seqs: int  # requests in one batch
    device: str
    processor: str = ""  # what its kernels are compiled for: torch's name of a CPU's vectors, or of the GPU
    dtype: str
    quantization: str  # of the weights, or "none"
    kv_cache_dtype: str
    deterministic: bool = False  # a request's numbers do not depend on others'
    weights_hash: str  # SHA-256 over the weights, hexadecimal; "dummy-…" for random ones
    speculative: str = "off"  # source of drafts: "ngram" or "off"


Reply = AdapterLoaded | AdapterLocated | AdapterUnloaded | AdapterList | Settled | KeyCharged | CallFailed
Event = Accepted | Rejected | StepOutput | EngineTotals | TotalsRead | AdapterResidency | Reply
News = Accepted | Rejected | Delta  # a step's result for one request


def failure(request_id: str, message: str, code: str | None = None, param: str | None = None) -> Delta:
    """The end of a request that failed; `message` is one sentence for the user."""
    return Delta(
        request_id=request_id,
        text="",
        num_tokens=0,
        finish_reason="error",
        error=message,
        code=code,
        param=param,
    )
