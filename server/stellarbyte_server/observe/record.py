"""The record of one HTTP request, for its log line, trace and metrics."""

import time
from dataclasses import dataclass, field
from typing import Any

from stellarbyte_server.client.delta_stream import DeltaStream
from stellarbyte_server.protocol.messages import Delta


@dataclass
class TokenCount:
    """Tokens of one HTTP request so far."""

    prompt: int
    completion: int = 0
    cached: int = 0  # of the prompts; known at the end
    adapted: int | None = None  # of the prompts, with an activated adapter; None: with another, or not known yet
    reasoning: int | None = None  # of the completions; None: the model does not reason
    evicted: int = 0  # evicted by the end, if the context slid
    predicted: int | None = None  # tokens of the prediction of each answer; None: there is none, or it has no effect
    accepted: int = 0  # tokens of predictions that answers had at their ends
    rejected: int = 0  # the others

    def add(self, delta: Delta, *, first_of_prompt: bool) -> None:
        self.completion += delta.num_tokens
        self.evicted += delta.evicted_tokens
        if self.reasoning is not None:
            self.reasoning += delta.num_reasoning_tokens
        if self.predicted is not None and delta.finish_reason is not None:
            self.accepted += delta.num_predicted
            self.rejected += self.predicted - delta.num_predicted
        if first_of_prompt:
            self.cached += delta.cached_tokens
            if delta.adapted_tokens is not None:
                self.adapted = (self.adapted or 0) + delta.adapted_tokens

    def usage(self) -> dict[str, Any]:
        usage: dict[str, Any] = {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }
        if self.adapted is not None:
            usage["prompt_tokens_details"]["adapted_tokens"] = self.adapted
        details = {} if self.reasoning is None else {"reasoning_tokens": self.reasoning}
        if self.predicted is not None:
            details |= {"accepted_prediction_tokens": self.accepted, "rejected_prediction_tokens": self.rejected}
        if details:
            usage["completion_tokens_details"] = details
        return usage | {"evicted_tokens": self.evicted} if self.evicted else usage


@dataclass(kw_only=True)
class RequestRecord:
    """One HTTP request. Times are seconds of the machine's monotonic clock."""

    request_id: str
    arrived_s: float = field(default_factory=time.monotonic)
    adapter: str | None = None  # NAME@HASH
    tokens: TokenCount | None = None
    streams: list[DeltaStream] = field(default_factory=list)  # of the requests that the engine accepted
    body_bytes: int = 0  # received so far
    status: int | None = None  # sent to the client; None: none yet
    is_counted: bool = False  # counted, or exempt, in its key's requests per minute
    error_code: str | None = None  # of the error response
    late_status: int | None = None  # of an error that was an event, because the headers had been sent
    left_queue: bool = False  # the client left before the request ran

    @property
    def queued_s(self) -> float | None:
        """When it was submitted to the engine."""
        return self.streams[0].sent_s if self.streams else None

    @property
    def started_s(self) -> float | None:
        """When its first step began."""
        return min((s.started_s for s in self.streams if s.started_s is not None), default=None)

    @property
    def first_token_s(self) -> float | None:
        return min((s.first_token_s for s in self.streams if s.first_token_s is not None), default=None)

    @property
    def finish_reason(self) -> str | None:
        """The engine's finish reasons, each once; "abort": the client left before the end."""
        if self.left_queue:
            return "abort"
        return ",".join(sorted({s.finish_reason for s in self.streams if s.finish_reason is not None})) or None
