"""An engine process without a model: the real process loop, protocol and text around scripted tokens.

`python -m tests.support.servers.fake_engine` takes the place of `python -m stellarbyte_server.engine.process`. An
answer repeats the prompt; what the prompt starts with decides what else happens (see `FakeCore`). `make_model_folder`
gives HTTP a tokenizer for it.
"""

import json
import sys
import time
from array import array
from dataclasses import dataclass, field
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from stellarbyte_server.config.settings import EngineSettings
from stellarbyte_server.engine.loop import PEER_SILENCE_LIMIT_S
from stellarbyte_server.engine.process import main
from stellarbyte_server.engine.state.account import Account
from stellarbyte_server.engine.text import TextStream
from stellarbyte_server.protocol.adapter_versions import RestoreAdapters
from stellarbyte_server.protocol.histogram import Buckets
from stellarbyte_server.protocol.messages import (
    Accepted,
    AdapterList,
    AdapterResidency,
    Call,
    CallFailed,
    Delta,
    EngineInfo,
    EngineStats,
    ListAdapters,
    News,
    Reply,
    Settled,
)
from stellarbyte_server.protocol.request import GenerationRequest, RequestRejected, model_not_found

MAX_MODEL_LEN = 2048
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CRASH = "!crash"  # the step that computes it fails
HANG = "!hang"  # its step never ends
REJECT = "!reject"  # refused when submitted
SLOW = "!slow"  # every step takes 20 ms
LONG = "!long"  # every step takes longer than an HTTP process may be silent


def byte_alphabet() -> list[str]:
    """GPT-2's printable stand-in for each byte."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (chr(256 + i) for i in range(256))
    return [chr(value) if value in printable else next(others) for value in range(256)]


def make_tokenizer() -> Tokenizer:
    """One token for each byte, whose id is the byte, and three special tokens."""
    vocabulary = {character: value for value, character in enumerate(byte_alphabet())}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in ("<|end|>", "<|im_start|>", "<|im_end|>")])
    return tokenizer


def make_model_folder(folder: Path, chat_template: str | None = CHAT_TEMPLATE) -> Path:
    """What the HTTP process reads of a model."""
    folder.mkdir(parents=True, exist_ok=True)
    make_tokenizer().save(str(folder / "tokenizer.json"))
    config = {"eos_token": "<|end|>"} | ({} if chat_template is None else {"chat_template": chat_template})
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@dataclass
class _Sequence:
    request: GenerationRequest
    text: TextStream
    script: bytes
    num_tokens: int = 0


@dataclass
class FakeCore:
    """Every step gives every request the next byte of its prompt, round and round, until max_tokens."""

    tokenizer: Tokenizer = field(default_factory=make_tokenizer)
    sequences: dict[str, _Sequence] = field(default_factory=dict)
    num_steps: int = 0
    num_prompt_tokens: int = 0
    num_generated_tokens: int = 0
    num_step_tokens: int = 0
    accepted: list[Accepted] = field(default_factory=list)
    replies: list[Reply] = field(default_factory=list)

    @property
    def has_work(self) -> bool:
        return bool(self.sequences)

    is_blocked = False
    patience_s = None
    wake_fds = ()

    def prepare(self) -> bool:
        return False

    def call(self, call: Call) -> None:
        if isinstance(call, ListAdapters):
            nothing = Buckets(bounds=(), counts=(0,))
            self.replies.append(AdapterList(call.call_id, (), nothing, 0))
        elif isinstance(call, RestoreAdapters):
            self.replies.append(Settled(call.call_id))
        else:
            self.replies.append(CallFailed(call.call_id, "The fake engine has no adapters."))

    def abandon_load(self, name: str) -> None:
        """It has loaded nothing."""

    def take_replies(self) -> list[Reply]:
        replies, self.replies = self.replies, []
        return replies

    def submit(self, request: GenerationRequest, account: Account | None = None) -> None:
        del account
        if request.adapter is not None:
            raise model_not_found(request.adapter)
        script = bytes(token_id for token_id in request.prompt_token_ids if token_id < 256)
        if script.startswith(REJECT.encode()):
            raise RequestRejected("The fake engine does not want this.", code="unwanted", param="prompt")
        sampling = request.sampling
        text = TextStream(
            self.tokenizer,
            sampling.stop,
            skip_special_tokens=sampling.skip_special_tokens,
            include_stop=sampling.include_stop,
        )
        self.sequences[request.request_id] = _Sequence(request, text, script)
        self.accepted.append(Accepted(request.request_id))
        self.num_prompt_tokens += len(request.prompt_token_ids)

    def abort(self, request_id: str) -> None:
        self.sequences.pop(request_id, None)

    def step(self) -> list[News]:
        self.num_steps += 1
        scripts = [sequence.script for sequence in self.sequences.values()]
        if any(CRASH.encode() in script for script in scripts):
            raise RuntimeError("told to crash")
        if any(HANG.encode() in script for script in scripts):
            time.sleep(3600)
        if any(LONG.encode() in script for script in scripts):
            time.sleep(PEER_SILENCE_LIMIT_S + 0.5)
        if any(SLOW.encode() in script for script in scripts):
            time.sleep(0.02)
        accepted, self.accepted = self.accepted, []
        return [*accepted, *(self._advance(sequence) for sequence in list(self.sequences.values()))]

    def _advance(self, sequence: _Sequence) -> Delta:
        request = sequence.request
        self.num_step_tokens += 1 if sequence.num_tokens else len(request.prompt_token_ids)
        if request.sampling.max_tokens == 0:
            del self.sequences[request.request_id]
            vector = None if request.pooling is None else array("f", [0.5, 0.5, 0.5, -0.5]).tobytes()
            return Delta(request_id=request.request_id, text="", num_tokens=0, finish_reason="length", embedding=vector)
        text, stopped = sequence.text.push(sequence.script[sequence.num_tokens % len(sequence.script)])
        sequence.num_tokens += 1
        self.num_generated_tokens += 1
        finish_reason = "stop" if stopped else None
        if not stopped and sequence.num_tokens == sequence.request.sampling.max_tokens:
            finish_reason = "length"
            text += sequence.text.flush()
        if finish_reason is not None:
            del self.sequences[sequence.request.request_id]
        return Delta(
            request_id=sequence.request.request_id,
            text=text,
            num_tokens=1,
            finish_reason=finish_reason,
            stop_reason=sequence.text.stop_met,
        )

    def residency(self) -> AdapterResidency:
        return AdapterResidency()

    def stats(self) -> EngineStats:
        return EngineStats(
            num_running=len(self.sequences),
            num_waiting=0,
            kv_cache_usage=min(1.0, len(self.sequences) / 100),
            num_blocks_used=len(self.sequences),
            prompt_tokens_total=self.num_prompt_tokens,
            generation_tokens_total=self.num_generated_tokens,
            num_preemptions_total=0,
            num_steps_total=self.num_steps,
            step_tokens_total=self.num_step_tokens,
        )


def build_fake_core(settings: EngineSettings) -> tuple[FakeCore, EngineInfo]:
    if not Path(settings.model).is_dir():
        raise ValueError(f"there is no model folder {settings.model}")
    sys.stdout.write("a library that prints to stdout must not disturb the protocol\n")
    info = EngineInfo(
        model_path=settings.model,
        max_model_len=MAX_MODEL_LEN if settings.max_model_len is None else settings.max_model_len,
        vocab_size=259,
        hidden_size=4,
        num_blocks=100 if settings.kv_cache_memory is None else settings.kv_cache_memory,  # of a byte
        block_size=16,
        max_num_seqs=64 if settings.max_num_seqs is None else settings.max_num_seqs,
        device="cpu",
        dtype="float32",
        quantization="none",
        kv_cache_dtype="float32",
        weights_hash="0123456789abcdef" * 4,
    )
    return FakeCore(), info


if __name__ == "__main__":
    sys.exit(main(build_fake_core))
