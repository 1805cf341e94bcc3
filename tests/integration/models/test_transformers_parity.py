"""The server's greedy answers against transformers' LlamaForCausalLM on the same converted weights.

Equal means: identical up to the first place where transformers' own two best logits are closer than 1e-3 (matrix
products change in their last bits with the batch's shape). Such places are counted and must stay rare.
"""

from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from tests.support.cases import some
from tests.support.models.references import MODEL_NAME, Reference

NEAR_TIE = 1e-3


def ask(url: str, reference: Reference) -> str:
    num_tokens = len(reference.token_ids)
    body = {"model": MODEL_NAME, "prompt": reference.prompt, "max_tokens": num_tokens, "temperature": 0}
    answer = httpx.post(f"{url}/v1/completions", json=body | {"ignore_eos": True}, timeout=120).json()
    assert answer["usage"]["completion_tokens"] == num_tokens
    return answer["choices"][0]["text"]


@pytest.mark.parametrize("at_once", some([1, 16], 1))
def test_greedy_answers_equal_transformers(demo_server, tokenizer, references, at_once: int) -> None:
    with ThreadPoolExecutor(at_once) as clients:
        texts = list(clients.map(lambda reference: ask(demo_server.url, reference), references))
    near_ties = 0
    for text, reference in zip(texts, references, strict=True):
        if text == tokenizer.decode(reference.token_ids, skip_special_tokens=True):
            continue
        agreed = max(
            n
            for n in range(len(reference.token_ids))
            if text.startswith(tokenizer.decode(reference.token_ids[:n], skip_special_tokens=True).rstrip("\ufffd"))
        )
        assert reference.gaps[agreed] < NEAR_TIE, f"{reference.prompt!r} differs at token {agreed}: {text!r}"
        near_ties += 1
    num_tokens = sum(len(reference.token_ids) for reference in references)
    print(f"{near_ties} near-ties among {num_tokens} tokens, {at_once} at once")  # noqa: T201
    assert near_ties <= 1
