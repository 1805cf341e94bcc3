"""Keys dropped for want of attention: the cache against a float64 loop over heads, queries and keys."""

import math
from itertools import accumulate, pairwise
from typing import Any

import pytest
import torch

from stellarbyte import ByteModelConfig, KeyPruning, Memory, RelativeCache
from stellarbyte.model.transformer import CACHE
from tests.support.cases import each_pair_once
from tests.support.models import oracle
from tests.support.models.byte_transformer import W, make_model, random_tokens

MODELS: dict[str, dict[str, Any]] = {
    "rope": {"use_xpos": False, "qk_norm": True},
    "xpos, a key head for each": {"num_key_value_heads": 4},
    "window": {"use_xpos": False, "sliding_window": W},
    "sinks": {"sliding_window": W, "sink_tokens": 3},
    "some windows": {
        "use_xpos": False,
        "sliding_window": W,
        "sink_tokens": 2,
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
    },
    "sinks of the softmax": {"use_xpos": False, "softmax_sink": True},
    "soft caps, other rotations": {
        "attention_softcap": 2.0,
        "attention_multiplier": 0.5,
        "layer_rotations": ["local", "global", "none"],
        "local_rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
    },
}
CALLS = {"decode": [20] + [1] * 20, "steps": [1] * 30, "chunks": [13, 9, 1, 1, 12]}
PRUNINGS = {
    "half": {"ratio": 0.5},
    "budget": {"budget": 9, "recent": 0.3},
    "heavy hitters only": {"budget": 7, "recent": 0},
    "newest only": {"budget": 7, "recent": 1},
    "both": {"ratio": 0.25, "budget": 10},
}


def heavy_hitters(
    calls: list[int], ratio: float = 0.0, budget: int | None = None, recent: float = 0.5, num_memory: int = 0
) -> oracle.Attend:
    """Attention when the model gets `calls` tokens at a time and drops keys after each.

    The first `num_memory` tokens are attended to as usual, and then in a memory: keys without attention as yet.
    """

    def num_kept(num_read: int, window: int | None, sinks: int) -> int:
        limits = [num_read - math.floor(ratio * num_read)]
        limits += [] if budget is None else [budget]
        limits += [] if window is None else [window - 1 + sinks]
        return max(min(limits), sinks + 1)

    def attend(
        config: ByteModelConfig,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        sink_H: torch.Tensor | None = None,
    ) -> torch.Tensor:
        assert config.num_key_value_heads is not None
        group = q.shape[1] // config.num_key_value_heads
        window = config.windows[layer]
        sinks = 0 if window is None else config.sink_tokens
        out = torch.empty_like(q)
        for first in range(0, q.shape[1], group):
            heads = slice(first, first + group)
            attention: dict[int, float] = {}  # of the keys that are kept, in order
            for start, end in pairwise(accumulate([0, num_memory, *calls])):
                if start == end:
                    continue
                attention |= dict.fromkeys(range(start, end), 0.0)
                m, n = torch.arange(start, end)[:, None], torch.tensor(list(attention))[None, :]
                distance, visible = m - n, n <= m
                if window is not None:
                    visible = visible & ((n > m - window) | (n < sinks))
                    distance = torch.where(n < sinks, m.clamp(max=window + sinks - 1) - n, distance)
                scores = oracle.pair_scores(config, layer, q[start:end, heads], k[n[0], heads], distance)
                sink = None if sink_H is None else sink_H[heads]
                weights = oracle.softmax(scores.masked_fill(~visible, -math.inf), sink)
                out[start:end, heads] = torch.einsum("hmn,nhd->mhd", weights, v[n[0], heads])
                if end <= num_memory:
                    continue
                for key, added in zip(attention, weights.sum(dim=(0, 1)).tolist(), strict=True):
                    attention[key] += added
                limit = num_kept(end, window, sinks)
                if len(attention) > limit:
                    kept = [key for key in attention if key < sinks]
                    newest = min(math.floor(recent * limit), limit - sinks)
                    kept += [key for key in list(attention)[len(attention) - newest :] if key >= sinks]
                    rest = [key for key in attention if key not in kept and (window is None or key > end - window)]
                    kept += sorted(rest, key=lambda key: -attention[key])[: limit - len(kept)]
                    attention = {key: attention[key] for key in sorted(kept)}
        return out

    return attend


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "pruning", "tokens_at_once"), each_pair_once(list(MODELS), list(PRUNINGS), list(CALLS))
)
def test_a_pruned_cache_matches_the_oracle(name: str, pruning: str, tokens_at_once: str) -> None:
    calls = CALLS[tokens_at_once]
    model = make_model(**MODELS[name])
    tokens = random_tokens(sum(calls))
    cache = RelativeCache(model.config, pruning=KeyPruning(**PRUNINGS[pruning]))
    segments = torch.tensor([tokens]).split(calls, dim=1)
    logits = torch.cat([model(segment, past_key_values=cache).logits for segment in segments], dim=1)[0]
    expected = oracle.logprobs(model.state_dict(), model.config, tokens, heavy_hitters(calls, **PRUNINGS[pruning]))
    assert (logits.double().log_softmax(dim=-1) - expected).abs().max() <= 1e-4
    whole = oracle.logprobs(model.state_dict(), model.config, tokens)
    assert (expected - whole).abs().max() > 0.1  # so what is dropped matters


@torch.no_grad()
def test_long_prompts_count_their_attention_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stellarbyte.model.dense_attention.PRUNED_CHUNK", 7)
    test_a_pruned_cache_matches_the_oracle("rope", "budget", "decode")


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_what_is_kept_has_the_size_that_was_asked_for(name: str) -> None:
    model = make_model(**MODELS[name])
    cache = RelativeCache(model.config, pruning=KeyPruning(ratio=0.5))
    model(torch.tensor([random_tokens(41)] * 2), past_key_values=cache)
    for layer, window in zip(cache.layers, model.config.windows, strict=True):
        kept = 41 - 20 if window is None else W - 1 + model.config.sink_tokens
        assert layer.keys.shape == layer.values.shape == (2, model.config.num_key_value_heads, kept, 16)
        assert layer.positions.shape == layer.attention.shape == layer.keys.shape[:3]


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_a_ratio_of_0_gives_the_same_bits_as_no_pruning(name: str) -> None:
    model = make_model(**MODELS[name])
    ids = torch.tensor([random_tokens(20), random_tokens(20, seed=1)])
    options = {"max_new_tokens": 20, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    plain = model.generate(ids, **options)
    pruned = model.generate(ids, **{CACHE: RelativeCache(model.config, pruning=KeyPruning(ratio=0))}, **options)
    assert torch.equal(plain.sequences, pruned.sequences)
    assert all(torch.equal(a, b) for a, b in zip(plain.logits, pruned.logits, strict=True))


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_generate_with_a_pruned_cache(name: str) -> None:
    """Two left-padded prompts give what each gives alone, by the oracle."""
    model = make_model(**MODELS[name])
    prompts = [random_tokens(2 * W), random_tokens(5, seed=1)]
    ids, mask = torch.zeros(2, 2 * W, dtype=torch.long), torch.zeros(2, 2 * W, dtype=torch.long)
    for i, prompt in enumerate(prompts):
        ids[i, -len(prompt) :], mask[i, -len(prompt) :] = torch.tensor(prompt), 1
    cache = RelativeCache(model.config, pruning=KeyPruning(budget=9))
    answers = model.generate(ids, attention_mask=mask, max_new_tokens=W, do_sample=False, **{CACHE: cache})
    for prompt, answer in zip(prompts, answers[:, 2 * W :].tolist(), strict=True):
        text = prompt.copy()
        for step in range(W):
            attend = heavy_hitters([len(prompt)] + [1] * step, budget=9)
            text.append(int(oracle.logprobs(model.state_dict(), model.config, text, attend)[-1].argmax()))
        assert answer == text[len(prompt) :]


@torch.no_grad()
def test_beams_take_their_attention_with_them() -> None:
    model = make_model(use_xpos=False)
    prompt = torch.tensor([random_tokens(W)])
    found = {}
    for budget in (8, 10_000):
        cache = RelativeCache(model.config, pruning=KeyPruning(budget=budget))
        options = {"max_new_tokens": 2 * W, "num_beams": 3, "do_sample": False}
        found[budget] = model.generate(prompt, **{CACHE: cache}, **options)
    assert torch.equal(found[10_000], model.generate(prompt, **options))
    cache = RelativeCache(model.config, pruning=KeyPruning(budget=8))
    model(torch.tensor([random_tokens(W), random_tokens(W, seed=1)]), past_key_values=cache)
    before = cache.layers[1].attention
    cache.reorder_cache(torch.tensor([1, 1]))
    assert torch.equal(cache.layers[1].attention, before[[1, 1]])
    cache.batch_repeat_interleave(2)
    assert torch.equal(cache.layers[1].attention, before[[1, 1, 1, 1]])


@torch.no_grad()
def test_a_memory_counts_as_tokens_read_before() -> None:
    """Its keys come with the first call; they are dropped as others are."""
    model = make_model(use_xpos=False)
    tokens, read = random_tokens(30), random_tokens(30)[:12]
    memory = Memory(model.config, 12)
    logits = [model(torch.tensor([read]), memory=memory, use_cache=False).logits]
    cache = RelativeCache(model.config, memory=memory, pruning=KeyPruning(budget=8))
    calls = [10, *[1] * 8]
    for segment in torch.tensor([tokens[12:]]).split(calls, dim=1):
        logits.append(model(segment, past_key_values=cache).logits)
    assert cache.layers[0].keys.shape[2] == 8 and cache.get_seq_length() == 18

    attend = heavy_hitters(calls, num_memory=12, budget=8)
    expected = oracle.logprobs(model.state_dict(), model.config, tokens, attend)
    assert (torch.cat(logits, dim=1)[0].double().log_softmax(dim=-1) - expected).abs().max() <= 1e-4


def test_impossible_prunings_are_told_in_a_sentence() -> None:
    for settings, message in (
        ({"ratio": 1}, r"ratio \(1\) must be at least 0 and less than 1"),
        ({"budget": 0}, r"budget \(0\) must be at least 1, or None"),
        ({"recent": 1.5}, r"recent \(1.5\) must be between 0 and 1"),
    ):
        with pytest.raises(ValueError, match=message):
            KeyPruning(**settings)
    config = make_model(sliding_window=W, sink_tokens=4).config
    with pytest.raises(ValueError, match=r"budget \(4\) must be greater than sink_tokens \(4\)"):
        RelativeCache(config, pruning=KeyPruning(budget=4))
