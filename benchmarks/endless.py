"""One endless sliding stream: memory and time per token, every 1,000 tokens, in the engine without HTTP.

    python -m benchmarks.endless --tokens 20000                     the demo model, window 512, 4 sinks
    python -m benchmarks.endless --tokens 100000 --model tiny       a small random model

Fails when resident memory grows by more than 20 MiB after the first 2,000 tokens, when the last 1,000 tokens take over
15% more or less than tokens 2,000 to 3,000 (median time per token), or when the log-probabilities after sampled
positions differ from those of the float64 oracle in tests/ by more than 1e-4.
"""

import argparse
import contextlib
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tokenizers
import torch
from tokenizers import models

from benchmarks.support.record import write_result
from stellarbyte import ByteModelConfig, ByteTransformer
from stellarbyte.backends.replaced import RowAdapters
from stellarbyte.checkpoint.native import load_language_model, open_checkpoint
from stellarbyte.checkpoint.source import resolve_model
from stellarbyte_server.config.settings import EngineSettings
from stellarbyte_server.engine.core import EngineCore
from stellarbyte_server.engine.run.runner import RunningStep
from stellarbyte_server.engine.start.load import build_core
from stellarbyte_server.engine.start.serving_plan import serving_config
from stellarbyte_server.engine.state.sequence import Chunk
from stellarbyte_server.protocol.messages import Delta
from stellarbyte_server.protocol.request import GenerationRequest, SamplingParams
from tests.support.models import oracle

INTERVAL = 1000  # tokens
MAX_GROWTH_MIB = 20.0
MAX_TIME_CHANGE = 0.15
MAX_LOGPROB_ERROR = 1e-4
NUM_SAMPLES = 20
_PAGE_MIB = os.sysconf("SC_PAGE_SIZE") / 2**20


@contextlib.contextmanager
def _model(name: str) -> Iterator[str]:
    """The folder of a tiny random model for "tiny", else the name itself."""
    if name != "tiny":
        yield name
        return
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        config = ByteModelConfig(
            vocab_size=256,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=1024,
        )
        ByteTransformer(config).save_pretrained(folder)
        words = models.WordLevel({f"w{i} ": i for i in range(256)}, unk_token="w0 ")
        tokenizers.Tokenizer(words).save(str(Path(folder) / "tokenizer.json"))
        yield folder


def _resident_mib() -> float:
    """Resident memory of this process (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * _PAGE_MIB


def keep_samples(core: EngineCore, every: int) -> dict[int, torch.Tensor]:
    """A dictionary that fills with the log-probabilities [V] after every `every` positions."""
    samples: dict[int, torch.Tensor] = {}
    model = core.runner.executor.model
    start, head = core.runner.start, model.head
    position = 0

    def note_position(chunks: list[Chunk]) -> RunningStep:
        nonlocal position
        position = chunks[-1].start + chunks[-1].length - 1
        return start(chunks)

    def keep_logits(hidden_RC: torch.Tensor, adapters: RowAdapters) -> torch.Tensor:
        logits_RV = head(hidden_RC, adapters)
        if position % every == every - 1:
            samples[position] = logits_RV[-1].log_softmax(dim=-1)
        return logits_RV

    core.runner.start, model.head = note_position, keep_logits
    return samples


def largest_error(settings: EngineSettings, token_ids: list[int], samples: dict[int, torch.Tensor]) -> float:
    """Largest difference between sampled log-probabilities and the oracle's."""
    path = resolve_model(settings.model)
    config, _ = serving_config(open_checkpoint(path).config, settings)
    weights = load_language_model(path, dtype=torch.float32, device=torch.device("cpu")).state_dict()
    expected = oracle.banded_logprobs(weights, config, token_ids, list(samples))
    return (torch.stack(list(samples.values())) - expected).abs().max().item()


def measure(core: EngineCore, num_tokens: int) -> tuple[list[dict[str, Any]], list[int]]:
    """One row for every 1,000 tokens of a stream, and all of its tokens."""
    core.submit(
        GenerationRequest(
            request_id="endless",
            prompt_token_ids=tuple(range(10, 74)),
            sampling=SamplingParams(max_tokens=num_tokens, seed=1, ignore_eos=True),
            context_overflow="slide",
        )
    )
    rows: list[dict[str, Any]] = []
    seconds: list[float] = []
    sequence = next(iter(core.scheduler.waiting))
    while core.has_work:
        started_s = time.perf_counter()
        news = core.step()
        seconds.append(time.perf_counter() - started_s)
        assert sum(item.num_tokens for item in news if isinstance(item, Delta)) == 1
        if len(seconds) == INTERVAL:
            ms = [value * 1000 for value in seconds]
            rows.append(
                {
                    "tokens": (len(rows) + 1) * INTERVAL,
                    "resident_mib": round(_resident_mib(), 1),
                    "ms_per_token_median": round(statistics.median(ms), 3),
                    "ms_per_token_mean": round(statistics.mean(ms), 3),
                    "blocks_used": core.stats().num_blocks_used,
                }
            )
            print("  ".join(f"{name} {value:>9}" for name, value in rows[-1].items()), flush=True)
            seconds.clear()
    return rows, sequence.tokens.tolist()


def broken_bounds(rows: list[dict[str, Any]], logprob_error: float) -> list[str]:
    """The bounds that a run of at least 4,000 tokens broke, as sentences."""
    broken = []
    growth_mib = max(row["resident_mib"] for row in rows[2:]) - rows[1]["resident_mib"]
    if growth_mib > MAX_GROWTH_MIB:
        broken.append(f"resident memory grew by {growth_mib:.1f} MiB")
    early, late = rows[2]["ms_per_token_median"], rows[-1]["ms_per_token_median"]
    if abs(late / early - 1) > MAX_TIME_CHANGE:
        broken.append(f"a token took {early} ms at first and {late} ms at last")
    if logprob_error > MAX_LOGPROB_ERROR:
        broken.append(f"log-probabilities differ from the oracle's by up to {logprob_error:.1e}")
    return broken


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo", help="folder, demo or tiny")
    parser.add_argument("--tokens", type=int, default=20_000)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--sink-tokens", type=int, default=4)
    parser.add_argument("--no-record", action="store_true", help="print only")
    options = parser.parse_args()
    if options.tokens < 4 * INTERVAL:
        parser.error(f"--tokens must be at least {4 * INTERVAL}")
    with _model(options.model) as model:
        settings = EngineSettings(
            model=model, max_num_seqs=1, sliding_window=options.window, sink_tokens=options.sink_tokens
        )
        core, _ = build_core(settings)
        samples = keep_samples(core, options.tokens // NUM_SAMPLES)
        rows, token_ids = measure(core, options.tokens)
        print("comparing with the oracle")
        error = largest_error(settings, token_ids[:-1], samples)
    print(f"log-probabilities after {sorted(samples)} differ by up to {error:.1e}")
    broken = broken_bounds(rows, error)
    print("\n".join(f"FAILED: {sentence}" for sentence in broken) or "all bounds were kept")
    if not options.no_record:
        run = {"model": options.model, "window": options.window, "sink_tokens": options.sink_tokens}
        checked = {"sampled_positions": sorted(samples), "largest_logprob_error": error}
        write_result("endless", run | checked | {"bounds_broken": broken, "rows": rows})
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
