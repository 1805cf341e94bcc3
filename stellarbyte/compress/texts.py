"""The texts of a compression: calibration text, and held-out text that never overlaps it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer

from stellarbyte.compress.errors import CompressError
from stellarbyte.model.transformer import ByteTransformer

# B contexts, T tokens

CONTEXT = 512  # tokens
SHARED_RUN = 64  # tokens; contexts of calibration with a run of so many that is in the held-out text are left out
_HELD_OUT_SHARE = 5  # without held-out text of its own, one context in so many
_ANSWERS_AT_ONCE = 16


@dataclass(frozen=True, kw_only=True)
class Texts:
    """Attributes: calibration_BT, held_out_BT: int64; num_left_out: contexts that were in both; source: for people."""

    calibration_BT: torch.Tensor
    held_out_BT: torch.Tensor
    num_left_out: int
    source: str


def read_texts(
    tokenizer: Tokenizer,
    calibration: Path,
    held_out: Path | None,
    *,
    num_contexts: int,
    num_held_out: int,
    context: int = CONTEXT,
) -> Texts:
    """Cut files of UTF-8 text into contexts, and choose from them at equal distances.

    Args:
        held_out: None: the last fifth of the calibration file.

    Raises:
        CompressError: a file cannot be read, or is too short; the message names it.
    """
    first = _contexts(tokenizer, calibration, context)
    if held_out is None:
        num_last = max(1, len(first) // _HELD_OUT_SHARE)
        if len(first) < 2:
            raise CompressError(
                f"{calibration} has fewer than {2 * context} tokens, a context for calibration and a held-out one."
            )
        first, second = first[:-num_last], first[-num_last:]
    else:
        second = _contexts(tokenizer, held_out, context)
        for file, found in ((calibration, first), (held_out, second)):
            if not len(found):
                raise CompressError(f"{file} is too short: it has fewer than {context} tokens.")
    second = _spread(second, num_held_out)
    apart = without_overlap(first, second)
    if not len(apart):
        raise CompressError(f"All contexts of {calibration} share text with the held-out text; give another file.")
    return Texts(
        calibration_BT=_spread(apart, num_contexts),
        held_out_BT=second,
        num_left_out=len(first) - len(apart),
        source=calibration.name,
    )


def _contexts(tokenizer: Tokenizer, file: Path, context: int) -> torch.Tensor:
    """[B, T] whole contexts."""
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise CompressError(f"{file} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise CompressError(f"{file} is not UTF-8 text: byte {error.start}.") from error
    ids = torch.tensor(tokenizer.encode(text).ids, dtype=torch.int64)
    return ids[: len(ids) // context * context].view(-1, context)


def _spread(contexts_BT: torch.Tensor, count: int) -> torch.Tensor:
    """`count` of them at equal distances, or all."""
    if len(contexts_BT) <= count:
        return contexts_BT
    return contexts_BT[torch.arange(count) * len(contexts_BT) // count]


def without_overlap(calibration_BT: torch.Tensor, held_out_BT: torch.Tensor) -> torch.Tensor:
    """The contexts of calibration that share no run of `SHARED_RUN` tokens with the held-out text."""

    def runs(contexts_BT: torch.Tensor, every: int) -> Sequence[Sequence[bytes]]:
        size = min(SHARED_RUN, contexts_BT.shape[1])
        return [[run.numpy().tobytes() for run in row.unfold(0, size, every)] for row in contexts_BT]

    held_out = {run for row in runs(held_out_BT, 1) for run in row}
    kept = [held_out.isdisjoint(row) for row in runs(calibration_BT, 1)]
    return calibration_BT[torch.tensor(kept, dtype=torch.bool)]


@torch.no_grad()
def own_answers(
    model: ByteTransformer, *, num_contexts: int, num_held_out: int, seed: int, context: int = CONTEXT
) -> Texts:
    """Texts that the model samples at temperature 1, each after a random token (Liu et al. 2023, "LLM-QAT").

    Raises:
        CompressError: the model's context is shorter than `context`.
    """
    config = model.config
    if context > config.max_position_embeddings:
        raise CompressError(
            f"Contexts of {context} tokens are longer than the model's {config.max_position_embeddings} "
            "(max_position_embeddings)."
        )
    total = num_contexts + num_held_out
    generator = torch.Generator().manual_seed(seed)
    first_B = torch.randint(config.vocab_size, (total,), generator=generator)
    written = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for start in range(0, total, _ANSWERS_AT_ONCE):
            begun = first_B[start : start + _ANSWERS_AT_ONCE, None]
            written.append(
                model.generate(
                    begun, attention_mask=torch.ones_like(begun), do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                    max_new_tokens=context - 1, min_new_tokens=context - 1,
                )
            )  # fmt: skip
    answers = torch.cat(written)
    calibration_BT, held_out_BT = answers[:num_contexts], answers[num_contexts:]
    apart = without_overlap(calibration_BT, held_out_BT)
    if not len(apart):
        raise CompressError("The model's answers are all alike; give a calibration text.")
    return Texts(
        calibration_BT=apart,
        held_out_BT=held_out_BT,
        num_left_out=len(calibration_BT) - len(apart),
        source="the model's own answers",
    )
