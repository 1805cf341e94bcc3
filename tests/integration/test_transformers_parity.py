"""The server's greedy answers against transformers' LlamaForCausalLM on the same converted weights.

Equal means: identical up to the first place where transformers' own two best logits are closer than 1e-3 (matrix
products change in their last bits with the batch's shape). Such places are counted and must stay rare.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import httpx
import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from stellarbyte.checkpoint.demo import resolve_model
from stellarbyte.checkpoint.native import load_config, load_model
from tests.integration.conftest import MODEL_NAME

NUM_TOKENS = 64
NEAR_TIE = 1e-3
PROMPTS = [
    "The capital of France is",
    "Once upon a time there was a little",
    "def fibonacci(n):\n",
    "Water boils at 100 degrees Celsius because",
    "1, 1, 2, 3, 5, 8, 13,",
    "The three primary colours are red,",
    "In 1969, the first humans",
    "Dear Sir or Madam,\n\nI am writing to",
    "Q: What is photosynthesis?\nA:",
    "SELECT name, age FROM users WHERE",
    "My favourite recipe for pancakes: first,",
    "The quick brown fox jumps over the lazy dog.",
    "To be, or not to be, that is",
    "<html>\n<head>\n<title>",
    "La capitale de l'Italie est",
    "A prime number is a natural number that",
    "import numpy as np\n\nx = np.",
    "The meeting is on Tuesday, so please",
    "Gravity is the force by which",
    "List of planets:\n1. Mercury\n2. Venus\n3.",
]


@dataclass
class Reference:
    token_ids: list[int]
    gaps: list[float]  # between the two best logits, at each token


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(resolve_model("demo"))


@pytest.fixture(scope="module")
def references(tokenizer) -> list[Reference]:
    """What transformers generates, the prompts in one left-padded batch."""
    path = resolve_model("demo")
    ours = load_config(path)
    fields = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    fields += ("num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "rope_parameters")
    fields += ("tie_word_embeddings", "hidden_act")
    llama = LlamaForCausalLM(LlamaConfig(**{name: getattr(ours, name) for name in fields})).eval()
    llama.load_state_dict(load_model(path).state_dict())
    rows = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    out = llama.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=NUM_TOKENS,
        min_new_tokens=NUM_TOKENS,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    best = torch.stack(out.logits, dim=1).topk(2, dim=-1).values
    gaps = (best[..., 0] - best[..., 1]).tolist()
    return [Reference(row[width:].tolist(), row_gaps) for row, row_gaps in zip(out.sequences, gaps, strict=True)]


def ask(url: str, prompt: str) -> str:
    body = {"model": MODEL_NAME, "prompt": prompt, "max_tokens": NUM_TOKENS, "temperature": 0, "ignore_eos": True}
    answer = httpx.post(f"{url}/v1/completions", json=body, timeout=120).json()
    assert answer["usage"]["completion_tokens"] == NUM_TOKENS
    return answer["choices"][0]["text"]


@pytest.mark.parametrize("at_once", [1, 16])
def test_greedy_answers_equal_transformers(demo_server, tokenizer, references, at_once: int) -> None:
    with ThreadPoolExecutor(at_once) as clients:
        texts = list(clients.map(lambda prompt: ask(demo_server.url, prompt), PROMPTS))
    near_ties = 0
    for prompt, text, reference in zip(PROMPTS, texts, references, strict=True):
        if text == tokenizer.decode(reference.token_ids, skip_special_tokens=True):
            continue
        agreed = max(
            n
            for n in range(NUM_TOKENS)
            if text.startswith(tokenizer.decode(reference.token_ids[:n], skip_special_tokens=True).rstrip("\ufffd"))
        )
        assert reference.gaps[agreed] < NEAR_TIE, f"{prompt!r} differs at token {agreed}: {text!r}"
        near_ties += 1
    print(f"{near_ties} near-ties among {len(PROMPTS) * NUM_TOKENS} tokens, {at_once} at once")  # noqa: T201
    assert near_ties <= 1
