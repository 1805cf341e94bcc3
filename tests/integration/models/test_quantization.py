"""--quantization and --deterministic as a user meets them: the demo model with small weights, and what does not fit."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from stellarbyte.checkpoint.convert import convert
from stellarbyte_client.terminal.connection import Connection
from stellarbyte_client.terminal.replay import replay
from tests.support.cases import some
from tests.support.models.hugging_face import tiny_llama
from tests.support.servers.server_process import REAL, ServerProcess, running, the_error_line


def ask(server: ServerProcess, content: str, **fields: Any) -> dict[str, Any]:
    body = {"model": "SmolLM2-135M-Instruct", "messages": [{"role": "user", "content": content}], **fields}
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=120)
    assert answer.status_code == 200, answer.text
    return answer.json()


@pytest.mark.parametrize("quantization", some(["int8", "int4"], 1))
def test_the_demo_model_still_knows_the_capital_of_france_and_says_the_same_among_others(quantization: str) -> None:
    """Sampled answers replayed from their receipts, one after the other, while 8 other chats run."""
    with running(REAL, "--quantization", quantization, "--deterministic") as server:
        answer = ask(server, "What is the capital of France?", temperature=0, max_tokens=20)
        assert "Paris" in answer["choices"][0]["message"]["content"]
        assert answer["system_fingerprint"].endswith(f"_float32_{quantization}")
        receipts = [ask(server, f"Tell me of {n}.", max_tokens=40, receipt=True)["receipt"] for n in ("Rome", "fish")]
        assert all(receipt["numeric_mode"]["deterministic"] for receipt in receipts)
        with ThreadPoolExecutor(8) as threads:
            others = [threads.submit(ask, server, f"Count to {n}.", max_tokens=30) for n in range(8)]
            for receipt in receipts:
                comparison = replay(Connection(url=server.url, api_key=None), receipt)
                assert comparison.is_equal and len(comparison.lines) == 1, comparison.lines
            for other in others:
                other.result()


def test_a_quantization_that_does_not_fit_is_refused(tmp_path) -> None:
    narrow = str(convert(tiny_llama(tmp_path / "llama", head_dim=16), tmp_path / "narrow"))
    line = the_error_line(ServerProcess(REAL, "--model", narrow, "--quantization", "int8"))
    assert "--quantization int8" in line and "multiple of 64" in line
