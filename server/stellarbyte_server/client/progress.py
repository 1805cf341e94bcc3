"""Detects a stalled engine from its messages."""

import time

from stellarbyte_server.protocol.messages import EngineStats

STALL_LIMIT_S = 10.0
FIRST_STEP_LIMIT_S = 120.0  # the first step may compile kernels
NO_STATS = EngineStats(
    num_running=0,
    num_waiting=0,
    kv_cache_usage=0.0,
    num_blocks_used=0,
    prompt_tokens_total=0,
    generation_tokens_total=0,
    num_preemptions_total=0,
    num_steps_total=0,
)


class EngineProgress:
    """The progress of one engine process. `stats`: its newest statistics."""

    def __init__(self) -> None:
        self.stats = NO_STATS
        self._heard_at_s = self._progress_at_s = time.monotonic()

    def note(self, stats: EngineStats) -> None:
        """Called with each message of the engine."""
        self._heard_at_s = time.monotonic()
        if stats.num_steps_total != self.stats.num_steps_total or not _num_to_do(stats):
            self._progress_at_s = self._heard_at_s
        self.stats = stats

    def stalled(self, has_streams: bool) -> str | None:
        """None while there is progress or no work, else the problem in one sentence. `has_streams`: streams here
        wait."""
        now_s = time.monotonic()
        limit_s = STALL_LIMIT_S if self.stats.num_steps_total else FIRST_STEP_LIMIT_S
        if now_s - self._progress_at_s <= limit_s:
            return None
        if _num_to_do(self.stats) or has_streams:
            return f"The engine has not completed a step for {limit_s:.0f} s although requests are waiting."
        if now_s - self._heard_at_s > limit_s:
            return f"The engine has not sent a message for {limit_s:.0f} s."
        return None


def _num_to_do(stats: EngineStats) -> int:
    """Number of requests that the next step could include."""
    return stats.num_running + stats.num_waiting - stats.num_blocked
