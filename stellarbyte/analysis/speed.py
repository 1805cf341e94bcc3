"""The speed of the library's plain torch model, by batch and length; `stellarbyte bench` measures a server."""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from stellarbyte.cache.relative import RelativeCache
from stellarbyte.model.transformer import CACHE, ByteTransformer

ROUNDS = 3
DECODED_TOKENS = 8
GRIDS = {  # batches and lengths of prompts in tokens, by type of device
    "cpu": ((1, 4), (32, 128)),
    "cuda": ((1, 8, 32), (128, 1024)),
}


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Medians of ROUNDS rounds after a warm-up, each with a new cache.

    Attributes:
        length: of each prompt, in tokens.
        prompt_s: for the prompts of all sequences, until the logits of their last tokens.
        step_s: for one more token of every sequence, mean of DECODED_TOKENS in a row.
        is_out_of_memory: the device had not enough; the times are None.
    """

    batch: int
    length: int
    prompt_s: float | None
    step_s: float | None
    is_out_of_memory: bool = False

    @property
    def prompt_tokens_per_s(self) -> float | None:
        return None if self.prompt_s is None else self.batch * self.length / self.prompt_s

    @property
    def decoded_tokens_per_s(self) -> float | None:
        return None if self.step_s is None else self.batch / self.step_s


def measure_speed(
    model: ByteTransformer,
    batches: tuple[int, ...],
    lengths: tuple[int, ...],
    *,
    clock: Callable[[], float] = time.perf_counter,
) -> Iterator[Speed]:
    """By length, then batch. Prompts are random tokens; lengths are cut to the model's context."""
    longest = max(1, model.config.max_position_embeddings - DECODED_TOKENS)
    for length in dict.fromkeys(min(length, longest) for length in lengths):
        for batch in batches:
            yield _measure(model, batch, length, clock)


@torch.inference_mode()
def _measure(model: ByteTransformer, batch: int, length: int, clock: Callable[[], float]) -> Speed:
    numbers = torch.Generator().manual_seed(0)
    prompts_BT = torch.randint(model.config.vocab_size, (batch, length), generator=numbers).to(model.device)
    try:
        _round(model, prompts_BT, clock)  # warms up
        rounds = [_round(model, prompts_BT, clock) for _ in range(ROUNDS)]
    except torch.OutOfMemoryError:
        return Speed(batch=batch, length=length, prompt_s=None, step_s=None, is_out_of_memory=True)
    prompt_s, step_s = (statistics.median(times) for times in zip(*rounds, strict=True))
    return Speed(batch=batch, length=length, prompt_s=prompt_s, step_s=step_s)


def _round(model: ByteTransformer, prompts_BT: torch.Tensor, clock: Callable[[], float]) -> tuple[float, float]:
    """Seconds for the prompts, and for a step of decoding."""

    def now() -> float:
        if prompts_BT.is_cuda:
            torch.cuda.synchronize(prompts_BT.device)
        return clock()

    cache = RelativeCache(model.config)
    start = now()
    tokens_B1 = model(prompts_BT, logits_to_keep=1, **{CACHE: cache}).logits.argmax(dim=-1)
    middle = now()
    for _ in range(DECODED_TOKENS):
        tokens_B1 = model(tokens_B1, **{CACHE: cache}).logits.argmax(dim=-1)
    return middle - start, (now() - middle) / DECODED_TOKENS
