"""Receipts of requests with several prompts and answers."""

import hashlib
from types import SimpleNamespace
from typing import Any

from stellarbyte_server.api.answers.receipt import make_receipt
from stellarbyte_server.api.contract.bodies.completion import CompletionBody
from stellarbyte_server.api.contract.objects import Receipt
from stellarbyte_server.config.settings import EngineSettings
from tests.support.engines.engine import make_request


def test_each_prompt_has_a_hash_even_if_two_are_equal() -> None:
    body = CompletionBody.model_validate({"model": "m", "prompt": ["a", "a", "b"], "n": 2, "seed": 1, "receipt": True})
    requests = [make_request(prompt, choice=choice) for prompt in ([1, 2], [1, 2], [3]) for choice in range(2)]
    info = SimpleNamespace(
        weights_hash="w",
        device="cpu",
        processor="AVX2",
        dtype="float32",
        quantization="none",
        kv_cache_dtype="float32",
        deterministic=False,
    )
    settings = SimpleNamespace(engine=EngineSettings(model="m", tensor_parallel_size=2))
    service: Any = SimpleNamespace(info=info, settings=settings)
    receipt = make_receipt(service, "/v1/completions", body, requests, "", [[7]] * 6)
    assert receipt["prompts"] == [hashlib.sha256(text).hexdigest() for text in (b"[1, 2]", b"[1, 2]", b"[3]")]
    assert receipt["numeric_mode"]["tensor_parallel_size"] == 2, "ranks add other parts of sums"
    Receipt.model_validate(receipt)
