"""Attention weights are transformers' and the oracle's; figures of heads are what loops over the weights give."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from stellarbyte import ByteModelConfig
from stellarbyte.analysis.analyse import observe_attention
from stellarbyte.analysis.attention import MAX_TOKENS, attention_weights, head_figures
from stellarbyte.analysis.text import Text, TokenizedText
from stellarbyte.checkpoint.convert import convert
from stellarbyte.checkpoint.native import load_model
from stellarbyte.model import dense_attention
from tests.support.models import oracle
from tests.support.models.byte_transformer import VARIANTS, W, make_model, random_tokens
from tests.support.models.hugging_face import tiny_llama, tiny_mistral, tiny_qwen3

# L layers, H heads, T queries, S keys

IDS = tuple(random_tokens(3 * W))


@pytest.mark.parametrize("make", [tiny_llama, tiny_mistral, tiny_qwen3])
def test_weights_are_those_of_transformers_eager_attention(make: Any, tmp_path: Path) -> None:
    source = make(tmp_path / "source")
    model = load_model(convert(source, tmp_path / "model"))
    theirs = AutoModelForCausalLM.from_pretrained(source, attn_implementation="eager").eval()
    with torch.inference_mode():
        expected = torch.cat(theirs(torch.tensor([IDS]), output_attentions=True).attentions)
    found = attention_weights(model, IDS)
    assert found.shape == expected.shape == (3, 4, len(IDS), len(IDS))
    assert (found - expected).abs().max() < 1e-5
    assert (found.sum(dim=-1) - 1).abs().max() < 1e-5


def expected_weights(model: Any) -> torch.Tensor:
    """[L, H, T, S] float64, by the formulas alone."""
    found: list[torch.Tensor] = []

    def attend(config: ByteModelConfig, layer: int, q: Any, k: Any, v: Any, sink_H: Any = None) -> torch.Tensor:
        m, n = torch.arange(len(q))[:, None], torch.arange(len(q))[None]
        window, sinks = config.windows[layer], config.sink_tokens
        distance, visible = m - n, n <= m
        if window is not None:
            visible = visible & ((n > m - window) | (n < sinks))
            distance = torch.where(n < sinks, m.clamp(max=window + sinks - 1) - n, distance)
        scores = oracle.pair_scores(config, layer, q, k, distance).masked_fill(~visible, -math.inf)
        found.append(oracle.softmax(scores, sink_H))
        return torch.einsum("hmn,nhd->mhd", found[-1], v)

    oracle.logprobs(model.state_dict(), model.config, list(IDS), attend)
    return torch.stack(found)


@pytest.mark.parametrize("chunk", [2048, 7])
@pytest.mark.parametrize(
    "variant",
    ["xpos window sinks", "sinks of the softmax", "norms before and after", "rotation of a part, not in all layers"],
)
def test_weights_are_the_oracles_with_windows_and_both_kinds_of_sinks(
    variant: str, chunk: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dense_attention, "XPOS_CHUNK", chunk)
    model = make_model(**VARIANTS[variant])
    expected, found = expected_weights(model), attention_weights(model.to(device), IDS)
    assert (found - expected).abs().max() < 1e-5
    sums = found.sum(dim=-1)
    if model.config.softmax_sink:
        assert sums.max() < 1 and sums.min() > 0
    else:
        assert (sums - 1).abs().max() < 1e-5


@pytest.mark.parametrize("variant", ["xpos window sinks", "sinks of the softmax"])
def test_figures_of_heads_are_means_over_the_queries_after_the_first(variant: str) -> None:
    weights = attention_weights(make_model(**VARIANTS[variant]), IDS)
    figures = {(one.layer, one.head): one for one in head_figures(weights, 4)}
    assert len(figures) == 12
    for (layer, head), found in figures.items():
        rows = weights[layer, head].double().tolist()
        first, distance, entropy, nothing = [], [], [], []
        for m, row in enumerate(rows[1:], start=1):
            total = sum(row)
            first.append(sum(row[:4]))
            distance.append(sum(w * (m - n) for n, w in enumerate(row)) / total)
            entropy.append(-sum(w / total * math.log2(w / total) for w in row if w > 0))
            nothing.append(max(0.0, 1 - total))
        for name, values in {"first": first, "distance": distance, "entropy": entropy, "nothing": nothing}.items():
            assert getattr(found, name) == pytest.approx(sum(values) / len(values), rel=1e-6, abs=1e-9), name


def test_shown_layers_and_heads_are_those_of_the_whole() -> None:
    model = make_model(num_hidden_layers=6, num_attention_heads=10, num_key_value_heads=5, sink_tokens=2)
    ids = tuple(random_tokens(MAX_TOKENS + 20))
    tokens = TokenizedText(
        text=Text(name=None, content="x"), ids=ids, num_special=0, num_unknown=0, labels=tuple(map(str, ids))
    )
    found, whole = observe_attention(model, tokens), attention_weights(model, ids[:MAX_TOKENS])
    assert (found.layers, found.heads) == ((0, 2, 3, 5), (0, 1, 3, 4, 5, 6, 8, 9))
    assert (found.labels, found.num_tokens) == (tokens.labels[:MAX_TOKENS], MAX_TOKENS + 20)
    for place, layer in enumerate(found.layers):
        assert torch.equal(found.means_LTS[place], whole[layer].mean(dim=0))
        for shown, head in enumerate(found.heads):
            assert torch.equal(found.weights_LHTS[place, shown], whole[layer, head])
    assert list(found.figures) == head_figures(whole, 2)
