"""--quantization as a user meets it: the demo model with small weights, and models that do not fit."""

import httpx
import pytest

from stellarbyte.checkpoint.convert import convert
from tests.support.cases import some
from tests.support.models.hugging_face import tiny_llama
from tests.support.servers.server_process import REAL, ServerProcess, running, the_error_line


@pytest.mark.parametrize("quantization", some(["int8", "int4"], 1))
def test_the_demo_model_still_knows_the_capital_of_france(quantization: str) -> None:
    with running(REAL, "--quantization", quantization) as server:
        question = {"role": "user", "content": "What is the capital of France?"}
        body = {"model": "SmolLM2-135M-Instruct", "messages": [question], "temperature": 0, "max_tokens": 20}
        answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60).json()
    assert "Paris" in answer["choices"][0]["message"]["content"]
    assert answer["system_fingerprint"].endswith(f"_float32_{quantization}")


def test_a_quantization_that_does_not_fit_is_refused(tmp_path) -> None:
    narrow = str(convert(tiny_llama(tmp_path / "llama", head_dim=16), tmp_path / "narrow"))
    too_narrow = ServerProcess(REAL, "--model", narrow, "--quantization", "int8")
    too_coarse = ServerProcess(REAL, "--dtype", "bfloat16", "--quantization", "int4")  # starts beside the other
    try:
        line = the_error_line(too_narrow)
        assert "--quantization int8" in line and "multiple of 64" in line
        assert "--quantization int4 on a CPU needs float32" in the_error_line(too_coarse)
    finally:
        too_narrow.stop()
        too_coarse.stop()
