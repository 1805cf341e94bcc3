"""The torch backend over a cache in fp8, against the same numbers in float32."""

import torch

from stellarbyte.cache.paged_kv import PagedKVCache
from stellarbyte.ops import reference
from tests.support.models.byte_transformer import make_model


def test_a_cache_in_fp8_holds_what_was_written_to_fp8s_precision_and_range() -> None:
    config = make_model().config
    cache = PagedKVCache(config, 3, 4, torch.float8_e4m3fn, torch.device("cpu"))
    keys, values = cache.keys_LBSKD[0], cache.values_LBSKD[0]
    shape = (5, config.num_key_value_heads, config.head_dim)
    new_keys, new_values = torch.randn(2, *shape)
    new_keys[0], new_values[1] = 1e6, -1e6
    slots = torch.tensor([11, 0, 3, 4, 7])
    reference.write_kv(keys, values, slots, new_keys, new_values)
    found_keys, found_values = keys.float().flatten(0, 1), values.float().flatten(0, 1)
    torch.testing.assert_close(found_keys[slots[1:]], new_keys[1:], rtol=2**-4, atol=2**-10)
    torch.testing.assert_close(found_values[slots[2:]], new_values[2:], rtol=2**-4, atol=2**-10)
    assert (found_keys[11] == 448).all() and (found_values[0] == -448).all()
    untouched = [slot for slot in range(12) if slot not in slots.tolist()]
    assert not found_keys[untouched].any() and not found_values[untouched].any()
