"""An engine process with steps that take no time, to measure the path from it to the socket.

`python -m benchmarks.support.instant_engine` takes the place of `python -m stellarbyte_server.engine.process`;
`python -m benchmarks.support.instant_engine serve FLAGS` is the real server in front of it. Every step gives every
request one token, whose text is " " and the step's time (CLOCK_MONOTONIC in µs, the same for all processes): so a
client knows how old each token is. The first token of the newest prompt is the pace, in steps per second.
"""

import json
import sys
import time
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers

from stellarbyte_server.config.settings import EngineSettings
from stellarbyte_server.engine.process import main
from stellarbyte_server.engine.state.account import Account
from stellarbyte_server.protocol.adapter_versions import RestoreAdapters
from stellarbyte_server.protocol.messages import (
    Accepted,
    AdapterResidency,
    Call,
    CallFailed,
    Delta,
    EngineInfo,
    EngineStats,
    News,
    Reply,
    Settled,
)
from stellarbyte_server.protocol.request import GenerationRequest

VOCAB_SIZE = 10_000


def make_model_folder(folder: Path) -> Path:
    """A model folder for the HTTP process, with a tokenizer of artificial words."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB_SIZE)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({}))
    return folder


class InstantCore:
    """Each step gives every request one token, until max_tokens."""

    def __init__(self) -> None:
        self._interval_s = 1.0
        self._next_step_s = 0.0
        self._left: dict[str, int] = {}  # request id → tokens to come
        self._accepted: list[News] = []  # since the last step
        self._replies: list[Reply] = []
        self._num_steps = 0
        self._num_tokens = 0

    @property
    def has_work(self) -> bool:
        return bool(self._left)

    is_blocked = False
    patience_s = None
    wake_fds = ()

    def prepare(self) -> bool:
        return False

    def call(self, call: Call) -> None:
        if isinstance(call, RestoreAdapters):
            self._replies.append(Settled(call.call_id))
        else:
            self._replies.append(CallFailed(call.call_id, "This engine has no adapters."))

    def take_replies(self) -> list[Reply]:
        replies, self._replies = self._replies, []
        return replies

    def submit(self, request: GenerationRequest, account: Account | None = None) -> None:
        del account
        self._interval_s = 1 / request.prompt_token_ids[0]
        self._left[request.request_id] = request.sampling.max_tokens
        self._accepted.append(Accepted(request.request_id))

    def abort(self, request_id: str) -> None:
        self._left.pop(request_id, None)

    def step(self) -> list[News]:
        now_s = time.monotonic()
        self._next_step_s = max(self._next_step_s + self._interval_s, now_s)  # no catching up
        time.sleep(self._next_step_s - now_s)
        text = f" {time.monotonic_ns() // 1000}"
        self._num_steps += 1
        self._num_tokens += len(self._left)
        news, self._accepted = self._accepted, []
        news += [
            Delta(request_id=request_id, text=text, num_tokens=1, finish_reason="length" if left == 1 else None)
            for request_id, left in self._left.items()
        ]
        self._left = {request_id: left - 1 for request_id, left in self._left.items() if left > 1}
        return news

    def stats(self) -> EngineStats:
        return EngineStats(
            num_running=len(self._left),
            num_waiting=0,
            kv_cache_usage=0.0,
            num_blocks_used=0,
            prompt_tokens_total=0,
            generation_tokens_total=self._num_tokens,
            num_preemptions_total=0,
            num_steps_total=self._num_steps,
        )

    def residency(self) -> AdapterResidency:
        return AdapterResidency()


def build_instant_core(settings: EngineSettings) -> tuple[InstantCore, EngineInfo]:
    info = EngineInfo(
        model_path=settings.model,
        max_model_len=1_000_000,
        vocab_size=VOCAB_SIZE,
        hidden_size=1,
        num_blocks=1,
        block_size=16,
        max_num_seqs=64,
        device="none",
        dtype="none",
        quantization="none",
        kv_cache_dtype="float32",
        weights_hash="0" * 64,
    )
    return InstantCore(), info


if __name__ == "__main__":
    if sys.argv[1:2] == ["serve"]:
        from stellarbyte_server.__main__ import main as serve

        sys.exit(serve(sys.argv[2:], engine_module="benchmarks.support.instant_engine"))
    sys.exit(main(build_instant_core))
