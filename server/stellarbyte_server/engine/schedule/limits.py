"""The scheduler's limits of steps and of requests."""

from dataclasses import dataclass

from stellarbyte_server.engine.schedule.shares import ShareLimits


@dataclass(frozen=True, kw_only=True)
class SchedulerLimits:
    max_num_seqs: int  # running at once
    max_num_batched_tokens: int  # computed in one step
    max_draft_tokens: int | None = None  # of all drafts in one step; None: no limit of their own
    max_prefill_tokens: int | None = None  # most prompt tokens in a step that also decodes; None: all
    context_like_a_token: int | None = None  # context that doubles the cost of a prompt's token; None: negligible
    max_model_len: int  # tokens of prompt and answer together, for requests that do not slide
    max_queued_requests: int  # in addition to max_num_seqs
    queue_timeout_s: float | None = None  # most time before the first step; None: no limit
    shares: ShareLimits
