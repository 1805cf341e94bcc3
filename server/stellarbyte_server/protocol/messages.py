"""What the HTTP processes and the engine process say to each other, as msgpack.

An HTTP process sends a `Command`, the engine answers with an `Event`. Both are tagged unions, so one decoder reads
each direction. Everything is plain data: nothing that is received can run code.

Before that, the process that starts the engine writes one `EngineStart` as a line of JSON to its stdin, and reads one
`EngineReady` or `EngineFailed` from its stdout. The engine lives as long as its stdin is open.
"""

from typing import Literal

import msgspec

from stellarbyte_server.config.settings import EngineSettings
from stellarbyte_server.protocol.histogram import Buckets
from stellarbyte_server.protocol.request import GenerationRequest

FAILED = "The engine failed while it worked on this request."
HEARTBEAT_INTERVAL_S = 1.0  # each side lets the other hear from it at least this often


class KeyLimits(msgspec.Struct, frozen=True, kw_only=True):
    """What the requests of one API key may use, over all HTTP processes. None: no limit."""

    key_name: str
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None  # of prompts and answers
    concurrent_streams: int | None = None  # groups of requests that run or wait


class Submit(msgspec.Struct, frozen=True, tag=True):
    """Queue requests, all or none; each is answered by `Rejected`, or by `Accepted` when it runs and its deltas.

    Times are seconds of the machine's monotonic clock, which all processes share.
    """

    requests: tuple[GenerationRequest, ...]
    limits: KeyLimits | None = None
    continues: bool = False  # a group that was admitted before, which limits no longer hold up
    num_later_tokens: int = 0  # of prompts of the same group that will be submitted later
    arrived_s: float | None = None  # when the client asked; None: when the engine hears of it
    sent_s: float | None = None


class Abort(msgspec.Struct, frozen=True, tag=True):
    """Drop a request and everything it holds; unknown ids are fine (it may just have ended)."""

    request_id: str


class Heartbeat(msgspec.Struct, frozen=True, tag=True):
    """An HTTP process is alive. Without one for a while the engine aborts that process's requests."""

    peer_id: bytes  # the identity of its socket: heartbeats come through another one, from a thread of their own


class HttpObservations(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """What an HTTP process has seen since it last told; the engine adds it to its totals."""

    first_token_s: Buckets
    stream_lag_s: Buckets
    rejected: dict[str, int]  # by reason


class ReadTotals(msgspec.Struct, frozen=True, tag=True):
    """Answered by `EngineTotals`, which all HTTP processes get: then none ever knows less than another has shown."""


class LoadAdapter(msgspec.Struct, frozen=True, tag=True):
    """Read an adapter and let it have a name; answered by `AdapterLoaded` or `CallFailed`."""

    call_id: str
    name: str
    path: str
    in_place: bool  # it may replace another


class UnloadAdapter(msgspec.Struct, frozen=True, tag=True):
    """Take a name away; answered by `AdapterUnloaded`, once its running requests have ended, or by `CallFailed`."""

    call_id: str
    name: str


class ListAdapters(msgspec.Struct, frozen=True, tag=True):
    """Answered by `AdapterList`."""

    call_id: str


class ChargeKey(msgspec.Struct, frozen=True, tag=True):
    """Count a request that the engine does not see against its key's requests per minute.

    Answered by `KeyCharged`, or by `CallFailed` when there is no room for it.
    """

    call_id: str
    limits: KeyLimits


Call = LoadAdapter | UnloadAdapter | ListAdapters
Command = Submit | Abort | Heartbeat | HttpObservations | ReadTotals | ChargeKey | Call


class Accepted(msgspec.Struct, frozen=True, tag=True):
    """The request has begun to run: an answer can be started."""

    request_id: str
    adapter_hash: str = ""  # of the version it runs on; "": none
    started_s: float = 0.0  # when its first step began, by the machine's monotonic clock; the engine process sets it


class Rejected(msgspec.Struct, frozen=True, tag=True):
    """The request will not run; `message` is one sentence for the user. Sent at once or while it waits to run."""

    request_id: str
    message: str
    code: str | None
    param: str | None = None
    retry_after_s: int | None = None  # when it may be tried again, if that is known


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True):
    """Natural logarithm of a token's probability before temperature, penalties and truncation, and the likeliest."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()  # token id, logarithm; the likeliest first


class Delta(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What one step added to one request. Several in a row may be merged: see `merged`."""

    request_id: str
    text: str
    num_tokens: int
    token_ids: tuple[int, ...] = ()  # if the request wants them
    logprobs: tuple[TokenLogprob, ...] = ()  # of the tokens, if the request wants them
    offsets: tuple[int, ...] = ()  # with them: characters of the answer before each of the tokens
    prompt_logprobs: tuple[TokenLogprob, ...] = ()  # of the prompt from its second token on, all in the first delta
    embedding: bytes | None = None  # float32, of a request that is pooled
    finish_reason: str | None = None  # "stop", "length" or "error"; the last delta of a request has one
    error: str | None = None  # one sentence, with finish_reason "error"
    code: str | None = None  # with it: as `RequestRejected` has
    param: str | None = None
    cached_tokens: int = 0  # in the last delta: prompt tokens that were in the cache
    evicted_tokens: int = 0  # in the last delta: tokens that went out of sight


def merged(deltas: list[Delta]) -> Delta:
    """Several deltas of one request, one after the other, as one."""
    if len(deltas) == 1:
        return deltas[0]
    return msgspec.structs.replace(
        deltas[-1],
        text="".join([delta.text for delta in deltas]),
        num_tokens=sum([delta.num_tokens for delta in deltas]),
        token_ids=tuple(token_id for delta in deltas for token_id in delta.token_ids),
        logprobs=tuple(logprob for delta in deltas for logprob in delta.logprobs),
        offsets=tuple(offset for delta in deltas for offset in delta.offsets),
        prompt_logprobs=deltas[0].prompt_logprobs,
    )


class EngineStats(msgspec.Struct, frozen=True, kw_only=True):
    """The engine's state after a step; totals count from its start."""

    num_running: int
    num_waiting: int
    kv_cache_usage: float  # share of blocks in use, 0..1
    num_blocks_used: int
    prompt_tokens_total: int
    generation_tokens_total: int
    num_preemptions_total: int
    num_steps_total: int
    num_blocked: int = 0  # of the waiting ones: their adapters are not there yet
    prefix_cache_queries_total: int = 0  # prompt tokens looked up
    prefix_cache_hits_total: int = 0  # and found
    evicted_tokens_total: int = 0
    step_tokens_total: int = 0  # given to steps, those of prompts included


class EngineTotals(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """All that the engine process knows of requests and steps since its start, over all HTTP processes."""

    stats: EngineStats
    finished: dict[str, int]  # requests by finish reason
    aborted: dict[str, int]  # by reason
    rejected: dict[str, int]  # HTTP requests by reason
    first_token_s: Buckets
    stream_lag_s: Buckets
    between_tokens_s: Buckets
    request_s: Buckets
    queue_s: Buckets
    prompt_tokens: Buckets  # of finished requests, as the next
    generation_tokens: Buckets
    step_tokens: Buckets
    step_s: Buckets


class AdapterCard(msgspec.Struct, frozen=True, kw_only=True):
    """One version of an adapter, as of now."""

    name: str
    is_current: bool  # new requests for the name get this version
    state: str  # loading, ready, draining or failed
    tier: str  # slot, cpu or disk: the fastest memory it lies in
    content_hash: str  # "": not read yet
    root: str  # where it is read from, inside its allowed folder
    rank: int
    num_bytes: int
    num_running: int
    num_waiting: int
    num_requests: int  # all there were
    num_tokens: int  # that they generated
    error: str  # one sentence, when failed


class AdapterLoaded(msgspec.Struct, frozen=True, tag=True):
    call_id: str
    card: AdapterCard
    matched: tuple[str, ...]  # modules it changes
    unmatched: tuple[str, ...]  # targets its config names that it has no weights for


class AdapterUnloaded(msgspec.Struct, frozen=True, tag=True):
    call_id: str
    num_bytes: int  # given back


class AdapterList(msgspec.Struct, frozen=True, tag=True):
    call_id: str
    cards: tuple[AdapterCard, ...]
    load_seconds: Buckets
    num_slots: int


class KeyCharged(msgspec.Struct, frozen=True, tag=True):
    call_id: str


class CallFailed(msgspec.Struct, frozen=True, tag=True):
    """A call did nothing; `message` is one sentence for the user."""

    call_id: str
    message: str
    code: str | None = None
    param: str | None = None
    retry_after_s: int | None = None


class StepOutput(msgspec.Struct, frozen=True, tag=True):
    """Everything one step produced for one HTTP process, in one message."""

    deltas: tuple[Delta, ...]
    stats: EngineStats
    ended_s: float  # when the step ended, by the machine's monotonic clock


class EngineInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What the engine found when it loaded; sent once, when it is ready."""

    model_path: str
    max_model_len: int
    vocab_size: int
    hidden_size: int
    num_blocks: int
    block_size: int
    max_num_seqs: int  # requests that run at once
    device: str
    dtype: str
    quantization: str  # of the weights, or "none"
    kv_cache_dtype: str
    weights_hash: str  # SHA-256 over the weights, hexadecimal; "dummy-…" for random ones


Reply = AdapterLoaded | AdapterUnloaded | AdapterList | KeyCharged | CallFailed
Event = Accepted | Rejected | StepOutput | EngineTotals | Reply
News = Accepted | Rejected | Delta  # what a step has to say about one request


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


class EngineStart(msgspec.Struct, frozen=True):
    """What an engine process is told when it starts."""

    settings: EngineSettings
    endpoint: str  # ZeroMQ address to bind
    log_level: str
    log_format: Literal["text", "json"] = "text"


class EngineReady(msgspec.Struct, frozen=True, tag_field="state", tag="ready"):
    info: EngineInfo


class EngineFailed(msgspec.Struct, frozen=True, tag_field="state", tag="failed"):
    """The engine could not start; `message` is one sentence for the user."""

    message: str
