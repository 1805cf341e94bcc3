"""Perplexity by position in texts far longer than those of the training, in the library and through the server.

    python -m benchmarks.training.long_text runs/poet/model data/poet
    python -m benchmarks.training.long_text MODEL SHARDS --multiple 16 --url http://127.0.0.1:8000

The texts are held-out documents of the shards, eight times as long as a training row. Each bucket of positions has the
mean over the same documents. If attention or rotation depended on where a token stands, tokens far in a text would cost
more than the same tokens in rows of the training length; `cost_of_position` says how much. Without --url, a server is
started on the checkpoint with a KV cache for a quarter of a document.
"""

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch
from torch.nn import functional as F

from benchmarks.support.record import write_result
from stellarbyte import ByteTransformer
from stellarbyte.cache.relative import RelativeCache
from stellarbyte.checkpoint.info import describe
from stellarbyte.checkpoint.native import load_model, open_checkpoint
from stellarbyte.train.data.tokens import TokenSequences

# B documents of one length, T tokens of one bucket, N tokens of a document, V vocabulary

AT_ONCE = 32  # documents
LIMIT_S = 600


def long_documents(shards: Path, length: int, most: int) -> list[np.ndarray]:
    """The first `length` tokens of held-out documents that have as many, at most `most`. ValueError: there is none."""
    rows = TokenSequences(shards, "held_out", length, "single")
    found: list[np.ndarray] = []
    for row in range(len(rows)):
        batch = rows[row]
        is_start = batch["input_ids"][0] == rows.index.bos_token_id
        if is_start and bool((batch["document_ids"] == 0).all()):
            found.append(batch["input_ids"].numpy())
            if len(found) == most:
                break
    if not found:
        raise ValueError(f"{shards} holds out no document of {length} tokens.")
    return found


@torch.inference_mode()
def library_losses(
    model: ByteTransformer, documents: Sequence[np.ndarray], device: torch.device, *, bucket: int
) -> np.ndarray:
    """[documents, N - 1]: -log p of every token but the first, by one pass with a cache that keeps what is visible."""
    model = model.to(device).eval()
    found = []
    for start in range(0, len(documents), AT_ONCE):
        ids_BN = torch.from_numpy(np.stack(documents[start : start + AT_ONCE])).to(device)
        cache, losses = RelativeCache(model.config), []
        for ids_BT, next_BT in zip(ids_BN[:, :-1].split(bucket, 1), ids_BN[:, 1:].split(bucket, 1), strict=True):
            logits_BTV = model(ids_BT, past_key_values=cache).logits.float()
            losses.append(F.cross_entropy(logits_BTV.transpose(1, 2), next_BT, reduction="none").cpu())
        found.append(torch.cat(losses, dim=1))
    return torch.cat(found).double().numpy()


def server_losses(url: str, documents: Sequence[np.ndarray]) -> np.ndarray:
    """The same from the log-probabilities of prompts that slide."""
    found = []
    for ids in documents:
        body = {"model": _model_of(url), "prompt": ids.tolist(), "max_tokens": 0, "prompt_logprobs": 0}
        answer = httpx.post(f"{url}/v1/completions", json=body | {"context_overflow": "slide"}, timeout=LIMIT_S)
        answer.raise_for_status()
        entries = answer.json()["choices"][0]["prompt_logprobs"][1:]
        pairs = zip(entries, ids[1:].tolist(), strict=True)
        found.append([-entry[str(token)]["logprob"] for entry, token in pairs])
    return np.array(found)


def _model_of(url: str) -> str:
    return httpx.get(f"{url}/v1/models", timeout=30).json()["data"][0]["id"]


def by_position(losses: np.ndarray, bucket: int) -> list[dict[str, float]]:
    """Mean loss and perplexity of each bucket of positions; `tokens` is the bucket's last position."""
    parts = np.split(losses, range(bucket, losses.shape[1], bucket), axis=1)
    means = [float(part.mean()) for part in parts]
    ends = np.cumsum([part.shape[1] for part in parts])
    return [
        {"tokens": int(end), "loss": round(mean, 4), "perplexity": round(math.exp(mean), 3)}
        for end, mean in zip(ends, means, strict=True)
    ]


def row_losses(
    model: ByteTransformer, documents: Sequence[np.ndarray], device: torch.device, training_length: int
) -> np.ndarray:
    """[documents, N - 1]: -log p of the same tokens, but each training length of a document read alone, from 0 on."""
    starts = range(0, len(documents[0]) - 1, training_length)
    rows = [ids[start : start + training_length + 1] for ids in documents for start in starts]
    return library_losses(model, rows, device, bucket=training_length).reshape(len(documents), -1)


def cost_of_position(losses: np.ndarray, alone: np.ndarray, training_length: int) -> float:
    """By how many nats a token costs more far in the text than the same token in a row of the training length.

    The mean over tokens after the first training length, of second halves of rows: there a row has context, too.
    Content cancels out: both are losses of the same tokens.
    """
    more = (losses - alone).reshape(len(losses), -1, training_length)[:, 1:, training_length // 2 :]
    return round(float(more.mean()), 4)


def measure(model: Path, shards: Path, url: str, *, training_length: int, multiple: int, most: int) -> dict[str, Any]:
    """The figures of one model; `url` is a server of the same checkpoint."""
    documents = long_documents(shards, multiple * training_length + 1, most)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bucket = training_length // 2
    loaded = load_model(model, dtype=torch.float32)
    ours = library_losses(loaded, documents, device, bucket=bucket)
    alone = row_losses(loaded, documents, device, training_length)
    served = server_losses(url, documents)
    return {
        "documents": len(documents),
        "training_length": training_length,
        "multiple": multiple,
        "library": by_position(ours, bucket),
        "server": by_position(served, bucket),
        "cost_of_position": cost_of_position(ours, alone, training_length),
        "largest_difference": round(float(np.abs(ours - served).max()), 6),
        "mean_difference": round(float(np.abs(ours.mean(axis=1) - served.mean(axis=1)).max()), 6),
    }


def lines(found: dict[str, Any]) -> Iterator[str]:
    for ours, served in zip(found["library"], found["server"], strict=True):
        yield f"to {ours['tokens']:>6} tokens  perplexity {ours['perplexity']:>8}  served {served['perplexity']:>8}"
    cost = found["cost_of_position"]
    yield f"a token after position {found['training_length']} costs {cost} nats more than in a row of its own"


def cache_flags(model: Path, length: int) -> list[str]:
    """A KV cache of a quarter of `length` tokens: a sequence that kept all of its keys would not fit."""
    memory = length // 4 * describe(open_checkpoint(model)).kv_bytes_per_token["float32"]
    return ["--dtype", "float32", "--kv-cache-memory", str(memory), "--max-num-batched-tokens", str(length // 16)]


def main() -> int:
    from tests.support.servers.server_process import REAL, running

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("shards", type=Path, help="of `stellarbyte train prepare`, with held-out documents")
    parser.add_argument("--training-length", type=int, default=512, help="tokens; default: %(default)s")
    parser.add_argument("--multiple", type=int, default=8, help="of the training length; default: %(default)s")
    parser.add_argument("--documents", type=int, default=64, help="at most; default: %(default)s")
    parser.add_argument("--url", help="of a running server of the model; absent: one is started")
    options = parser.parse_args()
    sizes = {"training_length": options.training_length, "multiple": options.multiple, "most": options.documents}
    if options.url is not None:
        found = measure(options.model, options.shards, options.url, **sizes)
    else:
        flags = cache_flags(options.model, options.multiple * options.training_length)
        with running(REAL, "--model", str(options.model.resolve()), *flags) as server:
            found = measure(options.model, options.shards, server.url, **sizes)
    print("\n".join(lines(found)))
    write_result("long_text", found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
