"""Probes of adapters before requests get them: a short prompt with the adapter and without it, beside the traffic.

Both are requests of the scheduler, so they take the path of all others through steps, slots and memory. An adapter is
refused if it makes a logit NaN or infinite, or changes none by more than rounding.
"""

import itertools
import logging
from dataclasses import dataclass, field

import numpy as np
import tokenizers

from stellarbyte_server.engine.adapters import refusals
from stellarbyte_server.engine.adapters.registry import Adapters
from stellarbyte_server.engine.answer import Answer
from stellarbyte_server.engine.live_answers import NOT_FINITE, LiveAnswers
from stellarbyte_server.engine.schedule.scheduler import Scheduler
from stellarbyte_server.engine.state.adapter_version import AdapterVersion
from stellarbyte_server.protocol.adapter_reference import AdapterReference
from stellarbyte_server.protocol.adapter_versions import AdapterProbe
from stellarbyte_server.protocol.messages import Delta, News, Rejected
from stellarbyte_server.protocol.request import (
    ADAPTER_FAILED,
    INTERNAL_ERROR,
    MAX_PRIORITY,
    GenerationRequest,
    RequestRejected,
    SamplingParams,
)

logger = logging.getLogger("server.engine")

TEXT = "The quick brown fox jumps over the lazy dog."
MAX_TEXT_TOKENS = 12
_PREFIX, _WITH, _WITHOUT = "probe ", " with", " without"  # of the ids of requests; those of others have no space
LEAST_CHANGE = 1e-6  # of the largest logit without the adapter: less is float32's rounding


@dataclass(kw_only=True)
class _Probe:
    """A probe in progress."""

    version: AdapterVersion
    num_prompt_tokens: int
    logits_V: dict[bool, np.ndarray] = field(default_factory=dict)  # with the adapter?
    refusal: RequestRejected | None = None
    num_left: int = 2


class Probes:
    """Engine thread only."""

    def __init__(
        self, scheduler: Scheduler, adapters: Adapters, answers: LiveAnswers, tokenizer: tokenizers.Tokenizer
    ) -> None:
        self._scheduler = scheduler
        self._adapters = adapters
        self._answers = answers
        self._tokenizer = tokenizer
        self._running: dict[str, _Probe] = {}  # by request id
        self._numbers = itertools.count()

    def begin(self) -> None:
        """Queue the probes of adapters that have been read; one that cannot be queued is a refused load."""
        for version in self._adapters.take_probes():
            try:
                prompt = self._prompt(version)
                probe = _Probe(version=version, num_prompt_tokens=len(prompt))
                for adapter in (version, None):
                    self._queue(probe, prompt, adapter)
            except Exception:
                logger.exception("the probe of the adapter %s could not be queued", version.name)
                self._drop(version)
                self._answers.replies += self._adapters.note_probe(version, _failed(version.name))

    def _drop(self, version: AdapterVersion) -> None:
        """Abort what has been queued of a version's probe."""
        for request_id in [key for key, probe in self._running.items() if probe.version is version]:
            del self._running[request_id]
            if (sequence := self._answers.sequence(request_id)) is not None:
                self._answers.end(sequence)

    def has(self, request_id: str) -> bool:
        return request_id in self._running

    def _prompt(self, version: AdapterVersion) -> tuple[int, ...]:
        """Token ids of the text, after the tokens whose embedding the adapter changes most, and its invocation."""
        text = self._tokenizer.encode(TEXT, add_special_tokens=False).ids[:MAX_TEXT_TOKENS]
        prompt = (*version.changed_tokens, *version.invocation, *text) or (0,)
        return prompt[: self._scheduler.limits.max_model_len]

    def _queue(self, probe: _Probe, prompt: tuple[int, ...], adapter: AdapterVersion | None) -> None:
        request_id = f"{_PREFIX}{next(self._numbers)}{_WITHOUT if adapter is None else _WITH}"
        reference = None if adapter is None else AdapterReference(adapter.name, adapter.content_hash)
        request = GenerationRequest(
            request_id=request_id,
            prompt_token_ids=prompt,
            sampling=SamplingParams(max_tokens=0, temperature=0.0, seed=0),
            priority=-MAX_PRIORITY,
            adapter=reference,
            cache_salt=request_id,
            pooling="logits",
        )
        sequence = self._scheduler.add(request, adapter, needs_place=False)
        if adapter is not None:
            self._adapters.bind_version(adapter)
        self._answers.add(Answer(sequence, self._tokenizer))
        self._running[request_id] = probe

    def take(self, news: list[News]) -> list[News]:
        """Note the results of probes in a step's news; returns the others."""
        if not self._running:
            return news
        for item in news:
            if item.request_id not in self._running:
                continue
            if isinstance(item, Rejected):
                self._end(item.request_id, RequestRejected(item.message, item.code, "lora_path", item.retry_after_s))
            elif isinstance(item, Delta) and item.error is not None:
                self._end(item.request_id, self._refusal(item))
            elif isinstance(item, Delta) and item.embedding is not None:
                logits_V = np.frombuffer(item.embedding, np.float32)
                self._running[item.request_id].logits_V[item.request_id.endswith(_WITH)] = logits_V
                self._end(item.request_id)
        return [item for item in news if not item.request_id.startswith(_PREFIX)]

    def _refusal(self, failed: Delta) -> RequestRejected:
        name = self._running[failed.request_id].version.name
        if failed.error == NOT_FINITE:
            message = f"The adapter {name!r} makes the model compute NaN or infinity."
            return RequestRejected(message, ADAPTER_FAILED, "lora_path")
        logger.error("the probe of the adapter %s failed: %s", name, failed.error)
        return _failed(name)

    def _end(self, request_id: str, refusal: RequestRejected | None = None) -> None:
        """Note the end of one of a probe's requests; after the second one, note the probe's result."""
        probe = self._running.pop(request_id)
        probe.refusal = probe.refusal or refusal
        probe.num_left -= 1
        if not probe.num_left:
            self._answers.replies += self._adapters.note_probe(probe.version, _outcome(probe))


def _failed(name: str) -> RequestRejected:
    return RequestRejected(f"The probe of the adapter {name!r} failed; see the server's log.", INTERNAL_ERROR)


def _outcome(probe: _Probe) -> AdapterProbe | RequestRejected:
    if probe.refusal is not None:
        return probe.refusal
    with_V, without_V = probe.logits_V[True], probe.logits_V[False]
    change_V = np.abs(with_V - without_V)
    largest = float(change_V.max())
    if largest <= LEAST_CHANGE * float(np.abs(without_V).max()):
        return refusals.changes_nothing(probe.version)
    return AdapterProbe(
        max_logit_change=largest, num_changed=int((change_V > 0).sum()), num_prompt_tokens=probe.num_prompt_tokens
    )
