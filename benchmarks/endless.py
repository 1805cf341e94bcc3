"""One stream that slides for ever: memory and time per token, every 1,000 tokens, in the engine without HTTP.

    python -m benchmarks.endless --tokens 20000                     the demo model, window 512, 4 sinks
    python -m benchmarks.endless --tokens 100000 --model tiny       a small random model

Fails when resident memory grows by more than 20 MiB after the first 2,000 tokens, or when the last 1,000 tokens take
over 15% more or less than tokens 2,000 to 3,000 (median time per token).
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

from benchmarks.record import write_result
from server.engine.load import build_core
from server.engine.messages import Delta
from server.engine.request import GenerationRequest, SamplingParams
from server.settings import EngineSettings
from stellarbyte import ByteModelConfig, ByteTransformer

INTERVAL = 1000  # tokens
MAX_GROWTH_MIB = 20.0
MAX_TIME_CHANGE = 0.15
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
    """Memory of this process that is in RAM (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * _PAGE_MIB


def measure(settings: EngineSettings, num_tokens: int) -> list[dict[str, Any]]:
    """One row for every 1,000 tokens of a stream."""
    core, _ = build_core(settings)
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
    return rows


def broken_bounds(rows: list[dict[str, Any]]) -> list[str]:
    """What a run of at least 4,000 tokens did not keep to, as sentences."""
    broken = []
    growth_mib = max(row["resident_mib"] for row in rows[2:]) - rows[1]["resident_mib"]
    if growth_mib > MAX_GROWTH_MIB:
        broken.append(f"resident memory grew by {growth_mib:.1f} MiB")
    early, late = rows[2]["ms_per_token_median"], rows[-1]["ms_per_token_median"]
    if abs(late / early - 1) > MAX_TIME_CHANGE:
        broken.append(f"a token took {early} ms at first and {late} ms at last")
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
        parser.error(f"--tokens: at least {4 * INTERVAL} are needed for the comparison")
    with _model(options.model) as model:
        settings = EngineSettings(
            model=model, max_num_seqs=1, sliding_window=options.window, sink_tokens=options.sink_tokens
        )
        rows = measure(settings, options.tokens)
    broken = broken_bounds(rows)
    print("\n".join(f"FAILED: {sentence}" for sentence in broken) or "all bounds were kept")
    if not options.no_record:
        run = {"model": options.model, "window": options.window, "sink_tokens": options.sink_tokens}
        write_result("endless", run | {"bounds_broken": broken, "rows": rows})
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
