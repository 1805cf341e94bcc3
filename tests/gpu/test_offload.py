"""Copies of blocks between a GPU's cache and pinned memory, beside the stream of the steps."""

import pytest
import torch

from stellarbyte.cache.paged_kv import PagedKVCache
from stellarbyte_server.engine.offload.copies import CudaCopies
from stellarbyte_server.engine.offload.host_blocks import host_memory
from tests.support.models.byte_transformer import make_config

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
