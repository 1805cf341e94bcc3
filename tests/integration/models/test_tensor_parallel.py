"""The demo model divided among two ranks answers as it does alone, over HTTP. It has 3 key-value heads."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.support.models.references import MODEL_NAME, PROMPTS
from tests.support.servers.server_process import REAL, ServerProcess, running

NEAR_TIE = 1e-3  # between the two best logits: the last bits of a batch may decide


@pytest.mark.slow
def test_the_demo_model_on_two_ranks(demo_server: ServerProcess) -> None:
    bodies = [_body(prompt, **sampling) for prompt in PROMPTS[:6] for sampling in ({}, {"temperature": 0.8})]
    with running(REAL, "--tensor-parallel-size", "2", "--device", "cpu") as divided, ThreadPoolExecutor(8) as clients:
        assert "the first ones have more" in divided.log()
        pairs = [
            list(clients.map(lambda body, url=server.url: _tokens(url, body), bodies))
            for server in (demo_server, divided)
        ]
    different = 0
    for (of_one, gaps), (of_two, _) in zip(*pairs, strict=True):
        if of_one != of_two:
            first = next(i for i, (a, b) in enumerate(zip(of_one, of_two, strict=True)) if a != b)
            assert gaps is None or gaps[first] < NEAR_TIE
            different += 1
    assert different <= len(bodies) // 10


def _body(prompt: str, **sampling: Any) -> dict[str, Any]:
    told = {"model": MODEL_NAME, "prompt": prompt, "max_tokens": 16, "ignore_eos": True, "seed": 5}
    return told | {"temperature": 0, "logprobs": 2, "return_token_ids": True} | sampling


def _tokens(url: str, body: dict[str, Any]) -> tuple[list[int], list[float] | None]:
    """The tokens, and of a greedy answer the gap between the two likeliest at each place."""
    choice = httpx.post(f"{url}/v1/completions", json=body, timeout=300).json()["choices"][0]
    if body["temperature"]:
        return choice["token_ids"], None
    best = [sorted(top.values(), reverse=True) for top in choice["logprobs"]["top_logprobs"]]
    return choice["token_ids"], [values[0] - values[1] if len(values) > 1 else 0.0 for values in best]
