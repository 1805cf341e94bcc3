"""How much a step may have, and how many requests there may be: what the scheduler is told at the start."""

from dataclasses import dataclass

from stellarbyte_server.engine.schedule.shares import ShareLimits


@dataclass(frozen=True, kw_only=True)
class SchedulerLimits:
    max_num_seqs: int  # running at once
    max_num_batched_tokens: int  # computed in one step
    max_prefill_tokens: int | None = None  # most of them that prompts take while other sequences decode; None: all
    context_like_a_token: int | None = None  # context that costs a prompt's token as much again; None: none to speak of
    max_model_len: int  # tokens of prompt and answer together, for requests that do not slide
    max_queued_requests: int  # beyond max_num_seqs
    queue_timeout_s: float | None = None  # most time before the first step; None: no limit
    shares: ShareLimits
