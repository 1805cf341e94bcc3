"""`stellarbyte replay` against a server: equal answers, what has changed since, and files that hold no receipt."""

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from stellarbyte_client.terminal.replay import compare
from tests.terminal.command import Adapted, Command

CHAT = {"messages": [{"role": "user", "content": "Hello"}]}


def receipt_of(adapted: Adapted, path: str, **fields: Any) -> dict[str, Any]:
    body = {"model": "a1", "max_tokens": 8, "receipt": True, **fields}
    answer = httpx.post(f"{adapted.server.url}{path}", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()["receipt"]


def written(tmp_path: Path, content: Any) -> str:
    file = tmp_path / "receipt.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(file)


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": "One two", "temperature": 1.0},  # with the server's own seed
        {"prompt": [[5, 6, 7], [8, 9]], "n": 2, "best_of": 3, "temperature": 1.0, "seed": 7, "adapter_scale": 0.5},
        {"prompt": "One", "model": "a0+a1", "return_token_ids": True, "logprobs": 2},
    ],
)
def test_an_answer_is_computed_again(
    fields: dict[str, Any], adapted: Adapted, stellarbyte: Command, tmp_path: Path
) -> None:
    receipt = receipt_of(adapted, "/v1/completions", **fields)
    file = written(tmp_path, {"id": "cmpl-1", "receipt": receipt})  # as in an answer
    result = stellarbyte("replay", file, "--url", adapted.server.url)
    tokens = sum(map(len, receipt["answers"]))
    assert result.status == 0 and tokens > 0, result
    assert result.out.endswith(f"equal: {tokens} tokens.\n") and result.out.count("\n") == 1
    assert receipt["body"].keys() == {"model", "max_tokens", "receipt", "seed"} | fields.keys()


def test_a_receipt_of_a_chat_shows_token_ids_only_in_itself(adapted: Adapted) -> None:
    body = {"model": "a0", "max_tokens": 4, "receipt": True} | CHAT
    answer = httpx.post(f"{adapted.server.url}/v1/chat/completions", json=body, timeout=60)
    content = answer.json()
    assert len(content["receipt"]["answers"][0]) == content["usage"]["completion_tokens"]
    assert "token_ids" not in content["choices"][0]


def test_what_differs_is_named(adapted: Adapted, stellarbyte: Command, tmp_path: Path) -> None:
    receipt = receipt_of(adapted, "/v1/completions", prompt="One", temperature=1.0)
    changed = receipt | {"weights": "f" * 64, "versions": receipt["versions"] | {"torch": "1.0"}, "prompts": ["0"]}
    changed["answers"] = [[*receipt["answers"][0][:3], 0, 0]]
    result = stellarbyte("replay", written(tmp_path, changed), "--url", adapted.server.url)
    assert result.status == 1
    assert 'versions.torch was "1.0" and is "' in result.out
    assert 'weights was "ffff' in result.out
    assert "The prompt has other tokens now" in result.out
    assert "Answer 0 differs from token 3 on, of 5." in result.out
    assert "without --deterministic" in result.out
    again = receipt | {"numeric_mode": receipt["numeric_mode"] | {"deterministic": True}, "answers": []}
    assert "Answer 0 is missing." in compare(receipt, again).lines
    assert not any("without" in line for line in compare(receipt, again).lines)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("{", "cannot be read as JSON"),
        ([1], "holds no receipt"),
        ({"receipt": None}, "holds no receipt"),
        ({"version": 1}, "holds no receipt"),
    ],
)
def test_other_files_are_refused(content: Any, told: str, stellarbyte: Command, tmp_path: Path) -> None:
    result = stellarbyte("replay", written(tmp_path, content))
    assert result.status == 1 and told in result.err and "Traceback" not in result.err
    assert stellarbyte("replay", str(tmp_path / "absent.json")).status == 1


def test_damaged_receipts_are_refused(adapted: Adapted, stellarbyte: Command, tmp_path: Path) -> None:
    receipt = receipt_of(adapted, "/v1/completions", prompt="One")
    for change, told in (
        ({"version": 2}, "a receipt of version 2; this command reads 1"),
        ({"path": "/v1/unload_lora_adapter"}, "damaged"),
        ({"body": {"receipt": False}}, "damaged"),
        ({"answers": None}, "damaged"),
    ):
        result = stellarbyte("replay", written(tmp_path, receipt | change), "--url", adapted.server.url)
        assert result.status == 1 and told in result.err, result


def test_a_stream_has_no_receipt(adapted: Adapted) -> None:
    body = {"model": "a0", "prompt": "One", "stream": True, "receipt": True}
    answer = httpx.post(f"{adapted.server.url}/v1/completions", json=body, timeout=60)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"] == "The field 'receipt' is not allowed when 'stream' is true."
