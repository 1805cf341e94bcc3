"""Blocks of a GPU's cache in pinned memory and on disk: copies beside the stream of the steps, and whole servers."""

import random
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from stellarbyte.cache.paged_kv import PagedKVCache
from stellarbyte_server.engine.offload.copies import CudaCopies
from stellarbyte_server.engine.offload.host_blocks import host_memory
from tests.support.models.byte_transformer import make_config, random_tokens
from tests.support.servers.adapter_server import KnownModel
from tests.support.servers.server_process import REAL, ServerProcess, running

NUM_CHATS = 40
CACHE_MEMORY = "1MiB"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device here"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_copies_keep_every_bit(dtype: torch.dtype) -> None:
    cache = PagedKVCache(make_config(), 5, 64, dtype, torch.device("cuda"))
    parts = [part.view(torch.uint8) for part in (cache.keys_LBSKD, cache.values_LBSKD)]
    for part in parts:
        part.copy_(torch.randint(0, 256, part.shape, dtype=torch.uint8, device="cuda"))
    before = [part.clone() for part in parts]
    copies = CudaCopies(cache)
    memory = host_memory(2, copies.num_bytes)
    copies.adopt(memory)
    torch.cuda.synchronize()
    copies.read(3, memory[1])
    copies.write(memory[1], 1, copies.fence())
    for part, was in zip(parts, before, strict=True):
        assert torch.equal(part[:, 1], was[:, 3])
        assert torch.equal(part[:, [0, 2, 3, 4]], was[:, [0, 2, 3, 4]])


def test_a_block_is_written_after_the_steps_before_its_fence() -> None:
    """A step in flight may still write to a block that was freed; what it writes must not come last."""
    cache = PagedKVCache(make_config(), 2, 64, torch.float32, torch.device("cuda"))
    copies = CudaCopies(cache)
    memory = host_memory(1, copies.num_bytes)
    memory[:] = 7
    copies.adopt(memory)
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(200_000_000)  # a step that takes about a tenth of a second
        cache.keys_LBSKD.fill_(1.0)
        fence = copies.fence()
    copies.write(memory[0], 1, fence)
    torch.cuda.synchronize()
    assert (cache.keys_LBSKD[:, 1].contiguous().view(torch.uint8) == 7).all()


def test_answers_are_those_without_tiers(tmp_path: Path) -> None:
    """Many chats at once, in a cache with room for few; also after a restart."""
    known = KnownModel.make(tmp_path)
    known.add_adapter(tmp_path / "adapters" / "a", 0)
    flags = [
        "--model", str(known.folder), "--served-model-name", "tiny", "--device", "cuda", "--dtype", "float32",
        "--deterministic", "--adapter-dir", str(tmp_path / "adapters"), "--max-model-len", "256",
    ]  # fmt: skip
    tiers = [
        "--kv-cache-memory", CACHE_MEMORY, "--kv-offload-memory", "16MiB",
        "--kv-offload-dir", str(tmp_path / "kv"), "--kv-offload-bytes", "64MiB",
    ]  # fmt: skip
    with running(REAL, *flags) as server:
        expected = [ask(server, number) for number in range(NUM_CHATS)]
    again = random.Random(0).sample(range(NUM_CHATS), NUM_CHATS)
    with running(REAL, *flags, *tiers) as server, ThreadPoolExecutor(8) as threads:
        assert list(threads.map(partial(ask, server), range(NUM_CHATS))) == expected
        assert list(threads.map(partial(ask, server), again)) == [expected[number] for number in again]
        assert loaded_blocks(server, "memory") > NUM_CHATS
    with running(REAL, *flags, *tiers) as server, ThreadPoolExecutor(8) as threads:
        assert list(threads.map(partial(ask, server), again)) == [expected[number] for number in again]
        assert loaded_blocks(server, "disk") > NUM_CHATS
        assert "Traceback" not in server.log()


def ask(server: ServerProcess, number: int) -> dict[str, Any]:
    """The answer's tokens and their log-probabilities."""
    body = {
        "model": "tiny" if number % 3 else "a", "prompt": random_tokens(100 + number, seed=number), "max_tokens": 12,
        "temperature": number % 2, "seed": number, "logprobs": 2, "ignore_eos": True,
    }  # fmt: skip
    answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=120).raise_for_status().json()
    return answer["choices"][0]["logprobs"]


def loaded_blocks(server: ServerProcess, tier: str) -> float:
    for line in httpx.get(f"{server.url}/metrics", timeout=30).text.splitlines():
        if line.startswith("stellarbyte:kv_offload_loaded_blocks_total{") and f'tier="{tier}"' in line:
            return float(line.rsplit(" ", 1)[1])
    raise AssertionError("the metric is missing")
