"""A receipt of an answer: what is needed to compute it again, as `stellarbyte replay` does, and what it then is."""

import hashlib
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import msgspec

from stellarbyte_server.api.contract.bodies.generation import GenerationBody
from stellarbyte_server.api.service import Service
from stellarbyte_server.protocol.request import GenerationRequest

VERSION = 1
_OF_CHOICE = ("choice", "grammar", "logprobs", "prompt_logprobs", "return_token_ids")  # in the body, or without effect


def make_receipt(
    service: Service,
    path: str,
    body: GenerationBody,
    requests: Sequence[GenerationRequest],
    adapter_hash: str,
    answers: Sequence[Sequence[int]],
) -> dict[str, Any]:
    """The receipt of all answers to a body, in the order of the requests.

    Args:
        path: of the endpoint.
        body: with a seed.
        adapter_hash: "" without an adapter.
        answers: their token ids.
    """
    info, first = service.info, requests[0]
    sampling = msgspec.to_builtins(first.sampling)
    prompts = [request.prompt_token_ids for request in requests if request.sampling.choice == 0]
    return {
        "version": VERSION,
        "path": path,
        "body": body.model_dump(mode="json", by_alias=True, exclude_unset=True),
        "weights": info.weights_hash,
        "adapter": adapter_hash or None,
        "adapter_scale": first.adapter_scale,
        "numeric_mode": {
            "device": info.device,
            "processor": info.processor,
            "dtype": info.dtype,
            "quantization": info.quantization,
            "kv_cache_dtype": info.kv_cache_dtype,
            "deterministic": info.deterministic,
            "tensor_parallel_size": service.settings.engine.tensor_parallel_size,
        },
        "versions": {name: version(name) for name in ("stellarbyte", "torch")},
        "sampling": {name: value for name, value in sampling.items() if name not in _OF_CHOICE},
        "prompts": [hashlib.sha256(str(list(prompt)).encode()).hexdigest() for prompt in prompts],
        "answers": [list(token_ids) for token_ids in answers],
    }
